"""Charts as altair objects; :func:`svg` makes them part of a page, in the page's colours."""

import math
import re
from collections.abc import Sequence
from typing import Any

import altair as alt

from evenkeel.audit.plan import age_label
from evenkeel.audit.sensitivity import Sensitivity
from evenkeel.audit.summary import Cell

WIDTH, HEIGHT = 440, 250
INK, GRID = "#1c2430", "#d5dbe3"
SERIES = (
    "#7a8594", "#c25700", "#0b7a5c", "#0b5fae", "#9a2b8a", "#8a6d00", "#b3203a", "#3d7d9c",
)  # fmt: skip
PAGE_COLOURS = {"ink": INK, "grid": GRID} | {f"series-{k}": c for k, c in enumerate(SERIES)}
"""By the names that a page has for them; there they change with light, dark and print."""

NEAR = 5.0
"""Points below the digital network that count as near it."""

Chart = Any
Domain = tuple[float, float] | None


def svg(chart: Chart) -> str:
    """The chart as inline SVG that scales with the page and takes its colours from it."""
    import vl_convert

    styled = chart.configure(
        background="transparent",
        font="sans-serif",  # what widths are reckoned with is what a browser then uses
        padding=8,
        axis=alt.AxisConfig(
            labelColor=INK,
            titleColor=INK,
            gridColor=GRID,
            domainColor=GRID,
            tickColor=GRID,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
        ),
        legend=alt.LegendConfig(
            labelColor=INK,
            titleColor=INK,
            labelFontSize=12,
            orient="bottom",
            title=None,
            columns=2,
            labelLimit=300,
        ),
        view=alt.ViewConfig(stroke=None),
    )
    text = vl_convert.vegalite_to_svg(styled.to_json())
    for name, colour in PAGE_COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r'(<svg[^>]*?) width="[\d.]+" height="[\d.]+"', r"\1", text, count=1)
    return text[text.index("<svg") :]


def zoom(cells: Sequence[Cell], digital: float) -> Domain:
    """Range of a second chart for the rows near the digital network, where others are far below."""
    means = [c.mean for c in cells]
    near = [c.quantiles[0] for c in cells if c.mean > digital - NEAR]
    if not near or min(means) > digital - 3 * NEAR:
        return None
    return max(digital - 1.5 * NEAR, min(near) - 0.5), max(digital, *means) + 0.5


def against_age(cells: Sequence[Cell], digital: float, metric: str, domain: Domain = None) -> Chart:
    """Mean of each row over the ages, with the band that holds 90 % of the chips."""
    ages = [age_label(a) for a in sorted({c.age_s for c in cells})]
    rows = [_point(c) | {"x": age_label(c.age_s)} for c in cells]
    x = alt.X("x:O", sort=ages, title="age", axis=alt.Axis(labelAngle=0))
    return _lines(rows, x, digital, f"{metric}, {cells[0].unit}", domain)


def against_level(
    cells: Sequence[Cell], digital: float, metric: str, domain: Domain = None
) -> Chart:
    """Mean of each row over the levels of one kind of device."""
    rows = [_point(c) | {"x": c.level} for c in cells]
    x = alt.X(
        "x:Q",
        title=f"level of {cells[0].family}",
        scale=alt.Scale(zero=False, nice=False, padding=12),
        axis=alt.Axis(values=sorted({c.level for c in cells if c.level is not None}), grid=False),
    )
    return _lines(rows, x, digital, f"{metric}, {cells[0].unit}", domain)


