"""From what a user names to labelled images for episodes."""

from pathlib import Path
from typing import Literal

from rich.progress import Progress

from evenkeel import data as datasets
from evenkeel.data import LabelledImages
from evenkeel.errors import ConfigError

Part = Literal["train", "validation", "test"]


def labelled_from(
    name: str,
    part: Part,
    *,
    root: Path | None,
    split: Literal["official", "vinyals"],
    size: int,
    ink: bool,
    bar: Progress,
) -> LabelledImages:
    """Images of "omniglot", ink 1, or of the folder that a part has in another, size x size."""
    job = bar.add_task(f"reading {part}")

    def show(done: int, total: int) -> None:
        bar.update(job, completed=done, total=total, visible=done < total)

    if name == "omniglot":
        folder = datasets.folder_of(name, root)
        return datasets.omniglot(folder, part, split=split, size=size, progress=show)
    if not (Path(name) / part).is_dir():
        raise ConfigError(
            f"--data must be omniglot, or a folder with {part}/CLASS/*.png; {Path(name) / part} is "
            f"no folder."
        )
    return datasets.labelled_folder(Path(name) / part, size=size, invert=ink, progress=show)
