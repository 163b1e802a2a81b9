"""Quaternion layers as every method of the house knows layers: a matrix, and back.

A chip holds the assembled real matrix, each number of a quaternion on four pairs of devices.
"""

from torch import Tensor
from torch.nn import functional as F

from evenkeel.layers import register_weight_layer
from evenkeel.quaternion.conv import QuaternionConv1d, QuaternionConv2d, QuaternionConv3d
from evenkeel.quaternion.linear import QuaternionLinear
from evenkeel.quaternion.product import assembled, taken_apart


class QuaternionLinearWeights:
    """The assembled matrix of a linear layer."""

    def matrix(self, layer: QuaternionLinear) -> Tensor:
        """(out_features, in_features)."""
        return assembled(layer.weight)

    def weight(self, layer: QuaternionLinear, matrix: Tensor) -> Tensor:
        """The nearest quaternions."""
        return taken_apart(matrix)

    def forward(self, layer: QuaternionLinear, x: Tensor, matrix: Tensor) -> Tensor:
        """The real product, whose four copies of a number need not be alike."""
        return F.linear(x, matrix, layer.bias)


class QuaternionConvWeights:
    """The assembled kernel of a convolution, one row per real output channel."""

    def matrix(self, layer: QuaternionConv2d) -> Tensor:
        """(out_channels, in_channels / groups * kernel size)."""
        return assembled(layer.weight).flatten(1)

    def weight(self, layer: QuaternionConv2d, matrix: Tensor) -> Tensor:
        """The nearest quaternions."""
        return taken_apart(self._kernel(layer, matrix))

    def forward(self, layer: QuaternionConv2d, x: Tensor, matrix: Tensor) -> Tensor:
        """The real convolution."""
        return layer.with_kernel(x, self._kernel(layer, matrix))

    def _kernel(self, layer: QuaternionConv2d, matrix: Tensor) -> Tensor:
        channels = layer.in_channels // layer.groups
        return matrix.view(layer.out_channels, channels, *layer.kernel_size)


register_weight_layer(QuaternionLinear, QuaternionLinearWeights())
for _kind in (QuaternionConv1d, QuaternionConv2d, QuaternionConv3d):
    register_weight_layer(_kind, QuaternionConvWeights())
