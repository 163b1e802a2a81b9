"""Devices named by their statistics alone: additive, multiplicative, and a plain loss of gain."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evenkeel.analog.device import DeviceModel, State
from evenkeel.draws import Draws
from evenkeel.errors import ConfigError


def _require_level(model: DeviceModel, level: float) -> None:
    if not 0 <= level < math.inf:
        raise ConfigError(
            f"{type(model).__name__} level must be finite and not negative; got {level!r}."
        )


@dataclass(frozen=True)
class Gaussian(DeviceModel):
    r"""Additive Gaussian noise on every weight, in units of the largest weight of its scale.

    $$ \tilde w = w + \text{level}\cdot\max|w|\cdot\xi, \qquad \xi \sim N(0, 1) $$

    An idealisation, and the one that most published studies use: each device of a pair carries
    $\text{level}/\sqrt2$ of $G_{\max}$, and conductances may come out below zero. Whether the
    largest weight is taken over the layer or over an output column is the ``scale_per`` of
    :class:`Device`; levels of different conventions are not comparable, as in small networks the
    largest weight is 5 to 15 times the deviation.

    Args:
        level: standard deviation as a share of the largest weight.
    """

    level: float

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_level(self, self.level)

    def write(self, g: Tensor, draws: Draws, g_max: float) -> tuple[Tensor, State]:
        """Half of the noise power on each device of a pair."""
        sigma = self.level * g_max / math.sqrt(2)
        return g + sigma * draws.normal("gaussian", tuple(g.shape), device=g.device), {}


@dataclass(frozen=True)
class LogNormal(DeviceModel):
    r"""Multiplicative log-normal noise on every weight.

    $$ \tilde w = w\,e^{\text{level}\,\xi}, \qquad \xi \sim N(0, 1) $$

    Weights of zero stay zero, and no weight changes its sign. The mean gain is
    $e^{\text{level}^2/2}$.

    Args:
        level: standard deviation of the logarithm.
    """

    level: float

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_level(self, self.level)

    def write(self, g: Tensor, draws: Draws, g_max: float) -> tuple[Tensor, State]:
        """Each device on its own."""
        return g * (
            self.level * draws.normal("log-normal", tuple(g.shape), device=g.device)
        ).exp(), {}


@dataclass(frozen=True)
class Spread(DeviceModel):
    r"""Conductances that scatter in proportion to themselves, as one write leaves them.

    $$ \tilde G = \max(0,\; G\,(1 + \text{level}\,\xi)), \qquad \xi \sim N(0, 1) $$

    The conductance spread by which devices written without verification are named. Devices left at
    zero stay there; from a level of about 0.5 on, the bound at zero lifts the mean.

    Args:
        level: standard deviation as a share of the target.
    """

    level: float

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_level(self, self.level)

    def write(self, g: Tensor, draws: Draws, g_max: float) -> tuple[Tensor, State]:
        """Each device on its own."""
        xi = draws.normal("spread", tuple(g.shape), device=g.device)
        return (g * (1 + self.level * xi)).clamp_min(0), {}


@dataclass(frozen=True)
class Gain(DeviceModel):
    """Every conductance times one factor: the simplest error, which a remedy must undo exactly.

    Args:
        factor: above 0; 0.7 is a loss of 30 %.
    """

    factor: float

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ConfigError(f"Gain factor must be above 0 and finite; got {self.factor!r}.")

    @property
    def level(self) -> float:
        """The factor: what a chart is drawn against."""
        return self.factor

    def write(self, g: Tensor, draws: Draws, g_max: float) -> tuple[Tensor, State]:
        """No randomness."""
        return g * self.factor, {}
