"""A chip: one network on one physical set of devices, with an age."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from evenkeel.analog.device import Device
from evenkeel.analog.layer import AnalogLayer, derive_


class Chip(nn.Module):
    """A network on one chip; made by :func:`evenkeel.analog.program`.

    It is called like the network it holds. Its ``state_dict`` holds plain tensors and is the chip,
    bit for bit: both devices of every pair, their exponents and faults, the age, the digital
    parameters. ``torch.load(weights_only=True)`` and safetensors take it; :func:`evenkeel.save`
    writes it with what is needed to build it again.

    Attributes:
        model: the network, with an :class:`AnalogLayer` in place of each programmed layer.
        device: what happens to the conductances.
        seed: which chip.
        digital: layers that hold a weight matrix and stayed digital, and why.
    """

    def __init__(
        self, model: nn.Module, device: Device, seed: int, digital: dict[str, str]
    ) -> None:
        super().__init__()
        self.model = model
        self.device = device
        self.seed = seed
        self.digital = digital

    def arrays(self) -> Iterator[tuple[str, AnalogLayer]]:
        """Path in the network and module of every analog layer."""
        for path, module in self.model.named_modules():
            if isinstance(module, AnalogLayer):
                yield path, module

    @property
    def age_s(self) -> float:
        """Seconds since programming."""
        return float(next(array.age for _, array in self.arrays()))

    def age_(self, seconds: float) -> "Chip":
        """Set the age, in seconds since programming.

        Each device is on one trajectory, so the way does not matter: 1 h and then 1 d is 1 d.
        """
        self.device.require_age(seconds)
        arrays = [array for _, array in self.arrays()]
        for array in arrays:
            array.age.fill_(seconds)
        derive_(arrays)
        return self

    def rewind_(self, stream: str = "") -> "Chip":
        """Start the read noise anew, at the beginning of the stream of that name.

        Two networks on the same chip meet the same read noise when both were rewound to it.
        """
        for _, array in self.arrays():
            array.rewind_(stream)
        return self

    def to_torch(self) -> nn.Module:
        """The network with plain weights: what one read finds at this age, for any other program.

        What is new at each read is frozen, and converters are left out.
        """
        plain = {id(array): array.digital_twin() for _, array in self.arrays()}
        return copy.deepcopy(self.model, dict(plain))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output through one read of every array."""
        return self.model(*args, **kwargs)

    def extra_repr(self) -> str:
        """Seed and device."""
        return f"seed={self.seed}, device={self.device.name}"
