"""The handwritten digits that come with scikit-learn: real data that needs no download."""

import torch

from evenkeel.data.dataset import Data
from evenkeel.errors import MissingExtraError

TRAIN, CALIBRATION, BATCH = 1197, 512, 128


def digits() -> Data:
    """1,797 real digits of 8x8 pixels: 1,197 to train on, 600 to test on.

    The split is fixed. Calibration takes 512 of the training images; tests see none of them. Pixels
    are in [0, 1].

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("The digits data set", "demo") from error
    bunch = load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(bunch.images).float()[order].unsqueeze(1) / 16  # (1797, 1, 8, 8)
    y = torch.from_numpy(bunch.target)[order]
    return Data(
        name="digits",
        test=list(zip(x[TRAIN:].split(BATCH), y[TRAIN:].split(BATCH), strict=True)),
        calibration=[(images,) for images in x[:CALIBRATION].split(BATCH)],
        classes=[str(k) for k in range(10)],
        train=(x[:TRAIN], y[:TRAIN]),
    )
