"""The study's figures as tables in Markdown, for people."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from evenkeel.audit.plan import age_label
from evenkeel.audit.summary import Cell
from evenkeel.studies.frame import Facts, cells_of, markdown


def tables(done: dict[str, Facts]) -> str:
    """A section for each part that is done."""
    sections = ["# Noise-aware normalization: figures\n\nWritten by `evenkeel study noise_aware`."]
    for name, figures in done.items():
        if name == "online":
            body = _streams(figures["chips"])
        elif name == "ageing":
            body = _ageing(figures["chips"])
        elif name == "hardened":
            body = _hardened(figures)
        else:
            body = _sweep(figures)
        sections.append(f"## {name}\n\n{body}")
    return "\n\n".join(sections) + "\n"


def _sweep(figures: Facts) -> str:
    cells = cells_of(figures)
    said = (
        f"Digital {figures['digital']:.1f} %, {len(cells[0].chips)} chips, "
        f"{figures['test_samples']} test samples, up to {figures['calibration_samples']} images to "
        f"calibrate with. Mean (worst chip); then the share recovered of what was lost, and the "
        f"share of chips that were harmed."
    )
    return "\n\n".join([said, _pivot(cells, _points), _pivot(cells, _recovered)])


def _hardened(figures: Facts) -> str:
    both = []
    for kind in ("plain", "hardened"):
        both += [
            (f"{kind}, {'as it is' if c.remedy == 'none' else c.remedy + 'd'}", c)
            for c in cells_of(figures[kind])
        ]
    said = (
        f"Digital {figures['plain']['digital']:.1f} % plain, {figures['hardened']['digital']:.1f} "
        f"% hardened; hardening took {figures['minutes_to_harden']:.1f} minutes. Mean (worst chip)."
    )
    return f"{said}\n\n{_pivot([c for _, c in both], _points, [name for name, _ in both])}"


def _streams(chips: Sequence[Facts]) -> str:
    rows = []
    for device in dict.fromkeys((c["device"], c["age"], c["batch"]) for c in chips):
        of = [c for c in chips if (c["device"], c["age"], c["batch"]) == device]
        runs = [run for c in of for run in c["one_class"]]
        rows.append(
            [
                f"{device[0]}, {device[1]}" if device[1] != "0" else device[0],
                str(device[2]),
                str(len(of)),
                *(f"{fmean(c[k] for c in of):.1f}" for k in ("raw", "calibrated", "online")),
                f"{max(c['calibrated'] - c['online'] for c in of):.1f}",
                *(
                    f"{fmean(r[k] for r in runs):.2f}"
                    for k in ("cost", "cost_after", "cost_from_the_start")
                ),
            ]
        )
    header = [
        "on", "batch", "chips", "as it is", "calibrated before", "online",
        "online behind, worst chip",
        "one class: cost on it", "on the mixed samples after it", "from the very start",
    ]  # fmt: skip
    return markdown(header, rows)


def _ageing(chips: Sequence[Facts]) -> str:
    ages = [age_label(age_s) for age_s in chips[0]["ages_s"]]
    rows = [
        [
            name.replace("_", " "),
            *(f"{fmean(c[name][k] for c in chips):.1f}" for k in range(len(ages))),
        ]
        for name in ("online", "frozen", "online_after_a_jump")
    ]
    return f"{len(chips)} chips.\n\n{markdown(['', *ages], rows)}"


def _pivot(cells: Sequence[Cell], show: Any, names: Sequence[str] | None = None) -> str:
    """Rows of remedies, columns of devices and ages."""
    names = names or [c.remedy for c in cells]
    columns = list(dict.fromkeys(_on(c) for c in cells))
    by_place = {(name, _on(c)): show(c) for name, c in zip(names, cells, strict=True)}
    rows = [
        [name, *(by_place.get((name, column), "") for column in columns)]
        for name in dict.fromkeys(names)
    ]
    return markdown(["remedy", *columns], rows)


def _on(cell: Cell) -> str:
    return f"{cell.device} {age_label(cell.age_s)}" if cell.age_s else cell.device


def _points(cell: Cell) -> str:
    return f"{cell.mean:.1f} ({cell.worst:.1f})"


def _recovered(cell: Cell) -> str:
    share = "" if cell.recovered is None else f"{100 * cell.recovered:.0f} %"
    return "" if cell.harmed is None else f"{share or '–'}, {100 * cell.harmed:.0f} %"
