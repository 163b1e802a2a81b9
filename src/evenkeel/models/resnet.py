"""A small residual network with batch norm, for images of any size."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from evenkeel.models.registry import architecture

NormLayer = Callable[[int], nn.Module]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm_layer(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm_layer(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm_layer(outputs)
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
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        widths: Sequence[int],
        blocks: int,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),
            norm_layer(widths[0]),
            nn.ReLU(),
        )
        layers, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(ResidualBlock(inputs, width, stride, norm_layer))
                inputs = width
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        y = self.blocks(self.stem(x))
        scores: Tensor = self.classifier(torch.mean(y, dim=(2, 3)))
        return scores


@architecture("resnet8_digits")
def resnet8_digits(num_classes: int = 10, in_channels: int = 1) -> ResNet:
    """8 layers, 48k weights, for 8x8 digits."""
    return ResNet(num_classes, in_channels, widths=(16, 32, 48), blocks=1)


@architecture("resnet14_cifar10")
def resnet14_cifar10(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """14 layers, 175k weights, for 32x32 colour images."""
    return ResNet(num_classes, in_channels, widths=(16, 32, 64), blocks=2)
