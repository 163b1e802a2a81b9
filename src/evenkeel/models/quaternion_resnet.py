"""The residual network for CIFAR-10, of quaternions."""

import functools
from typing import Literal

from torch import Tensor, nn

from evenkeel.models.registry import architecture
from evenkeel.models.resnet import ResNet


class Pixels(nn.Module):
    """(N, 3, H, W) -> (N, 4, H, W): a pixel as (0, R, G, B)."""

    def forward(self, image: Tensor) -> Tensor:
        """A real part of zeros."""
        return nn.functional.pad(image, (0, 0, 0, 0, 1, 0))


@architecture("quaternion_resnet14_cifar10")
def quaternion_resnet14_cifar10(
    num_classes: int = 10, norm: Literal["whitening", "variance"] = "whitening"
) -> nn.Module:
    """``resnet14_cifar10`` with quaternion convolutions and batch norms, and a real classifier.

    Args:
        num_classes: outputs.
        norm: kind of :class:`evenkeel.quaternion.QuaternionBatchNorm`.
    """
    from evenkeel import quaternion  # other networks do without it

    norm_layer = functools.partial(quaternion.QuaternionBatchNorm, kind=norm)
    convolution = quaternion.QuaternionConv2d
    return nn.Sequential(Pixels(), ResNet(num_classes, 4, (16, 32, 64), 2, norm_layer, convolution))
