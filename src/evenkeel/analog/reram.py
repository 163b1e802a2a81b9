"""Resistive memories by fits to measured arrays."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from evenkeel.analog.device import DeviceModel, State
from evenkeel.draws import Draws
from evenkeel.errors import ConfigError, nearest

DAY = 86_400.0
WanFit = Literal["aihwkit", "crosssim"]
_WAN = {
    1.0: (0.348, 16.030, -43.853, 45.393, -16.815),
    DAY: (0.701, 22.086, -50.773, 47.095, -16.458),
    2 * DAY: (0.782, 20.274, -43.507, 37.062, -11.934),
}
"""By age in s: coefficients of the deviation in µS, in powers of G / 40 µS."""
_ACCEPTANCE = {0.2: (0.00081107, 0.00106879), 2.0: (0.0112185391, 0.01129027418)}


@dataclass(frozen=True)
class WanReRAM(DeviceModel):
    r"""Resistive memory of Wan et al. 2022, whose states spread over the first days.

    $$ G(t) = \max(0,\; G + \sigma_t(G)\,\xi) $$

    Two fits to the same figure are in use and differ by 10 to 20 %, so each has its name:
    "aihwkit" has polynomials of degree 4 in $G/40\,\mathrm{µS}$ for 1 s, 1 day and 2 days; between
    them $\sigma$ is taken as straight in the logarithm of the age. "crosssim" has
    $\sigma = 1.053 + 0.2374\,G - 0.01167\,G^2 + 1.536\cdot10^{-4}\,G^3$ µS at 1 s, up to 39.26 µS,
    and does not age.

    The measurement tells how wide states are at an age, and not how one device moves: here each has
    one $\xi$ for life, so that it is on one trajectory. Ages beyond the last measured one are
    refused.

    Args:
        fit: which.
        scale: factor on the deviations (0: exact).
        extrapolate: take ages beyond the fit, as that of its last day.

    References:
        Wan et al., "A compute-in-memory chip based on resistive random-access memory", Nature 608,
        504 (2022), Extended Data Fig. 3; the fits are those of aihwkit 1.1.0 and CrossSim 3.2.
    """

    fit: WanFit = "aihwkit"
    scale: float = 1.0
    extrapolate: bool = False

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.fit not in get_args(WanFit):
            raise ConfigError(f"Unknown fit {self.fit!r}. {nearest(self.fit, get_args(WanFit))}")
        _require_factor(self, "scale")

    @property
    def g_max(self) -> float:
        """In µS."""
        return 40.0 if self.fit == "aihwkit" else 39.26

    @property
    def ages(self) -> bool:  # type: ignore[override]
        """Of the two fits one does."""
        return self.fit == "aihwkit"

    @property
    def oldest_s(self) -> float:  # type: ignore[override]
        """The last measured age."""
        return math.inf if self.extrapolate or not self.ages else max(_WAN)

    def deviation(self, g: Tensor, age_s: float) -> Tensor:
        """In µS, of states with these targets."""
        if self.fit == "crosssim":
            return _polynomial(g, (1.053, 0.2374, -0.01167, 1.536e-4)).clamp_min(0)
        x, ages = g / self.g_max, sorted(_WAN)
        age_s = min(max(age_s, ages[0]), ages[-1])
        after = next(age for age in ages if age >= age_s)
        before = max((age for age in ages if age < after), default=after)
        late = _polynomial(x, _WAN[after]).clamp_min(0)
        if before == after:
            return late
        share = math.log(age_s / before) / math.log(after / before)
        return torch.lerp(_polynomial(x, _WAN[before]).clamp_min(0), late, share)

    def write(self, g: Tensor, draws: Draws, g_max: float) -> tuple[Tensor, State]:
        """As it is found at 1 s."""
        require_conductances(self, g, 0.0, self.g_max)
        xi = self.scale * draws.normal("state", tuple(g.shape), device=g.device)
        return self._at(g, xi, 0.0), {"target": g, "xi": xi}

    def drift(self, g: Tensor, state: State, age_s: float) -> Tensor:
        """What has come on top of the first second."""
        if not self.ages or age_s <= min(_WAN):
            return g
        target, xi = state["target"], state["xi"]
        return moved(g, self._at(target, xi, 0.0), self._at(target, xi, age_s))

    def _at(self, target: Tensor, xi: Tensor, age_s: float) -> Tensor:
        return (target + self.deviation(target, age_s) * xi).clamp_min(0)


@dataclass(frozen=True)
class MiloReRAM(DeviceModel):
    r"""Resistive memory of Milo et al. 2021, programmed with verification (IGVVA-100).

    $$ G' = \max(0,\; G + \sigma\,\xi), \qquad \sigma = 4.782321 - 0.009107\,G \;\mathrm{µS} $$

    States lie between 50 and 225 µS, so a weight of zero is a pair at 50 µS. It does not age.

    Args:
        scale: factor on the deviation (0: exact).

    References:
        Milo et al., "Optimized programming algorithms for multilevel RRAM in hardware neural
        networks", IRPS 2021; the fit is that of CrossSim 3.2.
    """

    scale: float = 1.0

    elementwise: ClassVar[bool] = True
    g_min: ClassVar[float] = 50.0
    g_max: ClassVar[float] = 225.0

    def __post_init__(self) -> None:
        _require_factor(self, "scale")

    def write(self, g: Tensor, draws: Draws, g_max: float) -> tuple[Tensor, State]:
        """Each device on its own."""
        require_conductances(self, g, self.g_min, self.g_max)
        xi = draws.normal("state", tuple(g.shape), device=g.device)
        return (g + (4.782321 - 0.009107 * g) * (self.scale * xi)).clamp_min(0), {}


@dataclass(frozen=True)
class CMOHfOx(DeviceModel):
    r"""Analog resistive memory of conductive metal oxide and HfOx (Falcone et al. 2025).

    With $t$ in seconds, at least 1, and a fresh standard normal $\xi$ for each device,

    $$ G_P = G + (c_0 + c_1 G)\,\xi, \qquad
       G_R = G_P - 0.0890\,\ln t + (0.4118 + 0.0420\,\ln t)\,\xi $$
    $$ \sigma_{\text{read}} = 0.02773\,\log_{10}(G_R)\,
       \sqrt{\ln\big((t + 1\,\mathrm{µs})/2\,\mathrm{µs}\big)} $$

    in µS. Relaxation is that of the first second at once. States lie between 9 and 88.2 µS, so a
    weight of zero is a pair at 9 µS.

    Args:
        acceptance: range in percent that writes are verified to: 0.2 ($c_0 = 0.00081107$,
            $c_1 = 0.00106879$) or 2 (0.0112185, 0.0112903).
        relaxing: factor on the relaxation (0: none).
        reading: factor on the read noise (0: exact reads).

    References:
        Falcone et al., arXiv 2502.04524 (2025); fits as published with aihwkit 1.1.0.
    """

    acceptance: float = 0.2
    relaxing: float = 1.0
    reading: float = 1.0

    elementwise: ClassVar[bool] = True
    g_min: ClassVar[float] = 9.0
    g_max: ClassVar[float] = 88.2
    ages: ClassVar[bool] = True
    t_read_s: ClassVar[float] = 1e-6

    def __post_init__(self) -> None:
        if self.acceptance not in _ACCEPTANCE:
            raise ConfigError(
                f"CMOHfOx acceptance is 0.2 or 2, in percent; got {self.acceptance!r}."
            )
        _require_factor(self, "relaxing")
        _require_factor(self, "reading")

    def write(self, g: Tensor, draws: Draws, g_max: float) -> tuple[Tensor, State]:
        """Within the accepted range, and how far each device will relax."""
        require_conductances(self, g, self.g_min, self.g_max)
        constant, slope = _ACCEPTANCE[self.acceptance]
        shape = tuple(g.shape)
        xi = draws.normal("programming", shape, device=g.device)
        state = {"relaxation": draws.normal("relaxation", shape, device=g.device)}
        return (g + (constant + slope * g) * xi).clamp_min(0), state if self.relaxing else {}

    def drift(self, g: Tensor, state: State, age_s: float) -> Tensor:
        """Relaxation, each device on its own trajectory."""
        if age_s == 0 or "relaxation" not in state:
            return g
        log_t = math.log(max(age_s, 1.0))
        moved = -0.08900206 * log_t + (0.04201137 * log_t + 0.41183342) * state["relaxation"]
        return (g + self.relaxing * moved).clamp_min(0)

    def read_std(self, g: Tensor, programmed: Tensor, state: State, age_s: float) -> Tensor | None:
        """1/f noise integrated from one read's duration to the device's age."""
        if not self.reading:
            return None
        root_log = math.sqrt(math.log((max(age_s, 1.0) + self.t_read_s) / (2 * self.t_read_s)))
        return g.clamp_min(1).log10() * (0.0277316483 * root_log * self.reading)


def require_conductances(model: DeviceModel, g: Tensor, low: float, high: float) -> None:
    """Refuse targets that the fit has not seen, with room for rounding."""
    if not g.numel():
        return
    least, most = (float(end) for end in torch.aminmax(g))
    if least < low * (1 - 1e-4) or most > high * (1 + 1e-4):
        raise ConfigError(
            f"{model.name} was measured from {low:g} to {high:g} µS; got targets from {least:.4g} "
            f"to {most:.4g}. Leave the device's g_max at its own, and the effect first in a Device."
        )


def moved(g: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """As conductances move, of which later effects have left a share."""
    share = torch.where(before > 0, g / before, torch.ones_like(g))
    return (g + (after - before) * share).clamp_min(0)


def _require_factor(model: DeviceModel, name: str) -> None:
    if not 0 <= getattr(model, name) < math.inf:
        raise ConfigError(
            f"{type(model).__name__} {name} must be 0 or more and finite; got "
            f"{getattr(model, name)!r}."
        )


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """From the constant up."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total.mul_(x).add_(coefficient)
    return total
