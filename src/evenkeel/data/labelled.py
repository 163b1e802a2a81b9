"""Labelled images for few-shot episodes: any folder of folders, and Omniglot in its two splits."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from evenkeel.data.folder import image_files, image_folders, stacked
from evenkeel.errors import ConfigError, nearest

Progress = Callable[[int, int], None]
Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class LabelledImages:
    """Images with the class of each.

    Attributes:
        images: (N, C, H, W), pixels in [0, 1].
        labels: (N,), the index of the class.
        classes: their names: the folder's path, such as ``Greek/character07``.
        ink: whether 1 is ink, and 0 the paper.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    ink: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.images.shape[1]

    def only(self, chosen: Callable[[str], bool]) -> "LabelledImages":
        """Those of the classes whose name is chosen."""
        kept = [k for k, name in enumerate(self.classes) if chosen(name)]
        if not kept:
            raise ConfigError(
                f"None of {len(self.classes)} classes is chosen; they are named as "
                f"{', '.join(self.classes[:3])}."
            )
        new = torch.full((len(self.classes),), -1)
        new[kept] = torch.arange(len(kept))
        rows = new[self.labels] >= 0
        return replace(
            self,
            images=self.images[rows],
            labels=new[self.labels[rows]],
            classes=tuple(self.classes[k] for k in kept),
        )

    def turned(self) -> "LabelledImages":
        """Four times the classes: each as it is, and turned by 90, 180 and 270 degrees."""
        quarters = range(4)
        return replace(
            self,
            images=torch.cat([self.images.rot90(k, (2, 3)) for k in quarters]),
            labels=torch.cat([self.labels + k * len(self.classes) for k in quarters]),
            classes=tuple(f"{name}/rot{90 * k:03d}" for k in quarters for name in self.classes),
        )


def labelled_folder(
    root: str | Path,
    *,
    size: int | None = None,
    invert: bool = False,
    progress: Progress = lambda done, total: None,
) -> LabelledImages:
    """Read all images below a folder; every folder that holds some is a class.

    Args:
        root: the folder, of one level (``CLASS/*.png``) or more (``ALPHABET/CHARACTER/*.png``).
        size: resize to ``size`` x ``size``, averaged; default: as they are, all of one size.
        invert: 1 - x, for ink on paper: ink 1, paper 0.
        progress: called with images read and images in all.

    Raises:
        ConfigError: no images, or of different shapes.
    """
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(f"No folder {root}. Give one with images in a folder for each class.")
    folders = image_folders(root)
    if not folders:
        raise ConfigError(f"No images in {root}: expected {root}/CLASS/*.png (or jpg, ...).")
    files = [(file, k) for k, folder in enumerate(folders) for file in image_files(folder)]
    images = stacked([file for file, _ in files], size, progress)
    return LabelledImages(
        1 - images if invert else images,
        torch.tensor([k for _, k in files]),
        tuple(folder.relative_to(root).as_posix() for folder in folders),
        ink=invert,
    )


VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
"""Alphabets of the background set that training does not see: those of the Vinyals split."""
_VINYALS_TEST = (
    "Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)",
    "Oriya", "Sylheti", "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG",
)  # fmt: skip
_VINYALS_TEST_TOO = tuple(f"Gurmukhi/character{k}" for k in (42, 43, 44, 45))
SPLITS = ("official", "vinyals")


def omniglot(
    folder: Path,
    part: Part,
    *,
    split: Literal["official", "vinyals"] = "official",
    size: int = 32,
    progress: Progress = lambda done, total: None,
) -> LabelledImages:
    """Handwritten characters of one part, ink 1 and paper 0.

    - official: "test" is ``images_evaluation``, 659 characters of 20 alphabets; "validation" the
      172 of five alphabets of ``images_background``, "train" its other 792. No alphabet is in two
      parts.
    - vinyals: 423 characters to test on, the same 172, and 1,028 to train on. Its characters are
      not turned; see :meth:`LabelledImages.turned`. One alphabet, Gurmukhi, is on both sides.

    Source: Lake et al., Science 350 (2015); Vinyals et al., "Matching networks for one shot
    learning", NeurIPS 2016.
    """
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}. {nearest(split, SPLITS)}")
    if part not in get_args(Part):
        raise ConfigError(f"Unknown part {part!r}. {nearest(part, get_args(Part))}")
    sides = ["background"] if part == "validation" or split == "official" else _SIDES
    if part == "test":
        sides = ["evaluation"]
    read = [
        labelled_folder(folder / f"images_{side}", size=size, invert=True, progress=progress)
        for side in sides
    ]
    return _together(read).only(lambda name: _part_of(name, split, sides) == part)


_SIDES = ["background", "evaluation"]


def _part_of(name: str, split: str, sides: Iterable[str]) -> Part:
    alphabet = name.split("/", maxsplit=1)[0]
    if alphabet in VALIDATION:
        return "validation"
    if split == "official":
        return "test" if "evaluation" in sides else "train"
    return "test" if alphabet in _VINYALS_TEST or name in _VINYALS_TEST_TOO else "train"


def _together(parts: list[LabelledImages]) -> LabelledImages:
    before = [sum(len(p.classes) for p in parts[:k]) for k in range(len(parts))]
    return LabelledImages(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels + n for part, n in zip(parts, before, strict=True)]),
        tuple(name for part in parts for name in part.classes),
        ink=True,
    )
