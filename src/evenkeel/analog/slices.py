"""Weights in several digits, each on an array of its own."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from evenkeel.errors import ConfigError

MOST_BITS = 24
"""Of a weight: what float32 holds."""


@dataclass(frozen=True)
class Slices:
    r"""Bit slicing: a weight is rounded, and its digits are held by different arrays.

    A share of the range $w \in [0, 1]$ becomes $q = \mathrm{round}(w\,(2^{bS} - 1))$, whose digits
    $q_s < 2^b$, the largest first, are set as $q_s / (2^b - 1)$ of the range. Each array's currents
    are converted by themselves and put together digitally,

    $$ y = \sum_{s=0}^{S-1} c_s\, y_s, \qquad c_s = 2^{b(S - 1 - s)}\,\frac{2^b - 1}{2^{bS} - 1}. $$

    Use where a device has few levels that can be told apart, or where converters have few bits. Not
    against noise in proportion to the range: the first digit has nearly all of it.

    Args:
        number: S, arrays for each weight.
        bits: b, of each digit.

    Examples:
        >>> Slices(2, bits=2).digits(torch.tensor([[1.0, 0.4]]))
        tensor([[1.0000, 0.3333],
                [1.0000, 0.6667]])

    References:
        Shafiee et al., "ISAAC: a convolutional neural network accelerator with in-situ analog
        arithmetic in crossbars", ISCA 2016.
    """

    number: int
    bits: int

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and n >= 1 for n in (self.number, self.bits))
        if not whole or self.number * self.bits > MOST_BITS:
            raise ConfigError(
                f"Slices needs a number and bits of 1 or more, {MOST_BITS} bits in all at most; "
                f"got number={self.number!r}, bits={self.bits!r}."
            )

    @property
    def shares(self) -> list[float]:
        """c: what each slice counts, the first for most."""
        top, levels = 2**self.bits - 1, 2 ** (self.bits * self.number) - 1
        return [2 ** (self.bits * (self.number - 1 - s)) * top / levels for s in range(self.number)]

    def digits(self, share: Tensor) -> Tensor:
        """Shares of the range (outputs, inputs) as those of all slices (S * outputs, inputs)."""
        # In float64, as float32 cannot tell 24 bits from their half.
        code = (share.double() * (2 ** (self.bits * self.number) - 1)).round().long()
        top = 2**self.bits - 1
        of_each = [code >> self.bits * (self.number - 1 - s) & top for s in range(self.number)]
        made: Tensor = (torch.cat(of_each) / top).to(share.dtype)
        return made

    def together(self, weights: Tensor) -> Tensor:
        """(S * outputs, inputs) of all slices as (outputs, inputs)."""
        by_slice: Tensor = weights.unflatten(0, (self.number, -1))
        whole: Tensor = torch.einsum("soi,s->oi", by_slice, by_slice.new_tensor(self.shares))
        return whole

    def to_dict(self) -> dict[str, int]:
        """Its settings."""
        return asdict(self)
