"""Pictures of any size, by name."""

from pathlib import Path

import torch
from torch import Tensor

from evenkeel.data.dataset import Data, batched
from evenkeel.data.folder import image_files, pixels_of
from evenkeel.data.shapes import from_middle
from evenkeel.errors import ConfigError

SIDE, CALIBRATION = 256, 8


def kodak(folder: str | Path) -> Data:
    """The middle 256 x 256 pixels of the 24 pictures: 8 to calibrate with, 16 to test on."""
    squares = torch.stack([middle(image, SIDE) for image in pictures(folder).values()])
    return Data("kodak", batched(squares[CALIBRATION:]), batched(squares[:CALIBRATION]))


def middle(image: Tensor, side: int) -> Tensor:
    """So many pixels of each side (C, H, W), or all, from the middle."""
    return from_middle(image, side, side)


def pictures(folder: str | Path) -> dict[str, Tensor]:
    """All images that lie in a folder, (3, H, W) in [0, 1], by their name without the suffix."""
    files = image_files(Path(folder)) if Path(folder).is_dir() else []
    if not files:
        raise ConfigError(f"No images in {folder}: expected {folder}/*.png (or jpg, ...).")
    found = {file.stem: torch.from_numpy(pixels_of(file).copy()) for file in files}
    return {name: image.expand(3, -1, -1) for name, image in found.items()}
