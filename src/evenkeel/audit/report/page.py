"""From an audit to a page."""

import copy
import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evenkeel.audit.plan import age_label
from evenkeel.audit.summary import Cell
from evenkeel.audit.verdict import EFFORTS, points
from evenkeel.files import write_atomically

if TYPE_CHECKING:
    from evenkeel.audit.result import Audit

PICTURES = 6
"""How many samples are shown."""


def write_report(audit: "Audit", path: Path) -> Path:
    """Write the whole page."""
    write_atomically(path, _template().render(**_content(audit)).encode())
    return path


def summary_html(audit: "Audit") -> str:
    """The verdict and the table, for a notebook."""
    said = "".join(f"<p>{html.escape(s)}</p>" for s in audit.verdict)
    return f"{said}<pre>{html.escape(audit.table())}</pre>"


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"age": age_label, "points": points, "markdown": _code}
    return environment.get_template("page.html.jinja")


def _code(text: str) -> str:
    """The one mark that advice uses: `code`."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)))


def _content(audit: "Audit") -> dict[str, Any]:
    from evenkeel.audit.report.charts import PAGE_COLOURS

    headline = audit.verdicts[0]
    worst = headline.worst
    here = [c for c in audit.cells if c.device == worst.device and c.age_s == worst.age_s]
    return {
        "audit": audit,
        "colours": PAGE_COLOURS,
        "facts": audit.to_dict(),
        "verdict": [
            said.replace(f" {audit.unit}", f"\u00a0{audit.unit}") for said in audit.verdict
        ],
        "worst": worst,
        "row": audit._work.plan.rows[headline.row],
        "efforts": EFFORTS,
        "others": _others(audit),
        "as_it_is": _as_it_is(audit),
        "charts": _charts(audit, here, worst),
        "shifts": _shifts(audit, worst),
        "sensitivity": _sensitivity(audit),
        "pictures": _pictures(audit, worst, headline.row),
        "legend": getattr(audit._work.plan.task, "legend", ""),
        "devices": list(dict.fromkeys(c.device for c in audit.cells)),
    }


def _others(audit: "Audit") -> list[dict[str, Any]]:
    """A line for every device: the first row and the recommended one, each at its worst age."""
    lines = []
    for verdict in audit.verdicts:
        effort = audit._work.plan.rows[verdict.row].effort
        lines.append(
            {
                "device": verdict.device,
                "raw": verdict.worst_raw,
                "recommended": verdict.worst,
                "effort": effort,
            }
        )
    return lines


def _charts(audit: "Audit", here: list[Cell], worst: Cell) -> dict[str, Any]:
    import markupsafe

    from evenkeel.audit.report import charts

    def drawn(chart: Any) -> Any:
        return markupsafe.Markup(charts.svg(chart))

    def with_zoom(name: str, cells: list[Cell], draw: Callable[..., Any]) -> list[tuple[str, Any]]:
        found = [(name, drawn(draw(cells, audit.digital, audit.metric)))]
        if near := charts.zoom(cells, audit.digital):
            chart = draw(cells, audit.digital, audit.metric, domain=near)
            found.append((f"{name}, near the digital network", drawn(chart)))
        return found

    def chips(cells: list[Cell], digital: float, metric: str, domain: charts.Domain = None) -> Any:
        return charts.every_chip(cells, digital, metric, audit.floor, domain)

    lines = []
    for family in dict.fromkeys(c.family for c in audit.cells):
        cells = [
            c for c in audit.cells if c.family == family and c.age_s == _last_age(audit, c.device)
        ]
        levels = {c.device: c.level for c in cells}
        if 1 < len(levels) == len(set(levels.values())):  # one device to a level
            lines += with_zoom(family, cells, charts.against_level)
    for device in dict.fromkeys(c.device for c in audit.cells):
        cells = [c for c in audit.cells if c.device == device]
        if len({c.age_s for c in cells}) > 1:
            lines = with_zoom(device, cells, charts.against_age) + lines
    return {"lines": lines, "chips": with_zoom("All chips", here, chips)}


def _last_age(audit: "Audit", device: str) -> float:
    return max(c.age_s for c in audit.cells if c.device == device)


def _shifts(audit: "Audit", worst: Cell) -> dict[str, Any] | None:
    """Shifts at the headline's place, for the plainest calibration there."""
    import markupsafe

    from evenkeel.audit.report import charts

    here = [s for s in audit.shifts if (s["device"], s["age_s"]) == (worst.device, worst.age_s)]
    if not here:
        return None
    chosen = min(here, key=lambda s: len(s["remedy"]))
    chart = charts.layer_shifts(chosen["before"], chosen["after"])
    return {**chosen, "chart": markupsafe.Markup(charts.svg(chart))}


def _sensitivity(audit: "Audit") -> dict[str, Any] | None:
    import markupsafe

    from evenkeel.audit.report import charts

    if audit.sensitivity is None:
        return None
    chart = markupsafe.Markup(charts.svg(charts.layer_costs(audit.sensitivity)))
    return {"chart": chart, "said": audit.sensitivity.said}


@torch.no_grad()
def _pictures(audit: "Audit", worst: Cell, row: int) -> list[Any]:
    """Samples on which the worst chip, as it is, errs: digital, raw and mended side by side."""
    import markupsafe

    work = audit._work
    plan, task, batch = work.plan, work.plan.task, work.data.test[0]
    rows = dict.fromkeys((0, row))
    networks: dict[str, Any] = {"digital": copy.deepcopy(work.model)}
    for r in rows:
        networks[plan.rows[r].name if r else _as_it_is(audit)] = audit.mended_chip(
            0, worst.age_s, r, worst.worst_chip
        )
    outputs = {name: task.run(network, batch) for name, network in networks.items()}
    errors = task.errors(outputs[_as_it_is(audit)], batch)
    worst_first = torch.argsort(errors, descending=True, stable=True)[:PICTURES]
    return [
        markupsafe.Markup(task.draw(batch, int(i), outputs, work.data.classes))
        for i in worst_first
        if errors[i] > 0
    ]


def _as_it_is(audit: "Audit") -> str:
    """How the first row is called: it need not be the chip as it is."""
    first = audit._work.plan.rows[0]
    return f"chip with {first.title}" if first.per_chip or first.is_shared else "chip as it is"
