"""Quaternion convolutions of one, two and three dimensions."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.utils import _ntuple, _reverse_repeat_tuple

from evenkeel.errors import ConfigError, ShapeError, nearest
from evenkeel.quaternion.init import Init
from evenkeel.quaternion.layer import Algorithm, QuaternionLayer, require_quaternions
from evenkeel.quaternion.product import in_eight

Size = int | Sequence[int]
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class QuaternionConvNd(QuaternionLayer):
    """What all six convolutions have."""

    dims: ClassVar[int]
    transposed: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        groups: int,
        bias: bool,
        padding_mode: str,
        algorithm: Algorithm,
        init: Init,
        device: Any,
        dtype: Any,
    ) -> None:
        require_quaternions(in_channels=in_channels, out_channels=out_channels)
        if groups < 1 or in_channels // 4 % groups or out_channels // 4 % groups:
            raise ConfigError(
                f"groups must divide the quaternions on both sides, {in_channels // 4} and "
                f"{out_channels // 4}; got {groups!r}."
            )
        if padding_mode not in PADDING_MODES:
            raise ConfigError(
                f"Unknown padding_mode {padding_mode!r}. {nearest(padding_mode, PADDING_MODES)}"
            )
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ConfigError(f"padding must be a number, 'same' or 'valid'; got {padding!r}.")
        each = _ntuple(self.dims)
        if padding == "same" and any(step != 1 for step in each(stride)):
            raise ConfigError(f"padding='same' needs a stride of 1; got {stride!r}.")
        kernel = each(kernel_size)
        inputs, outputs = in_channels // 4, out_channels // 4
        # As torch has it, a transposed one has its inputs first.
        axes = (inputs, outputs // groups) if self.transposed else (outputs, inputs // groups)
        # With a stride, more is read for each output that is written; transposed, more is written.
        terms = min(in_channels, out_channels) // groups * math.prod(kernel)
        terms //= math.prod(each(stride))
        super().__init__(
            (*axes, *kernel), out_channels if bias else None, terms, algorithm, init, device, dtype
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size: tuple[int, ...] = kernel
        self.stride: tuple[int, ...] = each(stride)
        self.padding: tuple[int, ...] | str = padding if isinstance(padding, str) else each(padding)
        self.dilation: tuple[int, ...] = each(dilation)
        self.groups = groups
        self.padding_mode = padding_mode

    def require_channels(self, x: Tensor) -> None:
        """Refuse inputs of other sizes, in words."""
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join("DHW"[3 - self.dims :])
            raise ShapeError(
                f"The layer needs (N, {self.in_channels}, {axes}), all real parts first; got shape "
                f"{tuple(x.shape)}."
            )

    def grouped(self, x: Tensor, back: bool = False) -> Tensor:
        """Channels [part, group, ...] as [group, part, ...], which a grouped convolution takes."""
        if self.groups == 1:
            return x
        first, second = (self.groups, 4) if back else (4, self.groups)
        parts: Tensor = x.unflatten(1, (first, second, -1))
        return parts.transpose(1, 2).flatten(1, 3)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, "
            f"padding_mode={self.padding_mode!r}, algorithm={self.algorithm!r}"
        )


def biased(y: Tensor, bias: Tensor | None) -> Tensor:
    """With a number for each channel; in the precision of what it is added to."""
    return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2))


class _QuaternionConv(QuaternionConvNd):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        algorithm: Algorithm = "auto",
        init: Init = "isotropic",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, algorithm, init, device, dtype,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, by one form or the other."""
        self.require_channels(x)
        if not self.is_fast(x.numel() // self.in_channels // math.prod(self.stride)):
            return self.with_kernel(x, self.kernel(fast=False))
        # Groups stand inside of the parts on both sides, so each product keeps its own.
        return in_eight(x, self.kernel(fast=True), self.bias, self._product)

    def _product(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolved(x, kernel, bias, self.groups)

    def with_kernel(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The convolution with a real kernel (out_channels, in_channels / groups, *kernel_size)."""
        if self.groups == 1:
            return self._convolved(x, kernel, self.bias, 1)
        rows = self.grouped(kernel.transpose(0, 1)).transpose(0, 1)
        y = self._convolved(self.grouped(x), rows, None, self.groups)
        return biased(self.grouped(y, back=True), self.bias)

    def _convolved(self, x: Tensor, kernel: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._borders(), mode=self.padding_mode)
            padding = 0
        y: Tensor = convolve(x, kernel, bias, self.stride, padding, self.dilation, groups)
        return y

    def _borders(self) -> list[int]:
        """For ``F.pad``: the last axis first, before and behind."""
        if not isinstance(self.padding, str):
            return list(_reverse_repeat_tuple(self.padding, 2))
        if self.padding == "valid":
            return [0] * (2 * self.dims)
        sizes = list(zip(self.dilation, self.kernel_size, strict=True))[::-1]
        totals = [dilation * (kernel - 1) for dilation, kernel in sizes]
        return [part for total in totals for part in (total // 2, total - total // 2)]


class QuaternionConv1d(_QuaternionConv):
    """:class:`QuaternionConv2d` over sequences, (N, in_channels, L), with the same options."""

    dims = 1


class QuaternionConv2d(_QuaternionConv):
    r"""A quaternion convolution over images: $y_n = \sum_m w_{nm} \ast x_m + b_n$.

    Every product of the convolution is a Hamilton product from the left. A quarter of the
    parameters of ``nn.Conv2d``; its options have the same names and meanings.

    Args:
        in_channels: real numbers, a multiple of 4, as [all r | all i | all j | all k].
        out_channels: likewise.
        kernel_size: of the kernel.
        stride: of the window.
        padding: a number, "same" or "valid".
        dilation: of the window.
        groups: which divide the quaternions of both sides.
        bias: whether there is one; a real number for each output channel.
        padding_mode: zeros, reflect, replicate or circular.
        algorithm: see :class:`evenkeel.quaternion.QuaternionLayer`.
        init: see :func:`evenkeel.quaternion.quaternion_init_`; with Glorot's scale.
        device: of parameters.
        dtype: of parameters.

    Shape:
        (N, in_channels, H, W) -> (N, out_channels, H, W').

    Raises:
        ShapeError: channels that are no multiple of 4, or an input of others.
        ConfigError: groups that do not divide, or an unknown option.

    Examples:
        >>> import torch
        >>> layer = QuaternionConv2d(4, 32, 3, stride=2, padding=1)
        >>> layer(torch.randn(1, 4, 16, 16)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([1, 32, 8, 8]), 320)

    References:
        Parcollet, Morchid, Linares, "Quaternion convolutional neural networks for heterogeneous
        image processing", ICASSP 2019.
    """

    dims = 2


class QuaternionConv3d(_QuaternionConv):
    """:class:`QuaternionConv2d` over volumes, (N, in_channels, D, H, W), with the same options."""

    dims = 3
