"""Pictures of any size, by name."""

from pathlib import Path

import torch
from torch import Tensor

from evenkeel.data.folder import image_files, pixels_of
from evenkeel.errors import ConfigError


def pictures(folder: str | Path) -> dict[str, Tensor]:
    """All images that lie in a folder, (3, H, W) in [0, 1], by their name without the suffix."""
    files = image_files(Path(folder)) if Path(folder).is_dir() else []
    if not files:
        raise ConfigError(f"No images in {folder}: expected {folder}/*.png (or jpg, ...).")
    found = {file.stem: torch.from_numpy(pixels_of(file).copy()) for file in files}
    return {name: image.expand(3, -1, -1) for name, image in found.items()}
