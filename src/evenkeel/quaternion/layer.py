"""What quaternion layers share: the weight, and the form that its products take."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError, ShapeError, nearest
from evenkeel.quaternion.init import Init, Scale, quaternion_init_
from evenkeel.quaternion.product import assembled, eight

Algorithm = Literal["auto", "dense", "fast"]


class QuaternionLayer(nn.Module):
    """A layer that multiplies by quaternions from the left.

    Attributes:
        weight: (4, outputs, inputs, ...), counted in quaternions; real parts first.
        bias: (outputs,), counted in real numbers; None for none.
        algorithm: "dense": one real product with the assembled weight. "fast": eight products of a
            quarter of the width, half of the arithmetic. "auto": the faster of them, by size.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: Scale = "glorot"

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: int | None,
        algorithm: Algorithm,
        init: Init,
        device: Any,
        dtype: Any,
    ) -> None:
        if algorithm not in get_args(Algorithm):
            raise ConfigError(
                f"Unknown algorithm {algorithm!r}. {nearest(algorithm, get_args(Algorithm))}"
            )
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.algorithm: Algorithm = algorithm
        self.init: Init = init
        self.weight = nn.Parameter(torch.empty(4, *shape, **where))
        self.bias = None if bias is None else nn.Parameter(torch.empty(bias, **where))
        self._kept: tuple[Any, Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, and set the bias to zero."""
        quaternion_init_(self.weight, self.init, self.scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def is_fast(self) -> bool:
        """Whether the eight products are taken."""
        return self.algorithm == "fast" or (self.algorithm == "auto" and self.fast_is_faster())

    def fast_is_faster(self) -> bool:
        """What "auto" goes by."""
        raise NotImplementedError

    def made(self, fast: bool) -> Tensor:
        """The weight as a product takes it."""
        return eight(self.weight) if fast else assembled(self.weight)

    def kernel(self, fast: bool) -> Tensor:
        """The weight as it is used; made anew only where it has changed, or gradients are asked."""
        if (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and self.weight.requires_grad)
            or self.weight.is_inference()
        ):
            return self.made(fast)
        weight = self.weight
        state = (fast, weight._version, weight.data_ptr(), weight.dtype, weight.device)
        if self._kept is None or self._kept[0] != state:
            with torch.no_grad():
                self._kept = state, self.made(fast)
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be derived."""
        return {**self.__dict__, "_kept": None}


def require_quaternions(**numbers: int) -> None:
    """Refuse numbers of channels or features that are no multiple of 4."""
    for name, number in numbers.items():
        if number < 4 or number % 4:
            raise ShapeError(
                f"{name} counts real numbers, four to a quaternion, so it must be a multiple of 4; "
                f"got {number!r}. Images of three channels are turned into four by to_quaternion."
            )
