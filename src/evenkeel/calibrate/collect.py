"""Measuring the activations that reach each normalizer, with the network left in eval mode.

The usual way, torch's ``update_bn``, calls ``model.train()``: dropout wakes up, simulators of
analog hardware turn their drift compensation off and move their converter ranges, and statistics
are gathered of a network that will never be deployed. Here nothing changes mode. Each normalizer's
input is measured by a hook just before it is normalized; where the network is to run on its own
batch statistics meanwhile, they are written where the normalizer will read them.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.batches import Forward, default_forward, size
from evenkeel.calibrate.statistics import in_eval, normalizers_of, uncompiled
from evenkeel.errors import CalibrationError, ConfigError
from evenkeel.moments import BatchMoments

Collected = dict[str, list[BatchMoments]]
LEAST = torch.finfo(torch.float32).tiny
"""Of a variance: a normalizer without eps then gives 0 for a constant channel, and not NaN."""


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    normalize_by: str = "batch",
    layers: Collection[str] | None = None,
    reads: int = 1,
    forward: Forward = default_forward,
) -> Collected:
    """Moments of what reaches each normalizer, one entry for each batch, or use of the layer in it.

    The network is in eval mode throughout; modes and statistics are left exactly as they were.

    Args:
        model: any network; nothing is assumed of where its noise comes from.
        batches: unlabelled inputs, or what ``forward`` takes.
        normalize_by: "batch": each batch is normalized by its own statistics, so that a layer's
            input is already re-aligned by the layers before it. "running": by the present ones, as
            deployed.
        layers: paths or patterns of the normalizers to measure; default: all.
        reads: how often each batch is run. Where noise is drawn anew at every read, the moments of
            an entry are those over all of its reads.
        forward: how to run the model on a batch.

    Raises:
        CalibrationError: no normalizer with running statistics, no batch, or activations that are
            not finite.
    """
    if not isinstance(reads, int) or reads < 1:
        raise ConfigError(f"reads must be a whole number, 1 or more; got {reads!r}.")
    model = uncompiled(model)
    found = normalizers_of(model, layers)
    whole = False
    collected: Collected = {path: [] for path in found}
    current: Collected = {path: [] for path in found}

    def measure(path: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            if len(args[0]) == 0 and whole:  # a head in whose images nothing was found
                return
            moments = measured(args[0], path, getattr(module, "channel_dim", 1))
            current[path].append(moments)
            if normalize_by == "batch":
                module.running_mean.copy_(moments.mean)
                module.running_var.copy_(moments.var.clamp_min(LEAST))

        return hook

    with in_eval(model, found), contextlib.ExitStack() as hooks:
        for path, normalizer in found.items():
            assert isinstance(normalizer, nn.Module)
            hooks.callback(normalizer.register_forward_pre_hook(measure(path)).remove)
        for batch in batches:
            whole = size(batch) > 0
            for _ in range(reads):
                forward(model, batch)
            for path, seen in current.items():
                calls = len(seen) // reads or len(seen)
                collected[path] += [BatchMoments.repeat(seen[k::calls]) for k in range(calls)]
                seen.clear()
    if not any(collected.values()):
        raise CalibrationError(
            "calibrate_ needs at least one batch that reaches a normalizer; none came. Check that "
            "the batches are not empty or used up: a generator can be read only once."
        )
    return {path: moments for path, moments in collected.items() if moments}


def measured(
    x: Tensor, path: str, channel_dim: int = 1, *, who: str = "calibrate_"
) -> BatchMoments:
    """Moments of the activations at a module; an error where they cannot be used."""
    if x.dim() < 2 or x.numel() == 0:
        raise CalibrationError(
            f"{who} needs batches of shape (N, C, *spatial) with N of 1 or more; what reaches "
            f"'{path}' has shape {tuple(x.shape)}."
        )
    moments = BatchMoments.of(x.movedim(channel_dim, 1))
    if not bool(
        torch.isfinite(moments.var).all()
    ):  # one bad element makes its channel's moments bad
        raise CalibrationError(
            f"{who} needs finite activations; what reaches '{path}' holds NaN or infinity. "
            f"Check the calibration data and the network's weights."
        )
    return moments
