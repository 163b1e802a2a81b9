"""The study's tables and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evenkeel.files import write_atomically
from evenkeel.studies.curves import error_curves
from evenkeel.studies.frame import Facts, cells_of, markdown, svg
from evenkeel.studies.measures import interval

PUBLISHED = {
    15: {"baseline": 51.4, "BN": 51.8, "GN": 53.1, "ENorm": 53.6, "ENorm + BN": 54.7},
    19: {"baseline": 50.5, "BN": 51.7, "GN": 52.6, "ENorm": 53.4, "ENorm + BN": 54.6},
}
"""Test accuracy in percent, by intermediate layers, read off the paper's figure to 0.05; after 60
epochs. Its "ENorm + BN" moves weights before a batch norm, which changes the function; ours does
not."""
HEAD = """# Equi-normalization: figures

Written by `evenkeel study equi_norm`."""


def draw(done: dict[str, Facts], folder: Path) -> list[Path]:
    """Tables; error over training."""
    dense, residual = (
        [run for name in done if name.startswith(kind) for run in done[name]["runs"]]
        for kind in ("dense_", "residual_")
    )
    sections = [HEAD]
    if "rounds" in done:
        sections.append(f"## rounds\n\n{_rounds(done['rounds']['runs'])}")
    if "cost" in done:
        sections.append(f"## cost\n\n{_cost(done['cost'])}")
    if "analog" in done:
        sections.append(f"## analog\n\n{_analog(done['analog'])}")
    if dense:
        sections.append(f"## dense\n\n{_dense(dense)}")
    if residual:
        sections.append(f"## residual\n\n{_residual(residual)}")
    files = [folder / "tables.md"]
    write_atomically(files[0], ("\n\n".join(sections) + "\n").encode())
    for name, runs in (("dense", dense), ("residual", residual)):
        if runs:
            files.append(folder / f"{name}.svg")
            write_atomically(files[-1], svg(_curves(runs)).encode())
    return files


def _rounds(runs: Sequence[Facts]) -> str:
    places = dict.fromkeys((run["layers"], run["width"]) for run in runs)
    rows = []
    for layers, width in places:
        those = [run for run in runs if (run["layers"], run["width"]) == (layers, width)]
        most = [max(run["rounds"][way] for run in those) for way in those[0]["rounds"]]
        rows.append([str(layers), str(width), *map(str, most)])
    table = markdown(["layers", "width", "layer by layer", "all at once"], rows)
    said = "Coarse solves, each with a sweep, to a relative excess of 1e-8; the most of all seeds."
    return f"{said}\n\n{table}"


def _cost(figures: Facts) -> str:
    big, step = figures["resnet50"], figures["resnet18"]
    return (
        f"ResNet-50: {big['balance_s']:.2f} s to balance, of which {big['capture_s']:.2f} s to "
        f"capture, on {big['threads']} threads; {big['free']} free channels.\n\n"
        f"A sweep of a ResNet-18 takes {step['sweep_ms']:.0f} ms, {100 * step['share']:.1f} % of a "
        f"training step at batch {step['batch']} ({step['step_ms']:.0f} ms)."
    )


def _analog(figures: Facts) -> str:
    cells = cells_of(figures)
    places = list(dict.fromkeys((cell.device, cell.age_s) for cell in cells))
    rows = []
    for remedy in dict.fromkeys(cell.remedy for cell in cells):
        of = {(c.device, c.age_s): c for c in cells if c.remedy == remedy}
        rows.append([remedy, *(f"{of[p].mean:.1f}" if p in of else "" for p in places)])
    said = (
        f"Accuracy in percent, digital {figures['digital']:.1f}; means over chips, "
        f"{figures['test_samples']} test images."
    )
    heads = [device + (f" after {age_s / 86400:g} d" if age_s else "") for device, age_s in places]
    return f"{said}\n\n{markdown(['remedy', *heads], rows)}"


def _dense(runs: Sequence[Facts]) -> str:
    sizes = sorted({run["intermediate"] for run in runs})
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        row = [method]
        for n in sizes:
            row.append(interval([100 - e for e in _last(runs, method=method, intermediate=n)]))
            published = PUBLISHED.get(n, {}).get(method.partition(",")[0])
            row.append("" if published is None else f"{published:.1f}")
        rows.append(row)
    heads = [head for n in sizes for head in (f"{n} layers", f"{n}, published")]
    epochs = len(runs[0]["epochs"])
    said = f"Test accuracy in percent after {epochs} epochs, mean and 95 % interval."
    return f"{said}\n\n{markdown(['method', *heads], rows)}"


def _residual(runs: Sequence[Facts]) -> str:
    rows = [
        [method, interval(_last(runs, method=method))]
        for method in dict.fromkeys(run["method"] for run in runs)
    ]
    said = f"Test error in percent after {len(runs[0]['epochs'])} epochs, mean and 95 % interval."
    return f"{said}\n\n{markdown(['method', 'error'], rows)}"


def _last(runs: Sequence[Facts], **which: Any) -> list[float]:
    """Errors after the last epoch of those runs."""
    return [
        run["epochs"][-1]["error"]
        for run in runs
        if all(run[key] == value for key, value in which.items())
    ]


def _curves(runs: Sequence[Facts]) -> Any:
    points = [
        {
            "method": run["method"],
            "size": f"{run['intermediate']} intermediate layers" if "intermediate" in run else "",
            "epoch": epoch["epoch"],
            "error": epoch["error"],
        }
        for run in runs
        for epoch in run["epochs"]
    ]
    return error_curves(points, from_zero=False)
