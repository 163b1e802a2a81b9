"""The house itself: what imports what, what an import costs, what is public."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import evenkeel as ek

SOURCE = Path(ek.__file__).parent
SURFACE = Path(__file__).with_name("api_surface.json")

GROUND = {"errors", "files", "batches", "protocols", "provenance", "draws", "layers", "moments",
          "graph"}  # fmt: skip
METHODS = {"analog", "balance", "calibrate", "norm", "quaternion"}
MAY_IMPORT = {
    **dict.fromkeys(GROUND, GROUND),
    **{method: GROUND | {method} for method in METHODS},
    "memory": GROUND | {"memory", "analog"},  # on the devices that layers are on
    "models": GROUND | {"models", "norm", "memory", "quaternion"},
    "data": GROUND | {"data"},
    "train": GROUND | {"train"},
    "audit": GROUND | {"audit", "data", "models"},  # protocols only: no method's room
}


def imported(path: Path) -> set[str]:
    """Rooms of evenkeel that a file imports, function bodies included."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("evenkeel.")}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_go_downward_only(room):
    files = sorted((SOURCE / room).rglob("*.py")) or [SOURCE / f"{room}.py"]
    for path in files:
        upward = imported(path) - MAY_IMPORT[room]
        assert not upward, f"{path.relative_to(SOURCE)} imports {upward}"


def test_every_room_has_its_rule():
    rooms = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__", "saving", "cli", "testing", "studies", "bench"} == set(MAY_IMPORT)


HEAVY = ["altair", "vl_convert", "scipy", "cyclopts", "rich", "jinja2", "sklearn", "loky", "PIL",
         "xarray", "lightning_fabric", "torchvision", "dask", "pandas", "faiss"]  # fmt: skip


def test_an_import_is_cheap_and_silent():
    code = (
        "import time, sys, torch; start = time.process_time(); import evenkeel;"
        f"print(time.process_time() - start, [m for m in {HEAVY} if m in sys.modules])"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    assert all(run.stderr == "" for run in runs)
    assert all(run.stdout.split(" ", 1)[1].strip() == "[]" for run in runs)
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.15


def surface() -> dict[str, list[str]]:
    """Public names of each public module."""
    rooms = ("", ".analog", ".audit", ".balance", ".calibrate", ".data", ".graph", ".layers",
             ".memory", ".models", ".norm", ".protocols", ".quaternion", ".studies",
             ".testing")  # fmt: skip
    modules = {f"evenkeel{room}": importlib.import_module(f"evenkeel{room}") for room in rooms}
    return {
        name: sorted(
            n
            for n in dir(module)
            if not n.startswith("_")
            and getattr(getattr(module, n), "__module__", "").startswith("evenkeel")
        )
        for name, module in modules.items()
    }


def test_no_public_name_vanishes():
    """A name that is meant to go is taken out of the file, in the same change."""
    kept = json.loads(SURFACE.read_text())
    now = surface()
    gone = {m: sorted(set(names) - set(now.get(m, []))) for m, names in kept.items()}
    assert not any(gone.values()), gone
    new = {m: sorted(set(names) - set(kept.get(m, []))) for m, names in now.items()}
    assert not any(new.values()), f"add to {SURFACE.name}: {new}"
