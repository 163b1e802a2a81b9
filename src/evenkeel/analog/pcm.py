"""Phase-change memory by its published programming, drift and read-noise laws."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evenkeel.analog.device import DeviceModel, State
from evenkeel.draws import Draws
from evenkeel.errors import ConfigError

TINY = 1e-3
"""Shares of the range below it are as it is: the clips of the laws take them all."""


@dataclass(frozen=True)
class PhaseChange(DeviceModel):
    """What phase-change memories have in common; each has its own laws of the share of the range.

    Args:
        programming: factor on the programming noise (0: exact writes).
        drifting: factor on the drift exponents (0: none).
        reading: factor on the read noise (0: exact reads).
    """

    programming: float = 1.0
    drifting: float = 1.0
    reading: float = 1.0

    g_max: ClassVar[float]
    ages: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    t0_s: ClassVar[float] = 20.0
    """Time from programming to the first read, to which the programmed conductance belongs."""
    t_read_s: ClassVar[float] = 250e-9
    """Duration of one read."""

    def __post_init__(self) -> None:
        for name in ("programming", "drifting", "reading"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{type(self).__name__} {name} must be 0 or more and finite; got "
                    f"{getattr(self, name)!r}."
                )

    def deviation(self, x: Tensor) -> Tensor:
        """Of programming, in µS, at a share of the range from 0 to 1."""
        raise NotImplementedError

    def exponent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the drift exponent."""
        raise NotImplementedError

    def noise(self, x: Tensor) -> Tensor:
        """Q: of one read, as a share of the conductance, at a programmed share of the range."""
        raise NotImplementedError

    def write(self, g: Tensor, draws: Draws, g_max: float) -> tuple[Tensor, State]:
        """Programming noise, and a drift exponent for each device."""
        x = (g / self.g_max).clamp_(0, 1)  # the laws' range; an effect before may have left it
        shape = tuple(g.shape)
        programmed = g
        if self.programming:
            xi = draws.normal("programming", shape, device=g.device).to(g.dtype)
            programmed = xi.mul_(self.programming * self.deviation(x)).add_(g).clamp_min_(0)
        if not self.drifting:
            return programmed, {}
        mean, std = self.exponent(x)
        xi = draws.normal("drift exponent", shape, device=g.device).to(g.dtype)
        return programmed, {"nu": xi.mul_(std).add_(mean).abs_().mul_(self.drifting)}

    def drift(self, g: Tensor, state: State, age_s: float) -> Tensor:
        """One trajectory for each device: the age alone decides the point on it."""
        if "nu" not in state or age_s == 0:
            return g
        return (state["nu"] * -math.log((age_s + self.t0_s) / self.t0_s)).exp_().mul_(g)

    def read_std(self, g: Tensor, programmed: Tensor, state: State, age_s: float) -> Tensor | None:
        """1/f noise integrated from one read's duration to the device's age."""
        if not self.reading:
            return None
        q = self.noise((programmed / self.g_max).clamp_min_(0))
        age = age_s + self.t0_s
        root_log = math.sqrt(math.log((age + self.t_read_s) / (2 * self.t_read_s)))
        return g.clamp_min(0).mul_(q).mul_(self.reading * root_log)


@dataclass(frozen=True)
class PCM(PhaseChange):
    r"""Phase-change memory: programming noise, drift along a trajectory, 1/f read noise.

    With the target's share of the range $x = G/G_{\max}$, fresh standard normal $\xi$ for each
    device, and $T = t + t_0$:

    $$ G_P = \max(0,\; G + \sigma_P(x)\,\xi), \quad
       \sigma_P = (0.26348 + 1.9650\,x - 1.1731\,x^2)\,G_{\max}/25\,\mathrm{µS} $$
    $$ G_D = G_P\,(T/t_0)^{-\nu}, \quad \nu = |m(x) + s(x)\,\xi| $$
    $$ m = \mathrm{clip}(0.0244 - 0.0155\ln x,\; 0.049,\; 0.1), \quad
       s = \mathrm{clip}(-0.0059 - 0.0125\ln x,\; 0.008,\; 0.045) $$
    $$ G = \max\!\big(0,\; G_D + G_D\,Q\,\sqrt{\ln((T + t_r)/2t_r)}\;\xi\big), \quad
       Q = \min\!\big(0.2,\; 0.0088 / \max((G_P/G_{\max})^{0.65},\,10^{-3})\big) $$

    Programming noise and drift exponents belong to the chip; read noise is new at every forward.

    Use when the chip is mushroom-cell PCM read within the fit's range (to about 25 µS). Not for
    other memories, nor for temperature changes: the laws were fitted at one temperature.

    Args:
        programming: factor on the programming noise (0: exact writes).
        drifting: factor on the drift exponents (0: none).
        reading: factor on the read noise (0: exact reads).
        g_max: largest conductance in µS.

    Examples:
        >>> PCM(reading=0.0).name
        'PCM(reading=0.0)'

    References:
        Nandakumar et al., "Phase-change memory models for deep learning training and inference",
        ICECS 2019; Joshi et al., "Accurate deep neural network inference using computational
        phase-change memory", Nature Communications 11, 2473 (2020).
    """

    g_max: float = 25.0  # type: ignore[misc]  # here the user's to choose

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.g_max < math.inf:
            raise ConfigError(f"PCM g_max must be above 0 µS and finite; got {self.g_max!r}.")

    def deviation(self, x: Tensor) -> Tensor:
        """A parabola, in proportion to the range."""
        parabola = (1.9650 * x).add_(0.26348).sub_(x.square().mul_(1.1731))
        return parabola.mul_(self.g_max / 25)

    def exponent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Straight in the logarithm, between clips."""
        log_x = x.clamp_min(TINY).log_()
        mean = (-0.0155 * log_x).add_(0.0244).clamp_(0.049, 0.1)
        return mean, log_x.mul_(-0.0125).sub_(0.0059).clamp_(0.008, 0.045)

    def noise(self, x: Tensor) -> Tensor:
        """A power, clipped."""
        return x.clamp_min(TINY).pow_(0.65).reciprocal_().mul_(0.0088).clamp_max_(0.2)


@dataclass(frozen=True)
class StateIndependent(PhaseChange):
    r"""A device whose noise does not depend on its state: the plainest one that drifts.

    The course of things is that of :class:`PCM`, with $\sigma_P = 0.2$ µS,
    $\nu = |0.1 + 0.05\,\xi|$ and a read noise of $0.04\,G\,\sqrt{\ln(\cdot)}$, for
    $G_{\max} = 25$ µS.

    References:
        "StateIndependentNoiseModel" of aihwkit 1.1.0.
    """

    g_max: ClassVar[float] = 25.0

    def deviation(self, x: Tensor) -> Tensor:
        """The same for all."""
        return torch.full_like(x, 0.2)

    def exponent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same for all."""
        return torch.full_like(x, 0.1), torch.full_like(x, 0.05)

    def noise(self, x: Tensor) -> Tensor:
        """The same share for all."""
        return torch.full_like(x, 1 / self.g_max)
