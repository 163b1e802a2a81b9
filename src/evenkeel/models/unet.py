"""A U-Net for segmentation, and its features for what else needs them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError
from evenkeel.models.norms import NormLayer, built_with
from evenkeel.models.registry import architecture


def conv_norm_relu(inputs: int, outputs: int, norm_layer: NormLayer, stride: int = 1) -> nn.Module:
    """A 3x3 convolution without bias, a normalizer, and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        norm_layer(outputs),
        nn.ReLU(),
    )


def require_multiples(x: Tensor, of: int) -> None:
    """Refuse images (N, C, H, W) whose sides are none."""
    if x.shape[-1] % of or x.shape[-2] % of:
        raise ConfigError(
            f"The sides of this network's images must be multiples of {of}; got "
            f"{tuple(x.shape[-2:])}. Pad them, as evenkeel.data's readers do."
        )


class UNetFeatures(nn.Module):
    """Down by halves and up again, with what was seen on the way down beside it.

    Args:
        in_channels: channels of the images.
        widths: channels at the full size, at half of it, and so on.
        norm_layer: from channels to a normalizer.

    Shape:
        (N, in_channels, H, W), H and W multiples of ``2 ** (len(widths) - 1)`` ->
        (N, widths[0], H, W).
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], norm_layer: NormLayer = nn.BatchNorm2d
    ) -> None:
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(
                conv_norm_relu(inputs, outputs, norm_layer),
                conv_norm_relu(outputs, outputs, norm_layer),
            )

        inputs = [in_channels, *widths[:-1]]
        self.multiple = 2 ** (len(widths) - 1)
        self.down = nn.ModuleList(double(i, o) for i, o in zip(inputs, widths, strict=True))
        pairs = list(zip(widths[1:], widths[:-1], strict=True))[::-1]  # from, and to
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in pairs)
        self.merge = nn.ModuleList(double(2 * o, o) for _, o in pairs)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Features of every pixel."""
        require_multiples(x, self.multiple)
        seen: list[Tensor] = []
        for k, layers in enumerate(self.down):
            x = layers(self.pool(x) if k else x)
            seen.append(x)
        for up, merge, beside in zip(self.up, self.merge, seen[-2::-1], strict=True):
            x = merge(torch.cat([beside, up(x)], 1))
        return x


class UNet(nn.Module):
    """A score for each class and pixel, from features of several sizes.

    Args:
        num_classes: outputs; 1 for foreground against background.
        in_channels: channels of the images.
        widths: channels at the full size, at half of it, and so on.
        norm_layer: from channels to a normalizer.

    Shape:
        (N, in_channels, H, W), H and W multiples of ``2 ** (len(widths) - 1)`` ->
        (N, num_classes, H, W).

    Examples:
        >>> UNet(1, widths=(8, 16))(torch.zeros(2, 3, 32, 48)).shape
        torch.Size([2, 1, 32, 48])

    References:
        Ronneberger, Fischer, Brox, "U-Net: convolutional networks for biomedical image
        segmentation", MICCAI 2015; here with padding and a normalizer.
    """

    def __init__(
        self,
        num_classes: int = 1,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64, 128),
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.features = UNetFeatures(in_channels, widths, norm_layer)
        self.classifier = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores before the sigmoid, or the softmax."""
        scores: Tensor = self.classifier(self.features(x))
        return scores


@architecture("unet")
def unet(
    num_classes: int = 1,
    in_channels: int = 3,
    width: int = 16,
    norm: str = "batch",
    normalization_batch: int | None = None,
    weight_standard: bool = False,
) -> nn.Module:
    """Four sizes, 482k weights at the default width.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels at the full size; each half has twice as many.
        norm: one of :data:`evenkeel.models.norms.NORMS`, or "batch_kalman".
        normalization_batch: samples that are normalized together in training; default: the batch.
        weight_standard: whether the convolutions' weights are standardized.
    """
    widths = [width * 2**k for k in range(4)]
    example = torch.zeros(2, in_channels, 32, 32)
    return built_with(
        lambda norm_layer: UNet(num_classes, in_channels, widths, norm_layer),
        example, norm, normalization_batch, weight_standard,
    )  # fmt: skip
