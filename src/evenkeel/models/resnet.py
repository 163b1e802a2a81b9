"""A small residual network, for images of any size, with any normalizer or none."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from evenkeel.models.norms import NormLayer, built_with
from evenkeel.models.registry import architecture

ConvLayer = Callable[..., nn.Module]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        norm_layer: NormLayer,
        conv_layer: ConvLayer = nn.Conv2d,
    ) -> None:
        super().__init__()
        self.conv1 = conv_layer(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm_layer(outputs)
        self.conv2 = conv_layer(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm_layer(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                conv_layer(inputs, outputs, 1, stride, bias=False), norm_layer(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = self.norm1(self.conv1(x)).relu()
        z: Tensor = self.norm2(self.conv2(y)) + self.shortcut(x)
        return z.relu()


class ResNet(nn.Module):
    """Stem, residual stages of which each but the first halves the map, mean over it, classifier.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        widths: channels of each stage.
        blocks: residual blocks per stage.
        norm_layer: from channels to a normalizer.
        conv_layer: with the arguments of ``nn.Conv2d``.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        widths: Sequence[int],
        blocks: int,
        norm_layer: NormLayer = nn.BatchNorm2d,
        conv_layer: ConvLayer = nn.Conv2d,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_layer(in_channels, widths[0], 3, padding=1, bias=False),
            norm_layer(widths[0]),
            nn.ReLU(),
        )
        layers, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(ResidualBlock(inputs, width, stride, norm_layer, conv_layer))
                inputs = width
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        y = self.blocks(self.stem(x))
        scores: Tensor = self.classifier(torch.mean(y, dim=(2, 3)))
        return scores


def _resnet(
    num_classes: int,
    in_channels: int,
    widths: Sequence[int],
    blocks: int,
    norm: str,
    normalization_batch: int | None,
    weight_standard: bool,
) -> nn.Module:
    def make(norm_layer: NormLayer) -> nn.Module:
        network = ResNet(num_classes, in_channels, widths, blocks, norm_layer)
        if norm == "none":
            _start_small_(network)
        return network

    example = torch.zeros(2, in_channels, 32, 32)
    return built_with(make, example, norm, normalization_batch, weight_standard)


def _start_small_(network: ResNet) -> None:
    """Make a network without normalizers trainable: variance kept by each layer, branches at zero.

    He et al. 2015 for the convolutions; De and Smith 2020 (SkipInit) for the branches.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.norm2.weight)  # type: ignore[arg-type]


@architecture("resnet8_digits")
def resnet8_digits(
    num_classes: int = 10,
    in_channels: int = 1,
    norm: str = "batch",
    normalization_batch: int | None = None,
    weight_standard: bool = False,
) -> nn.Module:
    """8 layers, 48k weights, for 8x8 digits.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        norm: one of :data:`evenkeel.models.norms.NORMS`, or "batch_kalman", which gives a
            :class:`evenkeel.norm.Kalmanized` around the network.
        normalization_batch: samples that are normalized together in training; default: the batch.
        weight_standard: whether the convolutions' weights are standardized.
    """
    widths = (16, 32, 48)
    return _resnet(num_classes, in_channels, widths, 1, norm, normalization_batch, weight_standard)


@architecture("resnet14_cifar10")
def resnet14_cifar10(
    num_classes: int = 10,
    in_channels: int = 3,
    norm: str = "batch",
    normalization_batch: int | None = None,
    weight_standard: bool = False,
) -> nn.Module:
    """14 layers, 175k weights, for 32x32 colour images; options as :func:`resnet8_digits`."""
    widths = (16, 32, 64)
    return _resnet(num_classes, in_channels, widths, 2, norm, normalization_batch, weight_standard)


@architecture("resnet14_cifar10_half")
def resnet14_cifar10_half(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """:func:`resnet14_cifar10` at half its width, with batch norm: 44k weights."""
    return ResNet(num_classes, in_channels, (8, 16, 32), 2)
