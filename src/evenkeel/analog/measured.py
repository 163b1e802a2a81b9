"""A device of one's own, from a table of measured states."""

import csv
import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from evenkeel.analog.device import DeviceModel, State
from evenkeel.analog.reram import moved, require_conductances
from evenkeel.draws import Draws
from evenkeel.errors import ConfigError

COLUMNS = ("target", "age_s", "mean", "std")


@dataclass(frozen=True)
class Measured(DeviceModel):
    r"""A device from a CSV file of state means and deviations over time.

    The file has a header with the columns ``target``, ``age_s``, ``mean`` and ``std``, conductances
    in µS, and a row for every pair of a target and an age; further columns are not read. Then

    $$ G(t) = \max(0,\; \mu_t(G) + \sigma_t(G)\,\xi), $$

    with $\mu$ and $\sigma$ straight between targets, and between ages in $\ln(1 + t)$. Each device
    has one $\xi$ for life. Targets outside of the table are refused, and ages beyond its last.

    Args:
        path: of the file.
        extrapolate: take ages beyond the last, as the last.

    Raises:
        ConfigError: no such file, a column or a number that is missing, or a table with holes.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp()) / "mine.csv"
        >>> _ = file.write_text(
        ...     "target,age_s,mean,std\n0,0,0.1,0.1\n20,0,20,0.8\n0,3600,0.1,0.1\n20,3600,18,1.0\n")
        >>> device = Measured(str(file))
        >>> device.g_max, device.oldest_s
        (20.0, 3600.0)
    """

    path: str
    extrapolate: bool = False
    content: str = ""
    """Hash of the file's text, found by reading it; one that is given must be that of the file."""

    ages: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        found = self._table.content
        if self.content not in ("", found):
            raise ConfigError(
                f"{self.path} is not the table that this device was made of. Bring that back, or "
                f"program a chip anew."
            )
        object.__setattr__(self, "content", found)

    @property
    def name(self) -> str:
        """With the file's name."""
        return f"Measured({Path(self.path).stem!r}{', extrapolate=True' * self.extrapolate})"

    @property
    def g_min(self) -> float:
        """Lowest target, in µS."""
        return float(self._table.targets[0])

    @property
    def g_max(self) -> float:
        """Highest target, in µS."""
        return float(self._table.targets[-1])

    @property
    def oldest_s(self) -> float:  # type: ignore[override]
        """Last age of the table."""
        return math.inf if self.extrapolate else float(self._table.ages[-1])

    def write(self, g: Tensor, draws: Draws, g_max: float) -> tuple[Tensor, State]:
        """As it is found at the first age."""
        require_conductances(self, g, self.g_min, self.g_max)
        xi = draws.normal("state", tuple(g.shape), device=g.device)
        return self._at(g, xi, 0.0), {"target": g, "xi": xi}

    def drift(self, g: Tensor, state: State, age_s: float) -> Tensor:
        """What has come on top of the first age."""
        if age_s == 0:
            return g
        target, xi = state["target"], state["xi"]
        return moved(g, self._at(target, xi, 0.0), self._at(target, xi, age_s))

    def _at(self, target: Tensor, xi: Tensor, age_s: float) -> Tensor:
        mean, std = self._table.at(target, age_s)
        return (mean + std * xi).clamp_min(0)

    @functools.cached_property
    def _table(self) -> "_Table":
        return _read(self.path)


@dataclass(frozen=True)
class _Table:
    targets: Tensor
    ages: Tensor
    means: Tensor
    """(ages, targets)"""
    stds: Tensor
    content: str

    def at(self, g: Tensor, age_s: float) -> tuple[Tensor, Tensor]:
        """Mean and deviation for targets ``g`` at an age."""
        (before,), (after,), (share,) = _between(torch.tensor([age_s]).log1p(), self.ages.log1p())
        low, high, between = _between(g, self.targets)

        def of(values: Tensor) -> Tensor:
            row = torch.lerp(values[before], values[after], share.double()).to(g)
            return torch.lerp(row[low], row[high], between)

        return of(self.means), of(self.stds)


def _between(x: Tensor, knots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Knots on both sides of each x, and where between them it lies, from 0 to 1."""
    knots = knots.to(x)
    high = torch.searchsorted(knots, x.contiguous()).clamp(0, len(knots) - 1)
    low = (high - 1).clamp_min(0)
    width = (knots[high] - knots[low]).clamp_min(torch.finfo(x.dtype).tiny)
    return low, high, ((x - knots[low]) / width).clamp(0, 1)


def _read(path: str) -> _Table:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}.") from error
    reader = csv.DictReader(text.splitlines())
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise ConfigError(
            f"{path} needs the columns {', '.join(COLUMNS)} in its header; {missing[0]} is missing."
        )
    points: dict[tuple[float, float], tuple[float, float]] = {}
    for line, row in enumerate(reader, 2):
        try:
            target, age_s, mean, std = (float(row[name] or "") for name in COLUMNS)
        except ValueError as error:
            raise ConfigError(f"{path}, line {line}: {error}.") from error
        if not (min(target, age_s, mean, std) >= 0 and math.isfinite(target + age_s + mean + std)):
            raise ConfigError(f"{path}, line {line}: numbers must be finite and not negative.")
        if (age_s, target) in points:
            raise ConfigError(f"{path}, line {line}: {target:g} µS at {age_s:g} s stands twice.")
        points[age_s, target] = mean, std
    ages, targets = (sorted({point[k] for point in points}) for k in (0, 1))
    holes = [(a, t) for a in ages for t in targets if (a, t) not in points]
    if len(targets) < 2 or holes:
        what = f"{holes[0][1]:g} µS at {holes[0][0]:g} s is missing" if holes else "it has one"
        raise ConfigError(f"{path} needs two targets or more, each at every age; {what}.")
    grid = torch.tensor([[points[a, t] for t in targets] for a in ages], dtype=torch.float64)
    return _Table(
        torch.tensor(targets, dtype=torch.float64),
        torch.tensor(ages, dtype=torch.float64),
        grid[..., 0],
        grid[..., 1],
        hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
    )
