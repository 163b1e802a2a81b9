"""``evenkeel devices``."""

from dataclasses import fields
from importlib.metadata import entry_points
from inspect import getdoc

from rich.console import Console
from rich.table import Table


def devices() -> None:
    """List the devices that an audit knows, with their settings."""
    table = Table()
    for title in ("name", "settings", "what it is"):
        table.add_column(title)
    for entry in sorted(entry_points(group="evenkeel.devices"), key=lambda e: e.name):
        kind = entry.load()
        settings = ", ".join(
            f.name if not isinstance(f.default, float) else f"{f.name}={f.default:g}"
            for f in fields(kind)
        )
        table.add_row(entry.name, settings, (getdoc(kind) or "").split("\n")[0])
    Console().print(table)
