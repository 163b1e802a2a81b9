"""The study's tables and pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evenkeel.files import write_atomically
from evenkeel.studies.curves import by_size, error_curves
from evenkeel.studies.frame import Facts, markdown, svg
from evenkeel.studies.measures import interval

PUBLISHED = {
    "BN": {2: 8.7, 128: 6.2},
    "GN": {2: 8.5},
    "BKN 0.1": {2: 7.65},
    "BKN 0.95": {128: 5.85},
}
"""Error in percent on CIFAR-10, read off the curves in the authors' repository to 0.1: ResNet-32 at
2 together, ResNet-110 at 128."""
BESIDE = ("BN", "GN")
"""Methods of the batch-channel study that stand beside ours."""
HEAD = """# Batch Kalman normalization: figures

Written by `evenkeel study kalman`; BN and GN by `evenkeel study batch_channel`, with the same
protocol and seeds. Trained in bfloat16, with statistics in float32."""


def draw(done: dict[str, Facts], folder: Path) -> list[Path]:
    """Tables; error over training; errors of estimates against batch size."""
    ours = [run for name in done if name.startswith("accuracy_") for run in done[name]["runs"]]
    runs = [*_beside(folder), *ours] if ours else []
    sections = [HEAD]
    if "cost" in done:
        sections.append(f"## cost\n\n{_cost(done['cost']['runs'])}")
    if "estimates" in done:
        sections.append(f"## estimates\n\n{_estimates(done['estimates']['rows'])}")
    if runs:
        sections.append(f"## accuracy\n\n{_errors(runs)}")
    if "calibration" in done:
        sections.append(f"## calibration\n\n{_calibration(done['calibration']['runs'])}")
    files = [folder / "tables.md"]
    write_atomically(files[0], ("\n\n".join(sections) + "\n").encode())
    if runs:
        files.append(folder / "error.svg")
        write_atomically(files[-1], svg(error_curves(by_size(runs))).encode())
    if "estimates" in done:
        files.append(folder / "estimates.svg")
        write_atomically(files[-1], svg(_against_size(done["estimates"]["rows"])).encode())
    return files


def _beside(folder: Path) -> list[Facts]:
    """The other study's runs of the same scale, where they lie."""
    files = sorted((folder.parent.parent / "batch_channel" / folder.name).glob("accuracy_*.json"))
    runs = [run for file in files for run in json.loads(file.read_text())["figures"]["runs"]]
    return [run for run in runs if run["method"] in BESIDE]


def _cost(runs: Sequence[Facts]) -> str:
    rows = [
        [
            run["network"],
            str(run["together"]),
            f"{run['batch_norm_ms']:.0f}",
            f"{run['kalman_ms']:.0f}",
            f"{run['ratio']:.2f}",
            f"{run['ratio_of_native']:.2f}",
        ]
        for run in runs
    ]
    said = f"A training step of {runs[0]['batch']} samples, float32, {runs[0]['threads']} threads."
    heads = ["network", "together", "batch norm alike, ms", "with priors, ms", "ratio",
             "to batch norm over the batch"]  # fmt: skip
    return f"{said}\n\n{markdown(heads, rows)}"


def _estimates(rows: Sequence[Facts]) -> str:
    tables = []
    for epoch in sorted({row["epoch"] for row in rows}):
        those = [row for row in rows if row["epoch"] == epoch]
        sizes = sorted({row["size"] for row in those})
        kinds = dict.fromkeys((r["propagate"], r["gain"], r["estimate"]) for r in those)
        lines = []
        for kind in kinds:
            of = {
                r["size"]: f"{r['mean']:.2f} / {r['log_var']:.2f}"
                for r in those
                if (r["propagate"], r["gain"], r["estimate"]) == kind
            }
            lines.append([kind[0], f"{kind[1]:g}", kind[2], *(of[size] for size in sizes)])
        heads = ["propagated", "gain", "estimate", *(f"{size} samples" for size in sizes)]
        tables.append(f"After {epoch} epochs:\n\n{markdown(heads, lines)}")
    said = (
        "Root mean square errors over channels, layers and batches: of the mean in deviations / of "
        "the variance's logarithm."
    )
    return "\n\n".join([said, *tables])


def _errors(runs: Sequence[Facts]) -> str:
    sizes = sorted({run["together"] for run in runs} - {None})
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        row = [method]
        for size in sizes:
            last = [
                run["epochs"][-1]["error"]
                for run in runs
                if run["method"] == method and run["together"] in (size, None)
            ]
            published = PUBLISHED.get(method, {}).get(size)
            row += [interval(last), "" if published is None else f"{published:g}"]
        rows.append(row)
    said = f"Test error in percent after {len(runs[0]['epochs'])} epochs, mean and 95 % interval."
    heads = [head for size in sizes for head in (f"{size} together", "published")]
    return f"{said}\n\n{markdown(['method', *heads], rows)}"


def _calibration(runs: Sequence[Facts]) -> str:
    rows = []
    for level, images in dict.fromkeys((run["level"], run["images"]) for run in runs):
        those = [r["accuracy"] for r in runs if (r["level"], r["images"]) == (level, images)]
        rows.append(
            [f"{level:g}", str(images), *(f"{fmean(a[w] for a in those):.1f}" for w in those[0])]
        )
    said = "Accuracy in percent, mean over chips."
    return f"{said}\n\n{markdown(['level', 'images', *runs[0]['accuracy']], rows)}"


def _against_size(rows: Sequence[Facts]) -> Any:
    import altair as alt

    last = max(row["epoch"] for row in rows)
    points = [
        {
            "estimate": row["estimate"],
            "size": row["size"],
            "error": row[what],
            "what": f"{said}; {row['propagate']}",
        }
        for row in rows
        if row["epoch"] == last and row["gain"] == rows[0]["gain"]
        for what, said in (("mean", "mean, in deviations"), ("log_var", "log of the variance"))
    ]
    base: Any = alt.Chart(alt.Data(values=points), width=240, height=160)
    lines = base.mark_line(point=True).encode(
        x=alt.X("size:Q", title="samples", scale=alt.Scale(type="log")),
        y=alt.Y("error:Q", title="root mean square error", scale=alt.Scale(type="log")),
        color=alt.Color("estimate:N", title=None),
        facet=alt.Facet("what:N", title=None, columns=3),
    )
    return lines.resolve_scale(y="independent")
