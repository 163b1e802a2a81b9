"""The network that turns an image into a high-dimensional vector."""

from typing import Any

from torch import Tensor, nn

from evenkeel.errors import ConfigError


class HDController(nn.Module):
    """Four convolutions without padding, and one linear layer without an activation.

    5x5, 5x5, pool, 3x3, 3x3, pool, linear; ReLU behind each convolution, no normalizer. With 128
    channels and 512 dimensions it is the published one of 1,757,312 parameters. Any network that
    gives one vector for each sample serves a memory as well.

    Args:
        dim: of the vectors, d.
        channels: of every convolution.
        in_channels: of the images.
        device: of parameters.
        dtype: of parameters.

    Shape:
        (N, in_channels, 32, 32), ink 1 and paper 0 -> (N, d).

    Examples:
        >>> sum(p.numel() for p in HDController().parameters())
        1757312

    References:
        Karunaratne et al., Nature Communications 12, 2468 (2021), as its reimplementations have it.
    """

    def __init__(
        self,
        dim: int = 512,
        *,
        channels: int = 128,
        in_channels: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        for name, number in (("dim", dim), ("channels", channels), ("in_channels", in_channels)):
            if number < 1:
                raise ConfigError(f"{name} must be 1 or more; got {number!r}.")
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, channels, 5, **where),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 5, **where),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, channels, 3, **where),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, **where),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(16 * channels, dim, **where)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors of images."""
        vectors: Tensor = self.head(self.features(x))
        return vectors
