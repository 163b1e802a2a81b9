"""The auto-encoders of the colour study: quaternion, real, and one shared by the channels."""

from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import ConfigError, nearest
from evenkeel.models.registry import architecture

Kind = Literal["quaternion", "real", "shared"]
WIDTHS = 32, 40


class ColourAutoEncoder(nn.Module):
    """Two strided convolutions and two transposed ones, each followed by Hardtanh.

    Args:
        kind: "quaternion" takes a pixel for (0, R, G, B) and has 6,444 parameters; "real" has three
            channels and 24,875; "shared" is a real one of one channel, applied to red, green and
            blue alike, which keeps colour by construction.

    Shape:
        (N, 3, H, W) in [0, 1], H and W multiples of 4 -> the same.

    References:
        Parcollet et al., "Quaternion convolutional neural networks for heterogeneous image
        processing", ICASSP 2019.
    """

    def __init__(self, kind: Kind = "quaternion") -> None:
        if kind not in get_args(Kind):
            raise ConfigError(f"Unknown kind {kind!r}. {nearest(kind, get_args(Kind))}")
        super().__init__()
        from evenkeel import quaternion  # other networks do without it

        self.kind = kind
        down: Any = nn.Conv2d
        up: Any = nn.ConvTranspose2d
        if kind == "quaternion":
            down, up = quaternion.QuaternionConv2d, quaternion.QuaternionConvTranspose2d
        channels = {"quaternion": 4, "real": 3, "shared": 1}[kind]
        first, second = WIDTHS
        self.layers = nn.Sequential(
            down(channels, first, 3, stride=2, padding=1),
            nn.Hardtanh(),
            down(first, second, 3, stride=2, padding=1),
            nn.Hardtanh(),
            up(second, first, 3, stride=2, padding=1, output_padding=1),
            nn.Hardtanh(),
            up(first, channels, 3, stride=2, padding=1, output_padding=1),
            nn.Hardtanh(),
        )
        if kind != "quaternion":
            for layer in self.layers:
                if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def channels(self, image: Tensor) -> Tensor:
        """A picture as the layers take it."""
        if self.kind == "quaternion":
            return F.pad(image, (0, 0, 0, 0, 1, 0))  # no real part
        return image.flatten(0, 1).unsqueeze(1) if self.kind == "shared" else image

    def loss(self, image: Tensor) -> Tensor:
        """Mean squared error over all channels that the layers give, a real part included."""
        target = self.channels(image)
        return F.mse_loss(self.layers(target), target)

    def forward(self, image: Tensor) -> Tensor:
        """The picture again."""
        y: Tensor = self.layers(self.channels(image))
        if self.kind == "quaternion":
            return y[:, 1:]
        return y.view(image.shape) if self.kind == "shared" else y


@architecture("colour_autoencoder")
def colour_autoencoder(**options: Any) -> ColourAutoEncoder:
    """:class:`ColourAutoEncoder` with these options."""
    return ColourAutoEncoder(**options)
