"""MNIST in its official idx layout."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenkeel.data.dataset import Data, batched
from evenkeel.errors import ConfigError

MEAN, STD = 0.1307, 0.3081
"""Of the training images, for pixels in [0, 1]."""
CALIBRATION = 2600


def mnist(folder: Path) -> Data:
    """10,000 test images, and the first 2,600 training images to calibrate with."""
    calibration = _images(folder / "train-images-idx3-ubyte")[:CALIBRATION]
    return Data(
        name="mnist",
        test=batched(
            _images(folder / "t10k-images-idx3-ubyte"), _labels(folder / "t10k-labels-idx1-ubyte")
        ),
        calibration=batched(calibration),
        classes=[str(k) for k in range(10)],
    )


def mnist_train(folder: Path) -> tuple[Tensor, Tensor]:
    """All 60,000 training images (N, 1, 28, 28), normalized, and their labels, in their order."""
    images = _images(folder / "train-images-idx3-ubyte")
    return images, _labels(folder / "train-labels-idx1-ubyte")


def _images(path: Path) -> Tensor:
    return (_idx(path).unsqueeze(1).float() / 255 - MEAN) / STD  # (N, 1, 28, 28)


def _labels(path: Path) -> Tensor:
    return _idx(path).long()


def _idx(path: Path) -> Tensor:
    """A file of bytes: two zeros, type 8, the number of axes, their sizes (big-endian), data."""
    content = path.read_bytes()
    if content[:3] != b"\0\0\x08":
        raise ConfigError(f"{path} is no idx file of bytes; it starts with {content[:4]!r}.")
    axes = content[3]
    sizes = np.frombuffer(content, dtype=">u4", count=axes, offset=4).astype(int)
    data = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes)
    return torch.from_numpy(data.reshape(sizes).copy())
