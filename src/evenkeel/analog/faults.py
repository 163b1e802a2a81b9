"""Devices that ignore what is written to them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evenkeel.analog.device import DeviceModel, State
from evenkeel.draws import Draws
from evenkeel.errors import ConfigError


@dataclass(frozen=True)
class StuckAt(DeviceModel):
    """Faulty devices: some conduct nothing, some always fully, for life.

    It comes after the other effects of a :class:`Device`, as a stuck device neither takes a write
    nor drifts. Its read noise is that of its conductance.

    Args:
        low: share of devices stuck at zero.
        high: share of devices stuck at ``g_max``.

    Examples:
        >>> import torch, evenkeel as ek
        >>> device = ek.analog.Device(ek.analog.PCM(), ek.analog.StuckAt(low=0.01, high=0.01))
        >>> device.name
        'PCM + StuckAt(0.01, high=0.01)'
    """

    permanent: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if not (self.low >= 0 and self.high >= 0 and self.low + self.high <= 1):
            raise ConfigError(
                f"StuckAt low and high are shares of all devices, 0 or more and together at most "
                f"1; got low={self.low!r}, high={self.high!r}."
            )

    @property
    def level(self) -> float:
        """Share of faulty devices: what a chart is drawn against."""
        return self.low + self.high

    def write(self, g: Tensor, draws: Draws, g_max: float) -> tuple[Tensor, State]:
        """Which devices are stuck, and at what (-1: not stuck)."""
        u = draws.uniform("stuck", tuple(g.shape), device=g.device)
        stuck = torch.full_like(g, -1.0)
        stuck[u < self.low] = 0.0
        stuck[u >= 1 - self.high] = g_max
        return torch.where(stuck < 0, g, stuck), {"stuck": stuck}

    def drift(self, g: Tensor, state: State, age_s: float) -> Tensor:
        """Stuck devices stay."""
        return torch.where(state["stuck"] < 0, g, state["stuck"])
