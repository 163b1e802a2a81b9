"""The result of an audit: figures for people, for machines, and the mended network."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from evenkeel.audit.plan import age_label
from evenkeel.audit.run import Workload, mended_chip
from evenkeel.audit.summary import Cell, summarize
from evenkeel.audit.verdict import Verdict, judge, points, sentences
from evenkeel.errors import MissingExtraError

if TYPE_CHECKING:
    from evenkeel.audit.sensitivity import Sensitivity

SCHEMA_VERSION = 1


@dataclass
class Audit:
    """What :func:`evenkeel.audit` returns.

    Attributes:
        network: name of the network.
        digital: the digital network's metric, in points of 100.
        digital_interval: its 95 % interval for the finite number of test samples.
        cells: one for each device, age and row of remedies.
        floor: what a chip must reach to count as good, if the user gave one.
        digital_layers: layers that stayed digital, and why.
        shifts: by device, age and row: each normalizer's mean shift before and after calibration.
        provenance: versions, seeds, counts and the command that repeats it.
        notes: what a reader should know besides, such as a limit that was reached.
        sensitivity: which layers cost it, once :meth:`find_sensitivity` was called.
        figures: all that the task measures on the digital network, where that is more than one.
    """

    network: str
    digital: float
    digital_interval: tuple[float, float] | None
    cells: list[Cell]
    floor: float | None
    digital_layers: dict[str, str]
    shifts: list[dict[str, Any]]
    provenance: dict[str, Any]
    notes: list[str]
    figures: dict[str, float]
    _work: Workload = field(repr=False)
    sensitivity: "Sensitivity | None" = None
    _made: dict[tuple[int, int], nn.Module] = field(default_factory=dict, repr=False)

    @property
    def verdicts(self) -> list[Verdict]:
        """A recommendation for each device, in their order."""
        rows = self._work.plan.rows
        return [
            judge(
                rows,
                [
                    [c for c in self.cells if c.device == d.name and c.remedy == r.name]
                    for r in rows
                ],
                d.name,
            )
            for d in self._work.plan.devices
        ]

    @property
    def verdict(self) -> list[str]:
        """The verdict on the first device, in sentences; the first one has the figures."""
        first = self.verdicts[0]
        return sentences(
            first,
            self._work.plan.rows[first.row],
            self._work.plan.rows[0],
            network=self.network,
            metric=self.metric,
            digital=self.digital,
            digital_interval=self.digital_interval,
            test_samples=self._work.data.test_samples,
            floor=self.floor,
        )

    @property
    def metric(self) -> str:
        """What was measured."""
        return self._work.plan.task.metric

    @property
    def unit(self) -> str:
        """What it is measured in: "%" for points of 100."""
        return self.cells[0].unit

    @property
    def best_remedy(self) -> str:
        """Name of the remedy recommended for the first device."""
        return self._work.plan.rows[self.verdicts[0].row].name

    @functools.cached_property
    def best(self) -> nn.Module:
        """The network with those changes of the recommended remedy that hold for every chip.

        What the remedy does on each single chip is not in it, as it would be wrong on any other
        chip: that is :attr:`recipe`. Where the remedy changes nothing beforehand, this is a copy of
        the network as it came.
        """
        return copy.deepcopy(self._prepared(0, self.verdicts[0].row))

    @property
    def recipe(self) -> list[str]:
        """What is to be done, step by step, in Markdown."""
        row = self._work.plan.rows[self.verdicts[0].row]
        return [part.advice for part in row.parts]

    def mended_chip(self, device: int, age_s: float, row: int, chip: int) -> Any:
        """One of the audited chips again, as it was evaluated."""
        plan = self._work.plan
        prepared = self._prepared(device, row)
        made, _ = mended_chip(self._work, prepared, plan.trial(device, age_s, row, chip))
        return made

    def _prepared(self, device: int, row: int) -> nn.Module:
        """The network that is programmed; kept, as preparing may take a training."""
        if (device, row) not in self._made:
            self._made[device, row] = self._work.prepared(device, row)
        return self._made[device, row]

    def find_sensitivity(
        self, *, chips: int = 4, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> "Sensitivity":
        """Which layers cost it on the first device at its worst age, for the report and the JSON.

        Args:
            chips: how many of the audited ones, from the first.
            progress: called with evaluations done, and at most to do.
        """
        from evenkeel.audit.sensitivity import sensitivity

        plan = self._work.plan
        self.sensitivity = sensitivity(
            self._work.model,
            self._work.data,
            device=plan.devices[0],
            age=self.verdicts[0].worst_raw.age_s,
            task=plan.task,
            chips=chips,
            seed=plan.seed,
            target=self.floor,
            progress=progress,
        )
        return self.sensitivity

    def table(self) -> str:
        """All cells as text."""
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), width=110)
        console.print(self.rich_table())
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    def rich_table(self) -> Any:
        """All cells as a rich table, narrow enough for 80 columns; the rest is in the report."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=f"{escape(self.network)}: {self.metric} in {self.unit}; "
            f"digital {self.digital:.1f}",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("on", overflow="fold")
        table.add_column("remedy", overflow="fold")
        for title in ("mean", "worst chip", "gain"):
            table.add_column(title, justify="right", no_wrap=True)
        if self.floor is not None:
            table.add_column(f"≥ {self.floor:g}", justify="right", no_wrap=True)
        above = None
        for cell in self.cells:
            here = f"{cell.device} {age_label(cell.age_s) if cell.age_s else ''}"
            row = [
                "" if here == above else escape(here),
                escape(cell.remedy),
                points(cell).removesuffix(f" {self.unit}"),
                f"{cell.worst:.1f} (#{cell.worst_chip})",
                "" if cell.gain is None else _signed(cell),
            ]
            above = here
            if cell.yielded is not None:
                row.append(f"{100 * cell.yielded:.0f} %")
            table.add_row(*row, end_section=cell is self._last_of(cell))
        return table

    def _last_of(self, cell: Cell) -> Cell:
        return [c for c in self.cells if (c.device, c.age_s) == (cell.device, cell.age_s)][-1]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; the report shows the same facts."""
        return {
            "schema": SCHEMA_VERSION,
            "verdict": self.verdict,
            "network": self.network,
            "metric": self.metric,
            "unit": self.unit,
            "digital": self.digital,
            "digital_interval": self.digital_interval,
            "digital_figures": self.figures,
            "floor": self.floor,
            "recommended": [
                {"device": v.device, "remedy": v.recommended[0].remedy} for v in self.verdicts
            ],
            "recipe": self.recipe,
            "cells": [cell.to_dict() for cell in self.cells],
            "shifts": self.shifts,
            "sensitivity": self.sensitivity and self.sensitivity.to_dict(),
            "digital_layers": self.digital_layers,
            "notes": self.notes,
            "provenance": self.provenance,
        }

    def to_xarray(self) -> Any:
        """Values by device, age, remedy and chip; write it with ``.to_netcdf(path)``."""
        try:
            import xarray
        except ImportError as error:
            raise MissingExtraError("Audit.to_xarray", "results") from error
        devices = list(dict.fromkeys(c.device for c in self.cells))
        ages = sorted({c.age_s for c in self.cells})
        remedies = list(dict.fromkeys(c.remedy for c in self.cells))
        chips = sorted({chip for c in self.cells for chip in c.chips})
        array = xarray.DataArray(
            float("nan"),
            coords={"device": devices, "age_s": ages, "remedy": remedies, "chip": chips},
            dims=("device", "age_s", "remedy", "chip"),
            name=self.metric.replace(" ", "_"),
            attrs={"units": "percent" if self.unit == "%" else self.unit, "digital": self.digital},
        )
        for c in self.cells:
            for chip, value in c.chips.items():
                array.loc[
                    {"device": c.device, "age_s": c.age_s, "remedy": c.remedy, "chip": chip}
                ] = value
        return array

    def plot(self) -> Any:
        """The main chart, by altair: against age where anything ages, else against level."""
        from evenkeel.audit.report.charts import against_age, against_level

        aging = [c for c in self.cells if c.device == self.cells[0].device]
        if len({c.age_s for c in aging}) > 1:
            return against_age(aging, self.digital, self.metric)
        return against_level(
            [c for c in self.cells if c.family == self.cells[0].family], self.digital, self.metric
        )

    def report(self, path: str | Path) -> Path:
        """Write the report, one HTML file that needs nothing else."""
        from evenkeel.audit.report.page import write_report

        return write_report(self, Path(path))

    def _repr_html_(self) -> str:
        from evenkeel.audit.report.page import summary_html

        return summary_html(self)


def _signed(cell: Cell) -> str:
    half = "" if cell.gain_low is None else f" ± {(cell.gain or 0) - cell.gain_low:.1f}"
    return f"{cell.gain:+.1f}{half}"


def summarize_all(
    work: Workload,
    results: dict[str, dict[str, Any]],
    chips: dict[tuple[int, float, int], int],
    digital: float,
    floor: float | None,
) -> list[Cell]:
    """A cell for each device, age and row, over as many chips as it was run on."""
    plan = work.plan

    def values(cell: tuple[int, float, int]) -> dict[int, float]:
        seeds = range(plan.seed, plan.seed + chips[cell])
        return {seed: results[plan.trial(*cell, seed).key]["value"] for seed in seeds}

    def cell_of(cell: tuple[int, float, int]) -> Cell:
        device, age_s, row = cell
        hardware = plan.devices[device]
        return summarize(
            device=hardware.name,
            level=getattr(hardware, "level", None),
            family=hardware.family,
            age_s=age_s,
            remedy=plan.rows[row].name,
            chips=values(cell),
            reference=values((device, age_s, 0)) if row else None,
            digital=digital,
            floor=floor,
            unit=getattr(plan.task, "unit", "%"),
        )

    return [cell_of(cell) for cell in plan.cells()]


def mean_shifts(
    work: Workload, results: dict[str, dict[str, Any]], chips: dict[tuple[int, float, int], int]
) -> list[dict[str, Any]]:
    """Each normalizer's shift before and after, over chips, for every cell that was calibrated."""
    plan, found = work.plan, []
    for cell in plan.cells():
        seeds: Sequence[int] = range(plan.seed, plan.seed + chips[cell])
        records = [
            record
            for seed in seeds
            if (record := results[plan.trial(*cell, seed).key]["facts"].get("calibration"))
        ]
        if not records:
            continue
        device, age_s, row = cell
        found.append(
            {
                "device": plan.devices[device].name,
                "age_s": age_s,
                "remedy": plan.rows[row].name,
                "kept": sum(record["kept"] for record in records),
                "chips": len(records),
                "before": _mean_by_layer([r["shift_before"] for r in records]),
                "after": _mean_by_layer([r["shift_after"] for r in records]),
            }
        )
    return found


def _mean_by_layer(shifts: list[dict[str, float]]) -> dict[str, float]:
    # A chip wraps its network; the layers go by the names they have in the user's.
    return {
        path.removeprefix("model."): sum(s[path] for s in shifts) / len(shifts)
        for path in shifts[0]
    }
