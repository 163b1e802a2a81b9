"""Images in one folder per class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenkeel.data.dataset import Data
from evenkeel.errors import ConfigError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
BATCH = 128


def image_folder(
    root: str | Path,
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    calibration_samples: int = 512,
) -> Data:
    """Read ``root/test/CLASS/*.png`` to test on and ``root/train/CLASS/*.png`` to calibrate with.

    Classes are numbered in the order of their names. ``val`` or ``calibration`` stand in for the
    two folders. All images must have one size; grey ones give one channel, others three.

    Args:
        root: the folder.
        mean: taken off the pixels, which are in [0, 1]; one number, or one per channel.
        std: what they are divided by then.
        calibration_samples: how many images to calibrate with, drawn evenly over the classes.
    """
    root = Path(root)
    test, train = _part(root, "test", "val"), _part(root, "calibration", "train")
    classes = sorted(p.name for p in test.iterdir() if p.is_dir())
    paths = [(path, k) for k, name in enumerate(classes) for path in _images(test / name)]
    wanted = [
        path
        for name in sorted(p.name for p in train.iterdir() if p.is_dir())
        for path in _images(train / name)
    ]
    if not paths or not wanted:
        empty = test if not paths else train
        raise ConfigError(
            f"No images in {empty}: expected {empty}/CLASS/*.png (or jpg, webp, ...)."
        )
    step = max(1, len(wanted) // calibration_samples)
    x = _normalized(_stack([path for path, _ in paths]), mean, std)
    y = torch.tensor([k for _, k in paths])
    chosen = _normalized(_stack(wanted[::step][:calibration_samples]), mean, std)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    return Data(
        name=root.name,
        test=list(zip(x.split(BATCH), y.split(BATCH), strict=True)),
        calibration=[(images,) for images in chosen[order].split(BATCH)],
        classes=classes,
    )


def _part(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ConfigError(
        f"A folder of images needs {root}/{names[0]}/CLASS/*.png (or {names[1]}/ in its place); "
        f"neither folder is there."
    )


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _stack(paths: list[Path]) -> Tensor:
    from PIL import Image

    pixels: list[np.ndarray] = []
    for path in paths:
        with Image.open(path) as image:
            grey = image.mode in ("1", "L", "I", "I;16")
            array = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.float32) / 255
        array = array[None] if grey else array.transpose(2, 0, 1)
        if pixels and array.shape != pixels[0].shape:
            raise ConfigError(
                f"All images must have one shape; {path} is {array.shape}, {paths[0]} is "
                f"{pixels[0].shape}. Resize or crop them as the network expects."
            )
        pixels.append(array)
    return torch.from_numpy(np.stack(pixels))  # (N, C, H, W)


def _normalized(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    m, s = (torch.tensor(list(values)).view(1, -1, 1, 1) for values in (mean, std))
    return (x - m) / s
