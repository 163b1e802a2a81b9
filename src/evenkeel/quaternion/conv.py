"""Quaternion convolutions of one, two and three dimensions."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.utils import _ntuple, _reverse_repeat_tuple

from evenkeel.errors import ConfigError, ShapeError, nearest
from evenkeel.quaternion.algebra import conjugate
from evenkeel.quaternion.init import Init
from evenkeel.quaternion.layer import Algorithm, QuaternionLayer, require_quaternions
from evenkeel.quaternion.product import assembled, eight, gathered, spread

Size = int | Sequence[int]
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
FAST_FROM = 256
"""Channels of a group, of the smaller side, from which on eight products are the faster."""


class _QuaternionConvNd(QuaternionLayer):
    """What all six convolutions have."""

    dims: ClassVar[int]

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
        shape = self.weight_shape(in_channels // 4, out_channels // 4, groups)
        super().__init__(
            (*shape, *kernel), out_channels if bias else None, algorithm, init, device, dtype
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size: tuple[int, ...] = kernel
        self.stride: tuple[int, ...] = each(stride)
        self.padding: tuple[int, ...] | str = padding if isinstance(padding, str) else each(padding)
        self.dilation: tuple[int, ...] = each(dilation)
        self.groups = groups
        self.padding_mode = padding_mode

    def weight_shape(self, inputs: int, outputs: int, groups: int) -> tuple[int, int]:
        """The weight's axes of channels, in quaternions."""
        raise NotImplementedError

    def fast_is_faster(self) -> bool:
        """For many channels in a group, and kernels that have work to save."""
        return min(self.in_channels, self.out_channels) // self.groups >= FAST_FROM

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


class _QuaternionConv(_QuaternionConvNd):
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

    def weight_shape(self, inputs: int, outputs: int, groups: int) -> tuple[int, int]:
        return outputs, inputs // groups

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, by one form or the other."""
        self.require_channels(x)
        if not self.is_fast():
            return self.with_kernel(x, self.kernel(fast=False))
        # Groups stand inside of the parts on both sides, so each product keeps its own.
        planes = spread(x.unflatten(1, (4, -1))).flatten(1, 2)
        kernel = self.kernel(fast=True).flatten(0, 1)
        y = gathered(self._convolved(planes, kernel, None, 8 * self.groups).unflatten(1, (8, -1)))
        return _biased(y.flatten(1, 2), self.bias)

    def with_kernel(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The convolution with a real kernel (out_channels, in_channels / groups, *kernel_size)."""
        if self.groups == 1:
            return self._convolved(x, kernel, self.bias, 1)
        rows = self.grouped(kernel.transpose(0, 1)).transpose(0, 1)
        y = self._convolved(self.grouped(x), rows, None, self.groups)
        return _biased(self.grouped(y, back=True), self.bias)

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


