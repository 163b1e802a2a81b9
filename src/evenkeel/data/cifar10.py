"""CIFAR-10 in its official binary layout."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenkeel.data.dataset import Data, batched

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of the training images, per channel, for pixels in [0, 1]."""
CALIBRATION, CALIBRATION_BATCH = 2600, 200
"""Images to calibrate with, and those of a batch: the budget of Joshi et al."""


def cifar10(folder: Path) -> Data:
    """10,000 test images, and the first 2,600 training images, not augmented, to calibrate with."""
    x, y = _read(folder / "test_batch.bin")
    calibration, _ = _read(folder / "data_batch_1.bin")
    return Data(
        name="cifar10",
        test=batched(x, y),
        calibration=batched(calibration[:CALIBRATION], batch=CALIBRATION_BATCH),
        classes=(folder / "batches.meta.txt").read_text().split(),
    )


def cifar10_train(folder: Path) -> tuple[Tensor, Tensor]:
    """All 50,000 training images (N, 3, 32, 32), normalized, and their labels, in their order."""
    parts = [_read(folder / f"data_batch_{k}.bin") for k in range(1, 6)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _read(path: Path) -> tuple[Tensor, Tensor]:
    # A record is a byte of label and 3072 of pixels, channel by channel, row by row.
    records = torch.from_numpy(np.fromfile(path, dtype=np.uint8)).view(-1, 1 + 3 * 32 * 32)
    x = records[:, 1:].view(-1, 3, 32, 32).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)  # convolutions run faster
    return x, records[:, 0].long()
