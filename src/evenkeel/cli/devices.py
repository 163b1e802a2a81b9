"""``evenkeel devices``."""

import json
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import entry_points
from inspect import getdoc
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from evenkeel.analog import DeviceModel
from evenkeel.audit.plan import age_label
from evenkeel.files import write_atomically
from evenkeel.testing import device_moments

DAY_S = 86_400.0


def devices(*, json_file: Annotated[Path | None, Parameter(name="--json")] = None) -> None:
    """List the devices that an audit knows, with their settings.

    Parameters
    ----------
    json_file
        Write the list here as well, machine-readable.
    """
    table, listed = Table(), []
    for title in ("name", "settings", "what it is", "half of the range"):
        table.add_column(title)
    for entry in sorted(entry_points(group="evenkeel.devices"), key=lambda e: e.name):
        kind = entry.load()
        known = fields(kind) if is_dataclass(kind) else ()  # others may be functions
        defaults = {f.name: None if f.default is MISSING else f.default for f in known}
        summary = (getdoc(kind) or "").split("\n")[0]
        settings = (k if v is None else f"{k}={v}" for k, v in defaults.items())
        figures = {} if not known or None in defaults.values() else _figures(kind())
        shown = [f"{title} {mean:.1f} ± {off:.1f} %" for title, (mean, off) in figures.items()]
        table.add_row(entry.name, ", ".join(settings), summary, "\n".join(shown))
        listed.append(
            {"name": entry.name, "settings": defaults, "summary": summary, "half": figures}
        )
    if json_file is not None:
        write_atomically(json_file, json.dumps(listed, indent=1).encode())
    Console().print(table)
    Console().print(
        "Half of the range: what devices with that target conduct, in one read, mean and deviation "
        "in percent of g_max. Devices that need a setting are named with it, as gaussian:0.05.",
        highlight=False,
    )


def _figures(device: DeviceModel) -> dict[str, tuple[float, float]]:
    """Mean and deviation by age, in percent of the range."""
    ages = [0.0, DAY_S] if device.ages else [0.0]
    moments = device_moments(device, [0.5], ages, draws=20_000)
    return {
        age_label(age_s) if age_s else "written": (100 * mean, 100 * off)
        for (_, age_s), (mean, off) in moments.items()
    }
