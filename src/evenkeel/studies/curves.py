"""Error over training, as a picture."""

from collections.abc import Sequence
from typing import Any

from evenkeel.studies.frame import Facts


def error_curves(points: Sequence[Facts], *, from_zero: bool = True) -> Any:
    """A line for each method, the mean over seeds in a band from lowest to highest.

    Points have ``method``, ``epoch``, ``error`` and ``size``, which has a field of its own.
    """
    import altair as alt

    base: Any = alt.Chart(alt.Data(values=list(points)), width=330, height=220)
    x = alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1))
    colour = alt.Color("method:N", title=None, legend=alt.Legend(symbolOpacity=1))
    scale = alt.Undefined if from_zero else alt.Scale(zero=False)
    line = base.mark_line().encode(
        x=x, y=alt.Y("mean(error):Q", title="test error, %", scale=scale), color=colour
    )
    band = base.mark_area(opacity=0.15).encode(
        x=x, y=alt.Y("min(error):Q"), y2="max(error):Q", color=colour
    )
    return alt.layer(band, line).facet(column=alt.Column("size:N", title=None))


def by_size(runs: Sequence[Facts]) -> list[Facts]:
    """Points of runs with ``together``; one that has None for it stands in every field."""
    sizes = sorted({run["together"] for run in runs} - {None})
    return [
        {
            "method": run["method"],
            "size": f"{size} normalized together; bands: lowest to highest of the seeds",
            "epoch": epoch["epoch"],
            "error": epoch["error"],
        }
        for run in runs
        for size in ([run["together"]] if run["together"] else sizes)
        for epoch in run["epochs"]
    ]
