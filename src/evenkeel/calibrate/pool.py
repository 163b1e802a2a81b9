"""Statistics for a whole family of noisy networks: one set that holds for every chip."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from evenkeel.batches import Forward, default_forward
from evenkeel.calibrate.collect import collect
from evenkeel.calibrate.estimate import pooled
from evenkeel.calibrate.statistics import normalizers_of, read, write
from evenkeel.errors import CalibrationError
from evenkeel.moments import BatchMoments


@torch.no_grad()
def pool_statistics_(
    model: nn.Module,
    noisy: Iterable[nn.Module],
    batches: Iterable[Any],
    *,
    forward: Forward = default_forward,
) -> nn.Module:
    """Give a network the statistics of many noisy copies of it, pooled.

    No copy in use needs any attention of its own afterwards: what is shared by all of them, a mean
    loss of gain or the bias that noise leaves behind a ReLU, is corrected; what differs from copy
    to copy is not, and it widens the variances.

    Args:
        model: the clean network; changed in place.
        noisy: copies of it on hardware, or simulations, made anew or one after the other.
        batches: unlabelled inputs, read once for each copy.
        forward: how to run a model on a batch.
    """
    targets = normalizers_of(model)
    batches = list(batches)
    moments: list[list[BatchMoments]] = [[] for _ in targets]
    for copy in noisy:
        own = list(normalizers_of(copy))  # a chip may name them with a prefix; the order is one
        if len(own) != len(targets):
            raise CalibrationError(
                f"Each noisy copy must have the network's own {len(targets)} normalizers; one has "
                f"{len(own)}."
            )
        collected = collect(copy, batches, forward=forward)
        for kept, path in zip(moments, own, strict=True):
            kept.extend(collected.get(path, []))
    if not any(moments):
        raise CalibrationError("pool_statistics_ needs at least one noisy copy; none came.")
    old = read(targets)
    write(targets, {p: pooled(old[p], m) for p, m in zip(targets, moments, strict=True) if m})
    return model
