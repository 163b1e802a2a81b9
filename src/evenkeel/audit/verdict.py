"""What an audit comes to: the recommended remedy, and the sentences that say so."""

from collections.abc import Sequence
from dataclasses import dataclass

from evenkeel.audit.plan import age_label
from evenkeel.audit.remedy import Row
from evenkeel.audit.summary import Cell

WITHIN = 0.5
"""Points below the best row that a cheaper one may lie and still be recommended."""

SAME = 0.1
"""Points below which two means are told as one."""

EFFORTS = (
    "no work at all",
    "one changed network for every chip, nothing to do on each",
    "a measurement on each chip, without data",
    "unlabelled inputs run on each chip",
    "a short training",
    "a short training, once for every chip, and nothing to do on each",
    "a short training, and a measurement on each chip, without data",
    "a short training, and unlabelled inputs run on each chip",
)
TRAINS = 4
"""From this effort on there is training in it."""


@dataclass(frozen=True)
class Verdict:
    """The recommendation for one device, judged at the age at which each row is worst.

    Attributes:
        device: its name.
        raw: the first row's cells, by age.
        recommended: cells of the cheapest row that comes close to the best.
        best: cells of the row that is best at its worst age.
        row: position of the recommended row in the plan.
    """

    device: str
    raw: Sequence[Cell]
    recommended: Sequence[Cell]
    best: Sequence[Cell]
    row: int

    @property
    def worst(self) -> Cell:
        """The recommended row at its worst age."""
        return min(self.recommended, key=lambda cell: cell.mean)

    @property
    def worst_raw(self) -> Cell:
        """The first row at its worst age; at that of the recommended one where it is as bad."""
        lowest = min(self.raw, key=lambda cell: cell.mean)
        beside = next(cell for cell in self.raw if cell.age_s == self.worst.age_s)
        return beside if beside.mean < lowest.mean + SAME else lowest


def judge(rows: Sequence[Row], cells: Sequence[Sequence[Cell]], device: str) -> Verdict:
    """Choose among rows of remedies.

    Args:
        rows: the plan's rows.
        cells: for each row, its cells at each age.
        device: name.
    """
    lifetime = [min(cell.mean for cell in of_row) for of_row in cells]
    best = max(range(len(rows)), key=lambda r: (lifetime[r], -rows[r].effort))
    close = [r for r in range(len(rows)) if lifetime[r] >= lifetime[best] - WITHIN]
    chosen = min(close, key=lambda r: (rows[r].effort, len(rows[r].parts), -lifetime[r]))
    return Verdict(device, cells[0], cells[chosen], cells[best], chosen)


def points(cell: Cell) -> str:
    """Mean and half its interval, such as "98.5 ± 0.2 %"."""
    return (
        f"{cell.mean:.1f}"
        + ("" if cell.low is None else f" ± {cell.half_width:.1f}")
        + f" {cell.unit}"
    )


def sentences(
    verdict: Verdict,
    row: Row,
    first: Row,
    *,
    network: str,
    metric: str,
    digital: float,
    digital_interval: tuple[float, float] | None,
    test_samples: int,
    floor: float | None,
) -> list[str]:
    """The verdict in words, the most important first."""
    worst, raw = verdict.worst, verdict.worst_raw
    unit = worst.unit
    one, many = ("point", "points") if unit == "%" else (unit, unit)
    test = (
        ""
        if digital_interval is None
        else f" (95 % interval {digital_interval[0]:.1f} to {digital_interval[1]:.1f} {unit} with "
        f"{test_samples} test samples)"
    )
    ages = len(verdict.raw) > 1
    same = raw.age_s == worst.age_s
    plain = not (first.per_chip or first.is_shared)
    at = f" {_when(raw.age_s)}" if ages and same else ""
    said = [
        f"{network} has {metric} {digital:.1f} {unit} in digital arithmetic{test}; "
        f"on {verdict.device}{at} "
        + ("it keeps " if plain else f"with {first.title} it keeps ")
        + points(raw)
        + ("" if same else f" at its worst, {_when(raw.age_s)}")
        + (
            f", and with {row.title} {points(worst)}"
            + ("." if same else f" at its worst, {_when(worst.age_s)}.")
            if worst.remedy != raw.remedy
            else f". No remedy tried raises its worst age by more than half a {one}."
        )
    ]
    if worst.remedy != raw.remedy:
        said.append(
            f"“{worst.remedy}” is the cheapest remedy within {WITHIN} {many} of the best: it takes "
            f"{EFFORTS[row.effort]}" + (", and no retraining." if row.effort < TRAINS else ".")
        )
        best = next((c for c in verdict.best if c.age_s == worst.age_s), worst)
        if best.remedy != worst.remedy:
            said.append(f"The best, “{best.remedy}”, reaches {points(best)} at that age.")
    if len(worst.chips) > 1:
        said.append(
            f"The worst of {len(worst.chips)} chips is chip {worst.worst_chip} with "
            f"{worst.worst:.1f} {unit}." + ("" if floor is None else _yield(worst, floor))
        )
    return said


def _yield(cell: Cell, floor: float) -> str:
    low, high = 100 * (cell.yield_low or 0), 100 * (cell.yield_high or 0)
    return (
        f" Yield: {100 * (cell.yielded or 0):.0f} % of chips reach {floor:g} {cell.unit} "
        f"(95 % interval {low:.0f} to {high:.0f} %)."
    )


def _when(age_s: float) -> str:
    return "right after programming" if age_s == 0 else f"after {age_label(age_s)}"
