"""Classes of the positions of a map: those on one axis that are alike are worked out once."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
Axis = tuple[int, ...]
"""The class of each position on one axis: 0, 1, ... in the order in which they appear."""
OUTSIDE = -1
"""The class of zeros around."""


def spread(axes: Sequence[Axis], sizes: Sequence[int]) -> tuple[Axis, ...]:
    """Axes of one position over all."""
    return tuple(a * size if len(a) == 1 else a for a, size in zip(axes, sizes, strict=True))


def once(make: Callable[P, T]) -> Callable[P, T]:
    """Made once for all forwards, outside of inference mode, whose tensors know no gradient."""

    @functools.lru_cache(maxsize=1024)
    def cached(*args: Any) -> T:
        with torch.inference_mode(False):
            return make(*args)  # type: ignore[call-arg]

    @functools.wraps(make)
    def made(*args: Any) -> T:  # compilers do not like a cache
        return (make if torch.compiler.is_compiling() else cached)(*args)  # type: ignore[call-arg]

    return made  # type: ignore[return-value]


@once
def windows(
    axis: Axis, taps: int, stride: int, padding: tuple[int, int], dilation: int
) -> tuple[Axis, tuple[Axis, ...]]:
    """Classes of the outputs; for each, the classes that its taps read."""
    padded = (OUTSIDE,) * padding[0] + axis + (OUTSIDE,) * padding[1]
    reach = dilation * (taps - 1) + 1
    starts = range(0, len(padded) - reach + 1, stride)
    return distinct([padded[start : start + reach : dilation] for start in starts])


def distinct(seen: Sequence[Axis]) -> tuple[Axis, tuple[Axis, ...]]:
    """Number the distinct ones; which number each has, and the distinct ones themselves."""
    numbers = {what: number for number, what in enumerate(dict.fromkeys(seen))}
    return tuple(numbers[what] for what in seen), tuple(numbers)


@once
def inside(
    windows: tuple[tuple[Axis, ...], ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(taps, classes) of all axes together: 1 where a tap of an output is not outside."""
    taps = itertools.product(*(range(len(axis[0])) for axis in windows))
    outputs = list(itertools.product(*windows))
    rows = [
        [float(all(w[t] != OUTSIDE for w, t in zip(of, tap, strict=True))) for of in outputs]
        for tap in taps
    ]
    return torch.tensor(rows, device=device, dtype=dtype)


@once
def counts(
    classes: int, windows: tuple[Axis, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(classes in, classes out): how many of an output's taps read a class."""
    rows = [[window.count(k) for window in windows] for k in range(classes)]
    return torch.tensor(rows, device=device, dtype=dtype)


@once
def shares(axes: tuple[Axis, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """What part of the positions each class has, over all axes together."""
    parts = [[axis.count(k) / len(axis) for k in range(max(axis) + 1)] for axis in axes]
    shares = [math.prod(of) for of in itertools.product(*parts)]
    return torch.tensor(shares, device=device, dtype=dtype)


@once
def index(axis: Axis, device: torch.device) -> Tensor:
    """Classes as a tensor to select by."""
    return torch.tensor(axis, device=device)