class _QuaternionConvTranspose(_QuaternionConvNd):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        *,
        adjoint: bool = True,
        algorithm: Algorithm = "auto",
        init: Init = "isotropic",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if padding_mode != "zeros" or isinstance(padding, str):
            raise ConfigError(
                f"A transposed convolution pads with zeros, by numbers; got padding={padding!r}, "
                f"padding_mode={padding_mode!r}."
            )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, algorithm, init, device, dtype,
        )  # fmt: skip
        self.output_padding: tuple[int, ...] = _ntuple(self.dims)(output_padding)
        self.adjoint = adjoint

    def weight_shape(self, inputs: int, outputs: int, groups: int) -> tuple[int, int]:
        return inputs, outputs // groups

    def made(self, fast: bool) -> Tensor:
        # A real transposed convolution takes the matrix's transpose, which is that of conjugates.
        if fast:
            return eight(conjugate(self.weight, 0) if self.adjoint else self.weight)
        return assembled(self.weight if self.adjoint else conjugate(self.weight, 0))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution, by one form or the other."""
        self.require_channels(x)
        if not self.is_fast():
            return self.with_kernel(x, self.kernel(fast=False), output_size)
        planes = spread(x.unflatten(1, (4, -1))).flatten(1, 2)
        kernel = self.kernel(fast=True).flatten(0, 1)
        y = self._convolved(planes, kernel, None, 8 * self.groups, output_size)
        return _biased(gathered(y.unflatten(1, (8, -1))).flatten(1, 2), self.bias)

    def with_kernel(
        self, x: Tensor, kernel: Tensor, output_size: list[int] | None = None
    ) -> Tensor:
        """With a real kernel (in_channels, out_channels / groups, *kernel_size)."""
        if self.groups == 1:
            return self._convolved(x, kernel, self.bias, 1, output_size)
        rows = self.grouped(kernel.transpose(0, 1)).transpose(0, 1)
        y = self._convolved(self.grouped(x), rows, None, self.groups, output_size)
        return _biased(self.grouped(y, back=True), self.bias)

    def _convolved(
        self,
        x: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        groups: int,
        output_size: list[int] | None,
    ) -> Tensor:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.dims - 1]
        of_torch: Any = _ConvTransposeNd._output_padding
        more = of_torch(
            self, x, output_size, self.stride, self.padding, self.kernel_size, self.dims,
            self.dilation,
        )  # fmt: skip
        options: Any = self.stride, self.padding, more, groups, self.dilation
        y: Tensor = convolve(x, kernel, bias, *options)
        return y

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, output_padding={self.output_padding}, adjoint={self.adjoint}"
        )


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2))


class QuaternionConv1d(_QuaternionConv):
    r"""A quaternion convolution over a sequence: $y_n = \sum_m w_{nm} \ast x_m + b_n$.

    Every product of the convolution is a Hamilton product from the left. A quarter of the
    parameters of ``nn.Conv1d``; its options have the same names and meanings.

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
        (N, in_channels, L) -> (N, out_channels, L').

    Raises:
        ShapeError: channels that are no multiple of 4, or an input of others.
        ConfigError: groups that do not divide, or an unknown option.

    References:
        Parcollet, Morchid, Linares, "Quaternion convolutional neural networks for heterogeneous
        image processing", ICASSP 2019.
    """

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
    r"""A quaternion convolution over volumes: $y_n = \sum_m w_{nm} \ast x_m + b_n$.

    Every product of the convolution is a Hamilton product from the left. A quarter of the
    parameters of ``nn.Conv3d``; its options have the same names and meanings.

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
        (N, in_channels, D, H, W) -> (N, out_channels, D, H, W').

    Raises:
        ShapeError: channels that are no multiple of 4, or an input of others.
        ConfigError: groups that do not divide, or an unknown option.

    References:
        Parcollet, Morchid, Linares, "Quaternion convolutional neural networks for heterogeneous
        image processing", ICASSP 2019.
    """

    dims = 3


class QuaternionConvTranspose1d(_QuaternionConvTranspose):
    r"""The transpose of :class:`QuaternionConv1d`, for decoders.

    By default the adjoint, $y_n = \sum_m \overline{w_{mn}} \ast^T x_m$: with the same weight,
    $\langle Wx, y\rangle = \langle x, W^* y\rangle$. It multiplies by conjugates, as the published
    code does; ``adjoint=False`` by the quaternions themselves.

    Args:
        in_channels: real numbers, a multiple of 4, as [all r | all i | all j | all k].
        out_channels: likewise.
        kernel_size: of the kernel.
        stride: of the output.
        padding: taken off the output.
        output_padding: added on one side of the output.
        groups: which divide the quaternions of both sides.
        bias: whether there is one; a real number for each output channel.
        dilation: of the kernel.
        padding_mode: zeros.
        adjoint: whether it multiplies by conjugates.
        algorithm: see :class:`evenkeel.quaternion.QuaternionLayer`.
        init: see :func:`evenkeel.quaternion.quaternion_init_`; with Glorot's scale.
        device: of parameters.
        dtype: of parameters.

    Shape:
        (N, in_channels, L) -> (N, out_channels, L').

    Raises:
        ShapeError: channels that are no multiple of 4, or an input of others.
        ConfigError: groups that do not divide, or another padding mode.
    """

    dims = 1


class QuaternionConvTranspose2d(_QuaternionConvTranspose):
    r"""The transpose of :class:`QuaternionConv2d`, for decoders.

    By default the adjoint, $y_n = \sum_m \overline{w_{mn}} \ast^T x_m$: with the same weight,
    $\langle Wx, y\rangle = \langle x, W^* y\rangle$. It multiplies by conjugates, as the published
    code does; ``adjoint=False`` by the quaternions themselves.

    Args:
        in_channels: real numbers, a multiple of 4, as [all r | all i | all j | all k].
        out_channels: likewise.
        kernel_size: of the kernel.
        stride: of the output.
        padding: taken off the output.
        output_padding: added on one side of the output.
        groups: which divide the quaternions of both sides.
        bias: whether there is one; a real number for each output channel.
        dilation: of the kernel.
        padding_mode: zeros.
        adjoint: whether it multiplies by conjugates.
        algorithm: see :class:`evenkeel.quaternion.QuaternionLayer`.
        init: see :func:`evenkeel.quaternion.quaternion_init_`; with Glorot's scale.
        device: of parameters.
        dtype: of parameters.

    Shape:
        (N, in_channels, H, W) -> (N, out_channels, H, W').

    Raises:
        ShapeError: channels that are no multiple of 4, or an input of others.
        ConfigError: groups that do not divide, or another padding mode.
    """

    dims = 2


class QuaternionConvTranspose3d(_QuaternionConvTranspose):
    r"""The transpose of :class:`QuaternionConv3d`, for decoders.

    By default the adjoint, $y_n = \sum_m \overline{w_{mn}} \ast^T x_m$: with the same weight,
    $\langle Wx, y\rangle = \langle x, W^* y\rangle$. It multiplies by conjugates, as the published
    code does; ``adjoint=False`` by the quaternions themselves.

    Args:
        in_channels: real numbers, a multiple of 4, as [all r | all i | all j | all k].
        out_channels: likewise.
        kernel_size: of the kernel.
        stride: of the output.
        padding: taken off the output.
        output_padding: added on one side of the output.
        groups: which divide the quaternions of both sides.
        bias: whether there is one; a real number for each output channel.
        dilation: of the kernel.
        padding_mode: zeros.
        adjoint: whether it multiplies by conjugates.
        algorithm: see :class:`evenkeel.quaternion.QuaternionLayer`.
        init: see :func:`evenkeel.quaternion.quaternion_init_`; with Glorot's scale.
        device: of parameters.
        dtype: of parameters.

    Shape:
        (N, in_channels, D, H, W) -> (N, out_channels, D, H, W').

    Raises:
        ShapeError: channels that are no multiple of 4, or an input of others.
        ConfigError: groups that do not divide, or another padding mode.
    """

    dims = 3
