"""Batches to calibrate with and batches to test on, that never share a sample."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenkeel.batches import first, size
from evenkeel.errors import ConfigError

Batch = Any


@dataclass(frozen=True)
class Data:
    """What an audit runs on.

    Attributes:
        name: for the report.
        test: labelled batches, as the task understands them; for classification (inputs, labels).
        calibration: batches of the same form; labels, if any, are never looked at.
        classes: names of the classes, in the order of the labels; may be empty.
        train: inputs and targets to train on, where the data set has them.
        note: what to know of the samples beside every figure that is measured on them.
    """

    name: str
    test: Sequence[Batch] = field(repr=False)
    calibration: Sequence[Batch] = field(repr=False)
    classes: Sequence[str] = ()
    train: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    note: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for part in ("test", "calibration"):
            batches = getattr(self, part)
            if sum(size(batch) for batch in batches) == 0:
                raise ConfigError(
                    f"An audit needs {part} samples; '{self.name}' has none. Check the folder or "
                    "the loader: a generator that was read before gives nothing the second time."
                )

    @property
    def test_samples(self) -> int:
        """Number of samples that are tested on."""
        return sum(size(batch) for batch in self.test)

    @property
    def calibration_samples(self) -> int:
        """Number of samples to calibrate with."""
        return sum(size(batch) for batch in self.calibration)

    def fingerprint(self) -> str:
        """A hash of all test and calibration batches, in order."""
        return fingerprint([*self.test, "calibration", *self.calibration])

    def shared_samples(self) -> int:
        """Test samples whose input is also among the calibration samples."""
        seen = {fingerprint(x) for batch in self.calibration for x in _inputs(batch)}
        return sum(fingerprint(x) in seen for batch in self.test for x in _inputs(batch))

    def limited(self, test: int | None = None, calibration: int | None = None) -> "Data":
        """The same data with at most so many samples, taken from the start."""
        return replace(
            self,
            test=self.test if test is None else first(self.test, test),
            calibration=(
                self.calibration if calibration is None else first(self.calibration, calibration)
            ),
        )


BATCH = 100


def batched(*tensors: Tensor, batch: int = BATCH) -> list[tuple[Tensor, ...]]:
    """Tensors cut into batches of equal samples, each a tuple."""
    return list(zip(*(t.split(batch) for t in tensors), strict=True))


def as_data(data: Any, calibration: Iterable[Batch] | None = None) -> Data:
    """Whatever the user has as :class:`Data`.

    Args:
        data: a :class:`Data`; a pair of tensors (inputs, labels); or an iterable of labelled
            batches, such as a DataLoader. Without ``calibration`` the first quarter of the samples
            or batches is used to calibrate, and only the rest to test.
        calibration: batches to calibrate with.
    """
    if isinstance(data, Data):
        return data if calibration is None else replace(data, calibration=list(calibration))
    if (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(t, Tensor) for t in data)
    ):
        if len(data[0]) != len(data[1]):
            raise ConfigError(f"{len(data[0])} inputs and {len(data[1])} labels do not pair up.")
        data = list(zip(data[0].split(256), data[1].split(256), strict=True))
        if calibration is None and len(data) < 4:
            x, y = (torch.cat(list(parts)) for parts in zip(*data, strict=True))
            part = max(1, len(x) // 8)
            data = list(zip(x.split(part), y.split(part), strict=True))
    batches = list(data)
    if calibration is None:
        if 0 < len(batches) < 4:
            raise ConfigError(
                f"{len(batches)} batches cannot be cut into a quarter to calibrate with and the "
                f"rest to test on: use smaller batches, or pass calibration=."
            )
        cut = len(batches) // 4
        return Data("data", batches[cut:], batches[:cut])
    return Data("data", batches, list(calibration))


def fingerprint(value: Any) -> str:
    """A hash of tensors, numbers and strings in any nesting; equal content, equal hash."""
    hasher = hashlib.blake2b(digest_size=16)
    _update(hasher, value)
    return hasher.hexdigest()


def _update(hasher: Any, value: Any) -> None:
    leaves, spec = torch.utils._pytree.tree_flatten(value)
    hasher.update(str(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            flat = leaf.detach().cpu().contiguous()
            hasher.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
            hasher.update(
                flat.flatten().view(torch.uint8).numpy().tobytes() if flat.numel() else b""
            )
        elif isinstance(leaf, np.ndarray):
            hasher.update(
                f"{leaf.dtype}{leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes()
            )
        else:
            hasher.update(repr(leaf).encode())


def _inputs(batch: Batch) -> Tensor | tuple[()]:
    """The first tensor of a batch, sample by sample."""
    leaves, _ = torch.utils._pytree.tree_flatten(batch)
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), ())
