"""The study's tables and pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from evenkeel.files import write_atomically
from evenkeel.studies.frame import Facts, markdown, svg


def draw(done: dict[str, Facts], folder: Path) -> list[Path]:
    """Tables; error over training; dead units and distances by layer."""
    sections = [
        "# Batch-channel normalization: figures\n\nWritten by `evenkeel study batch_channel`."
    ]
    tables = {"toy": _toy, "accuracy": _errors, "micro": _errors, "distance": _distance}
    sections += [f"## {name}\n\n{tables[name](figures)}" for name, figures in done.items()]
    pictures = [folder / "tables.md"]
    write_atomically(pictures[0], ("\n\n".join(sections) + "\n").encode())
    if "accuracy" in done:
        for name, chart in (("error", _curves), ("layers", _layers)):
            pictures.append(folder / f"{name}.svg")
            write_atomically(pictures[-1], svg(chart(done["accuracy"])).encode())
    return pictures


def interval(values: Sequence[float]) -> str:
    """Mean, and half the 95 % interval of it by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.2f} ± {half:.2f}"


def _toy(figures: Facts) -> str:
    rows = [
        [name, f"{row['mean']:.2f}", f"{row['std']:.2f}", f"{100 * row['dead']:.1f} %"]
        for name, row in figures.items()
    ]
    return markdown(["normalizer", "distance of means", "of deviations", "dead channels"], rows)


def _errors(figures: Facts) -> str:
    runs = figures["runs"]
    sizes = sorted({run["normalization_batch"] for run in runs})
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        cells = [method]
        for size in sizes:
            last = [
                run["epochs"][-1]["error"]
                for run in runs
                if run["method"] == method and run["normalization_batch"] == size
            ]
            cells.append(interval(last) if last else "–")
        rows.append(cells)
    said = f"Test error in percent after {len(runs[0]['epochs'])} epochs, mean and 95 % interval."
    head = ["method", *(f"{size} normalized together" for size in sizes)]
    return f"{said}\n\n{markdown(head, rows)}"


def _distance(figures: Facts) -> str:
    rows = []
    for run in figures["runs"]:
        layers = [r for r in run["epochs"][-1].get("layers", []) if r["relu"]]
        dead = f"{100 * run['epochs'][-1]['dead']:.1f} %" if layers else "–"
        error = f"{run['epochs'][-1]['error']:.2f}"
        rows.append([f"{run['means']:g}", f"{run['scales']:g}", error, dead])
    return markdown(["σ of means", "σ of log scales", "test error, %", "dead units"], rows)


def _curves(figures: Facts) -> Any:
    import altair as alt

    points = [
        {
            "method": run["method"],
            "size": f"{run['normalization_batch']} normalized together",
            "epoch": epoch["epoch"],
            "error": epoch["error"],
        }
        for run in figures["runs"]
        for epoch in run["epochs"]
    ]
    base: Any = alt.Chart(alt.Data(values=points), width=270, height=220)
    x, colour = alt.X("epoch:Q", title="epoch"), alt.Color("method:N", title=None)
    line = base.mark_line().encode(
        x=x, y=alt.Y("mean(error):Q", title="test error, %"), color=colour
    )
    band = base.mark_area(opacity=0.15).encode(
        x=x, y=alt.Y("min(error):Q"), y2="max(error):Q", color=colour
    )
    return alt.layer(band, line).facet(column=alt.Column("size:N", title=None))


def _layers(figures: Facts) -> Any:
    import altair as alt

    points = [
        {"method": run["method"], "layer": f"{k:02d} {row['layer']}", "value": row["mean_distance"]}
        for run in figures["runs"]
        if "layers" in run["epochs"][-1]
        for k, row in enumerate(run["epochs"][-1]["layers"])
        if row["mean_distance"] is not None
    ]
    base: Any = alt.Chart(alt.Data(values=points), width=560, height=220)
    return base.mark_line(point=True).encode(
        x=alt.X("layer:O", title=None, axis=alt.Axis(labelAngle=-60)),
        y=alt.Y("value:Q", title="distance of means from batch norm's"),
        color=alt.Color("method:N", title=None),
    )
