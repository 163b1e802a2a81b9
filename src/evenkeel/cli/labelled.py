"""From what a user names to labelled images for episodes."""

from pathlib import Path
from typing import Literal

from rich.progress import Progress

from evenkeel import data as datasets
from evenkeel.data import LabelledImages
from evenkeel.errors import ConfigError

SIZE = 32
Part = Literal["train", "validation", "test"]


def labelled_from(
    name: str,
    part: Part,
    *,
    root: Path | None,
    split: Literal["official", "vinyals"],
    bar: Progress,
) -> LabelledImages:
    """Images of "omniglot", or of the folder that a part has in another, 32x32, ink 1."""
    job = bar.add_task(f"reading {part}")

    def show(done: int, total: int) -> None:
        bar.update(job, completed=done, total=total, visible=done < total)

    if name == "omniglot":
        folder = datasets.folder_of(name, root)
        return datasets.omniglot(folder, part, split=split, size=SIZE, progress=show)
    if not (Path(name) / part).is_dir():
        raise ConfigError(
            f"--data must be omniglot, or a folder with {part}/CLASS/*.png; {Path(name) / part} is "
            f"no folder."
        )
    return datasets.labelled_folder(Path(name) / part, size=SIZE, invert=True, progress=show)
