"""The study's tables and pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evenkeel.files import write_atomically
from evenkeel.studies.curves import by_size, error_curves
from evenkeel.studies.frame import Facts, markdown, svg
from evenkeel.studies.measures import interval


def draw(done: dict[str, Facts], folder: Path) -> list[Path]:
    """Tables; error over training; dead units and distances; error against distance."""
    seen = {kind: _gathered(done, kind) for kind in ("accuracy", "micro", "distance")}
    sections = [HEAD]
    if "toy" in done:
        sections.append(f"## toy\n\n{_toy(done['toy'])}")
    for kind, table in (("accuracy", _errors), ("micro", _errors), ("distance", _distance)):
        if seen[kind]:
            sections.append(f"## {kind}\n\n{table(seen[kind])}")
    pictures = [folder / "tables.md"]
    write_atomically(pictures[0], ("\n\n".join(sections) + "\n").encode())
    charts = (
        ("error", lambda runs: error_curves(by_size(runs)), seen["accuracy"]),
        ("singularity", _over_training, [run for run in seen["accuracy"] if _watched(run)]),
        ("layers", _layers, [run for run in seen["accuracy"] if _watched(run)]),
        ("distance", _against_distance, seen["distance"]),
    )
    for name, chart, runs in charts:
        if runs:
            pictures.append(folder / f"{name}.svg")
            write_atomically(pictures[-1], svg(chart(runs)).encode())
    return pictures


HEAD = """# Batch-channel normalization: figures

Written by `evenkeel study batch_channel`. One learning rate for all normalizers, tuned for none;
batch norm's momentum is 0.1, and so is the update rate of "running" where no other is named.
Trained in bfloat16, with statistics in float32. Group and layer norm do not see the batch, and
stand in every column as they are. Of 128 samples, of which two are normalized together, "running"
takes the pairs one after the other, so that a pair is normalized by what those before it have told,
too."""


def _gathered(done: dict[str, Facts], kind: str) -> list[Facts]:
    """The runs of all seeds."""
    return [run for name in done if name.startswith(f"{kind}_") for run in done[name]["runs"]]


def _watched(run: Facts) -> bool:
    return "layers" in run["epochs"][-1]


def _sizes(runs: Sequence[Facts]) -> list[int]:
    return sorted({run["together"] for run in runs} - {None})


def _toy(figures: Facts) -> str:
    rows = [
        [name, f"{row['mean']:.2f}", f"{row['std']:.2f}", f"{100 * row['dead']:.1f} %"]
        for name, row in figures.items()
    ]
    return markdown(["normalizer", "distance of means", "of deviations", "dead channels"], rows)


def _errors(runs: Sequence[Facts]) -> str:
    sizes = _sizes(runs)
    rows = [
        [method]
        + [
            interval(
                [
                    run["epochs"][-1]["error"]
                    for run in runs
                    if run["method"] == method and run["together"] in (size, None)
                ]
            )
            for size in sizes
        ]
        for method in dict.fromkeys(run["method"] for run in runs)
    ]
    said = f"Test error in percent after {len(runs[0]['epochs'])} epochs, mean and 95 % interval."
    return f"{said}\n\n{markdown(['method', *(f'{s} together' for s in sizes)], rows)}"


def _distance(runs: Sequence[Facts]) -> str:
    rows = []
    for means, scales in dict.fromkeys((run["means"], run["scales"]) for run in runs):
        last = [r["epochs"][-1] for r in runs if (r["means"], r["scales"]) == (means, scales)]
        dead = interval([100 * epoch["dead"] for epoch in last])
        error = interval([epoch["error"] for epoch in last])
        rows.append([f"{means:g}", f"{scales:g}", error, dead])
    return markdown(["σ of means", "σ of log scales", "test error, %", "dead units, %"], rows)


def _over_training(runs: Sequence[Facts]) -> Any:
    import altair as alt

    points = []
    for run in runs:
        for epoch in run["epochs"]:
            rows = [row for row in epoch["layers"] if row["mean_distance"] is not None]
            measures = {
                "dead units, %": 100 * epoch["dead"],
                "distance of means": fmean(row["mean_distance"] for row in rows),
                "distance of deviations": fmean(row["std_distance"] for row in rows),
            }
            points += [
                {"method": run["method"], "epoch": epoch["epoch"], "what": what, "value": value}
                for what, value in measures.items()
            ]
    base: Any = alt.Chart(alt.Data(values=points), width=220, height=180)
    lines = base.mark_line(point=True).encode(
        x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("value:Q", title=None),
        color=alt.Color("method:N", title=None),
        column=alt.Column("what:N", title=None),
    )
    return lines.resolve_scale(y="independent")


def _against_distance(runs: Sequence[Facts]) -> Any:
    import altair as alt

    points = [
        {
            "distance": math.hypot(run["means"], run["scales"]),
            "accuracy": 100 - run["epochs"][-1]["error"],
            "scales": f"σ of log scales {run['scales']:g}",
        }
        for run in runs
    ]
    base: Any = alt.Chart(alt.Data(values=points), width=420, height=220)
    return base.mark_circle(size=60).encode(
        x=alt.X(
            "distance:Q", title="distance from batch norm's point, √(σ² of means + σ² of scales)"
        ),
        y=alt.Y("accuracy:Q", title="test accuracy, %", scale=alt.Scale(zero=False)),
        color=alt.Color("scales:N", title=None),
    )


def _layers(runs: Sequence[Facts]) -> Any:
    import altair as alt

    points = [
        {
            "method": run["method"],
            "layer": f"{k:02d} {row['layer']}",
            "epoch": f"after epoch {epoch['epoch']}",
            "value": row["mean_distance"],
        }
        for run in runs
        for epoch in (run["epochs"][0], run["epochs"][-1])
        for k, row in enumerate(epoch["layers"])
        if row["mean_distance"] is not None
    ]
    base: Any = alt.Chart(alt.Data(values=points), width=560, height=160)
    return base.mark_line(point=True).encode(
        x=alt.X("layer:O", title=None, axis=alt.Axis(labelAngle=-60)),
        y=alt.Y("value:Q", title="distance of means"),
        color=alt.Color("method:N", title=None),
        row=alt.Row("epoch:N", title=None),
    )
