"""What quaternion layers share: the weight, and the form that its products take."""

import weakref
from collections.abc import Callable
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError, ShapeError, nearest
from evenkeel.layers import is_captured
from evenkeel.quaternion.init import Init, Scale, quaternion_init_
from evenkeel.quaternion.product import assembled, eight, named

Algorithm = Literal["auto", "dense", "fast"]
FAST_FROM, WORTH = 1536, 400e6
"""Terms of a sum, and multiplications in all, from which on eight products are the faster."""


class QuaternionLayer(nn.Module):
    """A layer that multiplies by quaternions from the left.

    Attributes:
        weight: (4, outputs, inputs, ...), counted in quaternions; real parts first.
        bias: (outputs,), counted in real numbers; None for none.
        algorithm: "dense": one real product with the assembled weight. "fast": eight products of a
            quarter of the width, half of the arithmetic. "auto": the latter where it is the faster.
        terms: real numbers that are multiplied for each one that is read or written besides.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: Scale = "glorot"

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: int | None,
        terms: int,
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
        self.terms = terms
        self.init: Init = init
        self.weight = nn.Parameter(torch.empty(4, *shape, **where))
        self.bias = None if bias is None else nn.Parameter(torch.empty(bias, **where))
        self._kept: tuple[weakref.ref[nn.Parameter], tuple[bool, int, int], Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, and set the bias to zero."""
        quaternion_init_(self.weight, self.init, self.scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def is_fast(self, positions: int) -> bool:
        """Whether eight products are taken, where the weight is applied at so many positions."""
        if is_captured():
            return False
        if self.algorithm != "auto":
            return self.algorithm == "fast"
        if self.terms < FAST_FROM or torch.compiler.is_compiling():  # for positions of any number
            return self.terms >= FAST_FROM
        return positions * 4 * self.weight.numel() >= WORTH

    def made(self, fast: bool) -> Tensor:
        """The weight as a product takes it."""
        return eight(self.weight) if fast else matrix_of(self.weight)

    def kernel(self, fast: bool) -> Tensor:
        """The weight as it is used. In eval mode, without gradients, it is made once.

        It is made anew when the weight was changed in place or replaced; edits of ``weight.data``
        within one stretch of eval mode are not seen.
        """
        weight = self.weight
        if not self._may_keep():
            self._kept = None
            return self.made(fast)
        state = fast, weight._version, weight.data_ptr()
        kept = self._kept
        if kept is None or kept[0]() is not weight or kept[1] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = weakref.ref(weight), state, self.made(fast)
        return kept[2]

    def _may_keep(self) -> bool:
        # Fused optimizers do not count versions, so nothing outlives a stretch of training. What
        # stands in for a parameter for one call (functional_call, vmap, a parametrization) may have
        # the address and version of another.
        weight = self.weight
        return not (
            self.training
            or torch.compiler.is_compiling()
            or is_captured()
            or not isinstance(weight, nn.Parameter)
            or weight.is_inference()
            or (torch.is_grad_enabled() and weight.requires_grad)
        )

    def train(self, mode: bool = True) -> Self:
        """As every module's; what was kept is dropped."""
        self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be derived."""
        return {**self.__dict__, "_kept": None}


def matrix_of(weight: Tensor) -> Tensor:
    """The assembled matrix, by name where a graph is captured."""
    return named(weight) if is_captured() else assembled(weight)


def require_quaternions(**numbers: int) -> None:
    """Refuse numbers of channels or features that are no multiple of 4."""
    for name, number in numbers.items():
        if number < 4 or number % 4:
            raise ShapeError(
                f"{name} counts real numbers, four to a quaternion, so it must be a multiple of 4; "
                f"got {number!r}. Images of three channels are turned into four by to_quaternion."
            )
