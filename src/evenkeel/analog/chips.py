"""Many chips of one network, that share all but their devices."""

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from evenkeel.analog.chip import Chip
from evenkeel.analog.layer import write_


class Chips:
    """Chips of one network and device, with seeds in a row; made by ``program(..., chips=K)``.

    They are K single ones, bit for bit. The network around the arrays is held once, and there is a
    set of devices for each chip, which are brought in one after the other: cheaper to make than as
    many single chips, as fast to run, and all outputs come stacked.

    Attributes:
        device: what happens to the conductances.
        seeds: of the chips.
        digital: layers that stayed digital, and why.

    Examples:
        >>> import torch, evenkeel as ek
        >>> net, x = torch.nn.Linear(8, 3), torch.randn(5, 8)
        >>> chips = ek.analog.program(net, ek.analog.PCM(), seed=10, chips=4).age_(3600)
        >>> chips(x).shape, [chip.seed for chip in chips]
        (torch.Size([4, 5, 3]), [10, 11, 12, 13])
        >>> single = ek.analog.program(net, ek.analog.PCM(), seed=12).age_(3600)
        >>> torch.equal(chips[2].rewind_()(x), single.rewind_()(x))
        True
    """

    def __init__(self, first: Chip, number: int) -> None:
        self.device, self.digital = first.device, first.digital
        self.seeds = range(first.seed, first.seed + number)
        self._chip = first
        self._age_s = 0.0
        arrays = [array for _, array in first.arrays()]
        self._held = [[dict(array._buffers) for array in arrays]]
        if number > 1:
            self._held += write_(arrays, self.seeds[1:])
        for array in arrays:
            array.target = None
        self._ready = [False] * number  # at the present age: each is made so when it is brought in

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, k: int) -> Chip:
        """One of them on its own, with a network of its own around it."""
        at = range(len(self))[operator.index(k)]
        return copy.deepcopy(self._bring(at))

    def __iter__(self) -> Iterator[Chip]:
        return (self[k] for k in range(len(self)))

    def age_(self, seconds: float) -> "Chips":
        """Set the age of all, in seconds since programming."""
        self.device.require_age(seconds)
        self._age_s, self._ready = seconds, [False] * len(self)
        return self

    def rewind_(self, stream: str = "") -> "Chips":
        """Start the read noise of all anew, at the beginning of the stream of that name."""
        for k in range(len(self)):
            self._bring(k).rewind_(stream)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's outputs on each chip, stacked along a new first axis."""
        outputs = [self._bring(k)(*args, **kwargs) for k in range(len(self))]
        return torch.utils._pytree.tree_map(_stacked, *outputs)

    def _bring(self, k: int) -> Chip:
        """The network with the devices of chip k."""
        for (_, array), held in zip(self._chip.arrays(), self._held[k], strict=True):
            array._buffers.update(held)
            array.seed = self.seeds[k]
        self._chip.seed = self.seeds[k]
        if not self._ready[k]:
            self._chip.age_(self._age_s)
            self._held[k] = [dict(array._buffers) for _, array in self._chip.arrays()]
            self._ready[k] = True
        return self._chip

    def __repr__(self) -> str:
        """Number, seeds and device."""
        return f"{len(self)} chips, seeds {self.seeds[0]} to {self.seeds[-1]}, {self.device.name}"


def _stacked(*of_each: Any) -> Any:
    """Tensors of all chips; of anything else that of the first."""
    return torch.stack(of_each) if isinstance(of_each[0], Tensor) else of_each[0]
