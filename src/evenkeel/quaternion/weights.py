"""Quaternion layers as every method of the house knows layers: a matrix, and back.

A chip holds the assembled real matrix, each number of a quaternion on four pairs of devices.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from evenkeel.layers import register_weight_layer
from evenkeel.quaternion.algebra import conjugate
from evenkeel.quaternion.conv import QuaternionConv1d, QuaternionConv2d, QuaternionConv3d
from evenkeel.quaternion.conv_transpose import (
    QuaternionConvTranspose1d,
    QuaternionConvTranspose2d,
    QuaternionConvTranspose3d,
)
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

    def matrix(self, layer: Any) -> Tensor:
        """(out_channels, in_channels / groups * kernel size)."""
        return assembled(layer.weight).flatten(1)

    def weight(self, layer: Any, matrix: Tensor) -> Tensor:
        """The nearest quaternions."""
        return taken_apart(self._kernel(layer, matrix))

    def forward(self, layer: Any, x: Tensor, matrix: Tensor) -> Tensor:
        """The real convolution."""
        y: Tensor = layer.with_kernel(x, self._kernel(layer, matrix))
        return y

    def _kernel(self, layer: Any, matrix: Tensor) -> Tensor:
        channels = layer.in_channels // layer.groups
        return matrix.view(layer.out_channels, channels, *layer.kernel_size)


class QuaternionConvTransposeWeights(QuaternionConvWeights):
    """The assembled kernel of a transposed convolution, one row per real output channel."""

    def matrix(self, layer: Any) -> Tensor:
        """(out_channels, in_channels / groups * kernel size)."""
        return _swapped(layer.made(fast=False), layer.groups).flatten(1)

    def weight(self, layer: Any, matrix: Tensor) -> Tensor:
        """The nearest quaternions."""
        nearest = taken_apart(self._kernel(layer, matrix))
        return nearest if layer.adjoint else conjugate(nearest, 0)

    def _kernel(self, layer: Any, matrix: Tensor) -> Tensor:
        return _swapped(super()._kernel(layer, matrix), layer.groups)


def _swapped(kernel: Tensor, groups: int) -> Tensor:
    """Inputs first as outputs first, and back; a real kernel's parts lie outside of its groups."""
    apart = kernel.unflatten(1, (4, -1)).unflatten(0, (4, groups, -1))
    kernel_axes = range(5, apart.dim())
    swapped: Tensor = apart.permute(3, 1, 4, 0, 2, *kernel_axes)
    return swapped.flatten(3, 4).flatten(0, 2)


register_weight_layer(QuaternionLinear, QuaternionLinearWeights())
for _kind in (QuaternionConv1d, QuaternionConv2d, QuaternionConv3d):
    register_weight_layer(_kind, QuaternionConvWeights())
for _transposed in (
    QuaternionConvTranspose1d,
    QuaternionConvTranspose2d,
    QuaternionConvTranspose3d,
):
    register_weight_layer(_transposed, QuaternionConvTransposeWeights())
