"""The study's tables."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from evenkeel.files import write_atomically
from evenkeel.studies.frame import Facts, markdown
from evenkeel.studies.measures import interval

HEAD = """# Normalizers of dense networks in small batches: figures

Written by `evenkeel study micro_batch`. Mean over seeds, and half of its 95 % interval; seconds of
a whole training, on the machine of the runs, which had others beside it."""
MEASURES = {
    "segment": ("foreground IoU", "Dice", "object AP"),
    "detect": ("AP", "AP50", "AP50 RBC", "AP50 WBC", "AP50 Platelets"),
}


def draw(done: dict[str, Facts], folder: Path) -> list[Path]:
    """A table for each task."""
    sections = [HEAD, *(_table(name, figures["runs"]) for name, figures in done.items())]
    path = folder / "tables.md"
    write_atomically(path, ("\n\n".join(sections) + "\n").encode())
    return [path]


def _table(name: str, runs: Sequence[Facts]) -> str:
    measures = MEASURES[runs[0]["task"]]
    rows = []
    for batch in sorted({run["batch_size"] for run in runs}):
        for method in dict.fromkeys(run["method"] for run in runs):
            own = [r for r in runs if (r["batch_size"], r["method"]) == (batch, method)]
            figures = [run["figures"] for run in own if run["figures"]]
            told = [interval([f[measure] for f in figures]) for measure in measures]
            lost = len(own) - len(figures)
            seconds = f"{fmean(run['seconds'] for run in own):.0f}"
            seeds = f"{len(own)}" + (f", {lost} diverged" if lost else "")
            rows.append([str(batch), method, seeds, *told, seconds])
    heads = ["batch", "normalizer", "seeds", *measures, "seconds"]
    return f"## {name}\n\n{markdown(heads, rows)}"
