"""The study's tables."""

from pathlib import Path

from evenkeel.audit.plan import age_label
from evenkeel.audit.verdict import points
from evenkeel.files import write_atomically
from evenkeel.studies.frame import Facts, cells_of, markdown

HEAD = """# Segmentation and detection on chips: figures

Written by `evenkeel study dense`. Mean over chips, and half of its 95 % interval; worse: chips
that the remedy made worse than the first row."""


def draw(done: dict[str, Facts], folder: Path) -> list[Path]:
    """A table for each network."""
    sections = [HEAD, *(_table(name, figures) for name, figures in done.items())]
    path = folder / "tables.md"
    write_atomically(path, ("\n\n".join(sections) + "\n").encode())
    return [path]


def _table(name: str, figures: Facts) -> str:
    rows = [
        [
            cell.device,
            age_label(cell.age_s),
            cell.remedy,
            points(cell),
            "" if cell.gain is None else f"{cell.gain:+.1f}",
            "" if cell.recovered is None else f"{100 * cell.recovered:.0f} %",
            "" if cell.harmed is None else f"{100 * cell.harmed:.0f} %",
        ]
        for cell in cells_of(figures)
    ]
    told = ", ".join(f"{of} {figure:.1f}" for of, figure in figures["digital_figures"].items())
    note = " ".join([f"Digital, {figures['test_samples']} pictures: {told}.", *figures["notes"]])
    heads = ["device", "age", "remedy", figures["metric"], "gain", "recovered", "worse"]
    return f"## {name}\n\n{note}\n\n{markdown(heads, rows)}"
