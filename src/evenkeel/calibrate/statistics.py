"""The statistics that normalizers keep: read them, write them, put them back."""

import contextlib
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evenkeel.errors import CalibrationError
from evenkeel.layers import RunningStatistics, chosen_paths, running_normalizers


class Statistics(NamedTuple):
    """What a normalizer keeps: mean and (unbiased) variance per channel, (C,) each."""

    mean: Tensor
    var: Tensor


def uncompiled(model: nn.Module) -> nn.Module:
    """The network inside torch.compile's wrapper: compiled code does not see hooks set later."""
    return getattr(model, "_orig_mod", model)


def missing_normalizers(model: nn.Module) -> str | None:
    """What a network without normalizers that keep running statistics lacks; None for others."""
    if next(running_normalizers(model), None) is not None:
        return None
    kinds = sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__})
    return (
        f"Calibration needs normalizers that keep running statistics (running_mean and "
        f"running_var); {type(model).__name__} has none"
        + (f", only {', '.join(kinds)}" if kinds else "")
        + ". Before the network is programmed, ek.calibrate.match_(model, batches) puts behind its "
        "layers what calibration needs (the remedy 'match'). If batch norm was folded into the "
        "weights, calibrate before folding."
    )


def normalizers_of(
    model: nn.Module, layers: Collection[str] | None = None
) -> dict[str, RunningStatistics]:
    """The network's normalizers with running statistics, or those named; an error where none is."""
    if missing := missing_normalizers(model):
        raise CalibrationError(missing)
    every = dict(running_normalizers(model))
    if layers is None:
        return every
    chosen = chosen_paths(layers, list(every))
    return {path: normalizer for path, normalizer in every.items() if path in chosen}


def read(normalizers: dict[str, RunningStatistics]) -> dict[str, Statistics]:
    """Copies of the statistics, in the buffers' own dtype."""
    return {
        path: Statistics(n.running_mean.clone(), n.running_var.clone())
        for path, n in normalizers.items()
    }


@torch.no_grad()
def write(normalizers: dict[str, RunningStatistics], statistics: dict[str, Statistics]) -> None:
    """Set the statistics of the normalizers named."""
    for path, (mean, var) in statistics.items():
        normalizers[path].running_mean.copy_(mean)
        normalizers[path].running_var.copy_(var)


def tell_trackers(normalizers: dict[str, RunningStatistics], *, trusted: bool) -> None:
    """Let those that track what they serve know that their statistics were set from outside."""
    for normalizer in normalizers.values():
        if hasattr(normalizer, "forget_window_"):
            normalizer.forget_window_(warm=trusted)


@contextlib.contextmanager
def in_eval(model: nn.Module, normalizers: dict[str, RunningStatistics]) -> Iterator[None]:
    """Eval mode for a while, in which no normalizer tracks what it is served.

    Modes and statistics are put back, whatever happens inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    tracking = [(module, module.tracking) for module in model.modules() if _tracks(module)]
    statistics = read(normalizers)
    model.eval()
    for module, _ in tracking:
        module.tracking = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, track in tracking:
            module.tracking = track
        write(normalizers, statistics)


def _tracks(module: nn.Module) -> bool:
    return isinstance(getattr(module, "tracking", None), bool)
