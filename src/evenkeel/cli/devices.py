"""``evenkeel devices``."""

import json
from dataclasses import MISSING, fields
from importlib.metadata import entry_points
from inspect import getdoc
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from evenkeel.files import write_atomically


def devices(*, json_file: Annotated[Path | None, Parameter(name="--json")] = None) -> None:
    """List the devices that an audit knows, with their settings.

    Parameters
    ----------
    json_file
        Write the list here as well, machine-readable.
    """
    table, listed = Table(), []
    for title in ("name", "settings", "what it is"):
        table.add_column(title)
    for entry in sorted(entry_points(group="evenkeel.devices"), key=lambda e: e.name):
        kind = entry.load()
        defaults = {f.name: None if f.default is MISSING else f.default for f in fields(kind)}
        summary = (getdoc(kind) or "").split("\n")[0]
        settings = (k if v is None else f"{k}={v:g}" for k, v in defaults.items())
        table.add_row(entry.name, ", ".join(settings), summary)
        listed.append({"name": entry.name, "settings": defaults, "summary": summary})
    if json_file is not None:
        write_atomically(json_file, json.dumps(listed, indent=1).encode())
    Console().print(table)
