"""From trials to figures: means, intervals, paired gains, quantiles, worst chips, yield."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One row of remedies on one device at one age, over all its chips, in the task's unit.

    Attributes:
        device: the device's name.
        level: its strength, where it has one to draw against.
        family: name of the devices that differ from it in level only.
        age_s: seconds since programming.
        remedy: the row's name.
        chips: values by chip seed.
        mean: over chips.
        low: lower end of the 95 % interval of the mean over chips (Student's t); None for one chip.
        high: its upper end.
        quantiles: 5, 50 and 95 % of the chips.
        worst_chip: seed of the worst chip.
        worst: its value.
        gain: mean of the paired differences to the first row; None for that row itself.
        gain_low: lower end of the 95 % interval of the gain.
        gain_high: its upper end.
        recovered: gain as a share of what the first row lost, where that is over 2 points.
        harmed: share of chips that are worse than with the first row.
        yielded: share of chips at or above the floor; None without a floor.
        yield_low: lower end of its 95 % interval (Clopper and Pearson).
        yield_high: its upper end.
        unit: of all values.
    """

    device: str
    level: float | None
    family: str
    age_s: float
    remedy: str
    chips: dict[int, float]
    mean: float
    low: float | None
    high: float | None
    quantiles: tuple[float, float, float]
    worst_chip: int
    worst: float
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    recovered: float | None
    harmed: float | None
    yielded: float | None
    yield_low: float | None
    yield_high: float | None
    unit: str = "%"

    @property
    def half_width(self) -> float:
        """Half the interval of the mean; infinite while it is unknown."""
        return math.inf if self.low is None else self.mean - self.low

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean by Student's t; None for fewer than two values.

    Examples:
        >>> [round(v, 3) for v in t_interval([1.0, 2.0, 3.0])]
        [-0.484, 4.484]
    """
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def share_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % interval of a share by Clopper and Pearson.

    Examples:
        >>> [round(v, 3) for v in share_interval(16, 16)]
        [0.794, 1.0]
    """
    from scipy.special import betaincinv

    low = float(betaincinv(successes, total - successes + 1, 0.025)) if successes else 0.0
    high = float(betaincinv(successes + 1, total - successes, 0.975)) if successes < total else 1.0
    return low, high


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile, with linear interpolation between the sorted values."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def summarize(
    *,
    device: str,
    level: float | None,
    family: str,
    age_s: float,
    remedy: str,
    chips: dict[int, float],
    reference: dict[int, float] | None,
    digital: float,
    floor: float | None,
    unit: str = "%",
) -> Cell:
    """The figures of one cell.

    Args:
        device: name.
        level: strength.
        family: name without the level.
        age_s: age.
        remedy: name.
        chips: values by chip seed, at least one.
        reference: the first row's values; chips are compared one by one. None for that row itself.
        digital: the digital network's value.
        floor: what a chip must reach to count as good.
        unit: of all values.
    """
    values = list(chips.values())
    interval = t_interval(values)
    worst_chip = min(chips, key=lambda seed: (chips[seed], seed))
    gain = gain_interval = recovered = harmed = None
    if reference is not None:
        differences = [
            value - reference[seed] for seed, value in chips.items() if seed in reference
        ]
        gain, gain_interval = fmean(differences), t_interval(differences)
        harmed = fmean(d < 0 for d in differences)
        lost = digital - fmean(reference.values())
        recovered = gain / lost if lost > 2 else None
    good = sum(value >= floor for value in values) if floor is not None else None
    yield_interval = share_interval(good, len(values)) if good is not None else (None, None)
    return Cell(
        device=device,
        level=level,
        family=family,
        age_s=age_s,
        remedy=remedy,
        chips=chips,
        mean=fmean(values),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        quantiles=(quantile(values, 0.05), quantile(values, 0.5), quantile(values, 0.95)),
        worst_chip=worst_chip,
        worst=chips[worst_chip],
        gain=gain,
        gain_low=gain_interval[0] if gain_interval else None,
        gain_high=gain_interval[1] if gain_interval else None,
        recovered=recovered,
        harmed=harmed,
        yielded=good / len(values) if good is not None else None,
        yield_low=yield_interval[0],
        yield_high=yield_interval[1],
        unit=unit,
    )
