"""Converters between the analog and the digital side."""

import math
from dataclasses import dataclass

from torch import Tensor

from evenkeel.errors import ConfigError

MOST_BITS = 32


@dataclass(frozen=True)
class Converter:
    r"""A converter of so many bits with a fixed range; what is beyond is clipped.

    $$ q(x) = \Delta\,\mathrm{round}(\mathrm{clip}(x,\,-R,\,R)/\Delta), \qquad
       \Delta = R / (2^{b-1} - 1); $$

    where nothing is below zero, from 0 to R, with $\Delta = R / (2^b - 1)$.

    Args:
        bits: b, from 2 to 32.
        limit: R, as a share of the largest value that can come.

    Examples:
        >>> import torch
        >>> Converter(3, 0.5)(torch.tensor([0.1, -0.3, 0.9]), 1.0)
        tensor([ 0.1667, -0.3333,  0.5000])
    """

    bits: int
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= MOST_BITS:
            raise ConfigError(f"A converter needs 2 to {MOST_BITS} bits; got {self.bits!r}.")
        if not 0 < self.limit < math.inf:
            raise ConfigError(f"A converter's limit must be above 0; got {self.limit!r}.")

    def __call__(self, x: Tensor, largest: float, *, signed: bool = True) -> Tensor:
        """Convert values of which ``largest`` is the largest that can come.

        Where they are not ``signed``, none is below zero.
        """
        levels = 2 ** (self.bits - 1) - 1 if signed else 2**self.bits - 1
        step = self.limit * largest / levels
        code: Tensor = (x / step).round().clamp(-levels if signed else 0, levels)
        return code.mul(step)
