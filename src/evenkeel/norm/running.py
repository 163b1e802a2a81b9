"""The statistics of batches, and what layers remember of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenkeel.moments import Moments, processes
from evenkeel.norm.programs import batch_statistics


@dataclass(frozen=True, slots=True)
class Observed:
    """Statistics of a batch.

    Attributes:
        mean: of each part of the batch, (K, 1, C).
        var: of each part about ``mean``, or about the center that was asked for; biased.
        share: what one sample's moments count for in them.
        bessel: what makes the variance an unbiased one.
    """

    mean: Tensor
    var: Tensor
    share: float | Tensor
    bessel: float | Tensor


@torch.no_grad()
def observe(
    moments: Moments, *, parts: int = 1, center: Tensor | None = None, synchronize: bool = False
) -> Observed:
    """The statistics of a batch, or of the batches of all processes together."""
    samples = moments.mean.shape[0] // parts
    count = samples * moments.positions
    if not synchronize:
        mean, var = batch_statistics(moments, parts, center)
        return Observed(mean, var, 1 / max(samples, 1), count / max(count - 1, 1))
    mean, var = (t.view(-1) for t in batch_statistics(moments))
    means, variances, counts = processes.gathered(mean, var, count)
    total = counts.sum().clamp_min(1)
    mean = (counts * means).sum(0) / total
    about = mean if center is None else center
    var = (counts * (variances + (means - about).square())).sum(0) / total
    bessel = total / (total - 1).clamp_min(1)
    return Observed(mean.view(1, 1, -1), var.view(1, 1, -1), moments.positions / total, bessel)


def follow_(
    running: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor], rate: float | Tensor
) -> None:
    """Move running mean and variance toward those of now, where these are finite."""
    # A value that is not finite leaves no finite variance, nor does one too large for the buffer.
    finite = now[1].to(running[1].dtype).isfinite()
    for kept, seen in zip(running, now, strict=True):
        kept.lerp_(torch.where(finite, seen.to(kept.dtype), kept), rate)


@torch.no_grad()
def remember_(layer: Any, seen: Observed) -> None:
    """Take a training batch into a layer's running statistics, as batch norm does.

    They follow the average over parts of the mean and of the unbiased variance.
    """
    layer.num_batches_tracked.add_(1)
    tracked = layer.num_batches_tracked.to(seen.mean.dtype)
    rate = tracked.reciprocal() if layer.momentum is None else layer.momentum
    mean, var = (t.mean(0).view(-1) for t in (seen.mean, seen.var * seen.bessel))
    follow_((layer.running_mean, layer.running_var), (mean, var), rate)


def is_recomputation() -> bool:
    """Whether this forward is one that activation checkpointing repeats in backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