def every_chip(
    cells: Sequence[Cell],
    digital: float,
    metric: str,
    floor: float | None,
    domain: Domain = None,
) -> Chart:
    """Each chip as a dot, a row of remedies in a line; the worst chip of each is named."""
    names = [c.remedy for c in cells]
    low, high = domain or (-math.inf, math.inf)
    dots = [
        {"remedy": c.remedy, "value": value, "chip": f"#{chip}"}
        for c in cells
        for chip, value in c.chips.items()
        if low <= value <= high
    ]
    worst = [
        {"remedy": c.remedy, "value": c.worst, "chip": f"#{c.worst_chip}"}
        for c in cells
        if low <= c.worst <= high
    ]
    y = alt.Y("remedy:N", sort=names, title=None, axis=alt.Axis(grid=True, labelLimit=160))
    x = alt.X("value:Q", title=f"{metric}, {cells[0].unit}", scale=_scale(domain))
    base = alt.Chart(alt.Data(values=dots)).properties(width=WIDTH - 60, height=34 * len(names))
    layers = [
        _rule(digital, alt.X("digital:Q", scale=_scale(domain))),
        base.mark_circle(size=42, opacity=0.55, clip=True).encode(
            x=x, y=y, color=_colour("remedy", names, False)
        ),
        alt.Chart(alt.Data(values=worst))
        .mark_text(dy=-9, fontSize=11, color=INK, clip=True)
        .encode(x=x, y=y, text="chip:N"),
    ]
    if floor is not None:
        layers.append(
            alt.Chart(alt.Data(values=[{"value": floor}]))
            .mark_rule(strokeDash=[2, 2], color=INK, clip=True)
            .encode(x="value:Q")
        )
    return alt.layer(*layers)


def layer_shifts(before: dict[str, float], after: dict[str, float]) -> Chart:
    """For each normalizer, how far its activations were from its statistics, before and after."""
    return _pairs({"before": before, "after": after}, "shift, standard deviations")


def layer_costs(found: Sensitivity) -> Chart:
    """For each layer, the metric with it alone on the chip, and with all but it."""
    both = {
        "alone on the chip": {cost.layer: cost.alone for cost in found.layers},
        "all but it": {cost.layer: cost.without for cost in found.layers},
    }
    return _pairs(both, f"{found.metric}, {found.unit}")


def _pairs(of: dict[str, dict[str, float]], title: str) -> Chart:
    """Two dots for each layer, joined by a line."""
    values = [
        {"layer": layer, "value": value, "when": when}
        for when, values in of.items()
        for layer, value in values.items()
    ]
    order = list(next(iter(of.values())))
    y = alt.Y("layer:N", sort=order, title=None, axis=alt.Axis(labelLimit=170))
    x = alt.X("value:Q", title=title)
    height = max(60, 20 * len(order))
    lines = (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=1.5, color=GRID)
        .encode(x=x, y=y, detail="layer:N")
    )
    dots = (
        alt.Chart(alt.Data(values=values))
        .mark_circle(size=60, opacity=1)
        .encode(x=x, y=y, color=_colour("when", list(of), True))
    )
    return (lines + dots).properties(width=WIDTH - 100, height=height)


def _point(cell: Cell) -> dict[str, Any]:
    return {
        "remedy": cell.remedy,
        "mean": cell.mean,
        "low": cell.quantiles[0],
        "high": cell.quantiles[2],
    }


def _scale(domain: Domain) -> Any:
    return (
        alt.Scale(zero=False, padding=10)
        if domain is None
        else alt.Scale(domain=list(domain), nice=False)
    )


def _lines(rows: list[dict[str, Any]], x: Any, digital: float, title: str, domain: Domain) -> Chart:
    names = list(dict.fromkeys(row["remedy"] for row in rows))
    base = alt.Chart(alt.Data(values=rows)).properties(width=WIDTH, height=HEIGHT)
    colour = _colour("remedy", names, True)
    y = alt.Y("mean:Q", title=title, scale=_scale(domain))
    band = base.mark_area(opacity=0.18, clip=True).encode(
        x=x, y=alt.Y("low:Q", scale=_scale(domain)), y2="high:Q", color=colour
    )
    line = base.mark_line(point=alt.OverlayMarkDef(size=36), strokeWidth=2, clip=True).encode(
        x=x, y=y, color=colour
    )
    return alt.layer(_rule(digital, alt.Y("digital:Q", scale=_scale(domain))), band, line)


def _rule(value: float, channel: Any) -> Chart:
    """A dashed line for the digital network."""
    base = alt.Chart(alt.Data(values=[{"digital": value}]))
    return base.mark_rule(strokeDash=[5, 4], color=INK, opacity=0.7).encode(channel)


def _colour(field: str, names: list[str], legend: bool) -> Any:
    scale = alt.Scale(domain=names, range=[SERIES[k % len(SERIES)] for k in range(len(names))])
    shown = alt.Legend(symbolType="circle", symbolOpacity=1) if legend else None
    return alt.Color(f"{field}:N", sort=names, scale=scale, legend=shown)
