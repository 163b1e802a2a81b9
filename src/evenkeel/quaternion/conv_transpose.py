"""Transposed quaternion convolutions of one, two and three dimensions."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.utils import _ntuple

from evenkeel.errors import ConfigError
from evenkeel.quaternion.algebra import conjugate
from evenkeel.quaternion.conv import QuaternionConvNd, Size, biased
from evenkeel.quaternion.init import Init
from evenkeel.quaternion.layer import Algorithm, matrix_of
from evenkeel.quaternion.product import eight, in_eight


class _QuaternionConvTranspose(QuaternionConvNd):
    transposed = True

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

    def made(self, fast: bool) -> Tensor:
        # A real transposed convolution takes the matrix's transpose, which is that of conjugates.
        if fast:
            return eight(conjugate(self.weight, 0) if self.adjoint else self.weight)
        return matrix_of(self.weight if self.adjoint else conjugate(self.weight, 0))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution, by one form or the other."""
        self.require_channels(x)
        if not self.is_fast(x.numel() // self.in_channels):
            return self.with_kernel(x, self.kernel(fast=False), output_size)

        def product(part: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
            return self._convolved(part, kernel, bias, self.groups, output_size)

        return in_eight(x, self.kernel(fast=True), self.bias, product)

    def with_kernel(
        self, x: Tensor, kernel: Tensor, output_size: list[int] | None = None
    ) -> Tensor:
        """With a real kernel (in_channels, out_channels / groups, *kernel_size)."""
        if self.groups == 1:
            return self._convolved(x, kernel, self.bias, 1, output_size)
        rows = self.grouped(kernel.transpose(0, 1)).transpose(0, 1)
        y = self._convolved(self.grouped(x), rows, None, self.groups, output_size)
        return biased(self.grouped(y, back=True), self.bias)

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


class QuaternionConvTranspose1d(_QuaternionConvTranspose):
    """:class:`QuaternionConvTranspose2d` over sequences, (N, in_channels, L)."""

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
    """:class:`QuaternionConvTranspose2d` over volumes, (N, in_channels, D, H, W)."""

    dims = 3
