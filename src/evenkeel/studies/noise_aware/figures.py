"""The study's pictures."""

from collections.abc import Sequence
from pathlib import Path

from evenkeel.audit.summary import Cell
from evenkeel.files import write_atomically
from evenkeel.studies.frame import Facts, cells_of, svg
from evenkeel.studies.noise_aware.tables import tables

SHOWN = ("none", "pooled", "online", "calibrate", "match+calibrate", "match+clip+calibrate")


def draw(done: dict[str, Facts], folder: Path) -> list[Path]:
    """Tables; accuracy against the level of Gaussian noise, and against a PCM chip's age."""
    from evenkeel.audit.report.charts import against_age, against_level

    pictures = [folder / "tables.md"]
    write_atomically(pictures[0], tables(done).encode())
    for part, chart in (("gaussian", against_level), ("pcm", against_age)):
        if part in done and len({(c.level, c.age_s) for c in cells_of(done[part])}) > 1:
            drawn = chart(_shown(cells_of(done[part])), done[part]["digital"], "accuracy")
            pictures.append(folder / f"{part}.svg")
            write_atomically(pictures[-1], svg(drawn.properties(width=560, height=260)).encode())
    return pictures


def _shown(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.remedy in SHOWN]
