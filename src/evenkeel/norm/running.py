"""The statistics of batches, and what layers remember of them."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evenkeel.errors import ConfigError
from evenkeel.moments import Moments, processes
from evenkeel.norm.programs import batch_statistics


@dataclass(frozen=True, slots=True)
class Observed:
    """Statistics of a batch.

    Attributes:
        mean: of each part of the batch, (K, 1, C).
        var: of each part about ``mean``, biased.
        share: what one sample's moments count for in them.
        bessel: what makes the variance an unbiased one.
    """

    mean: Tensor
    var: Tensor
    share: float | Tensor
    bessel: float | Tensor


@torch.no_grad()
def observe(moments: Moments, *, parts: int = 1, synchronize: bool = False) -> Observed:
    """The statistics of a batch, or of the batches of all processes together."""
    samples = moments.mean.shape[0] // parts
    count = samples * moments.positions
    if not synchronize:
        mean, var = batch_statistics(moments, parts)
        return Observed(mean, var, 1 / max(samples, 1), count / max(count - 1, 1))
    mean, var = (t.view(-1) for t in batch_statistics(moments))
    means, variances, counts = processes.gathered(mean, var, count)
    total = counts.sum().clamp_min(1)
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
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
def trail_(
    running: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor], rate: float
) -> tuple[Tensor, Tensor]:
    """Move running statistics toward those of each part (K, 1, C) in turn; where each left them.

    The mean follows the means; the variance, the mean squares about the mean of the part before.
    """
    mean, var = running
    means, variances = (seen.to(kept.dtype) for seen, kept in zip(now, running, strict=True))
    # As in follow_, and before the parts are taken: (a - b)^2 is finite where a^2 and b^2 are.
    rates = torch.addcmul(variances, means, means).isfinite().to(means.dtype) * rate
    trail = _solved(rates, means, mean)
    before = torch.cat([mean.view(1, 1, -1), trail[:-1]])
    away = means - before
    squares = torch.addcmul(variances, away, away)
    trails = trail, _solved(rates, squares, var)
    for kept, of in zip(running, trails, strict=True):
        kept.copy_(of[-1, 0])
    return trails


def _solved(rate: Tensor, now: Tensor, start: Tensor) -> Tensor:
    """x[k] = x[k - 1] + rate[k] (now[k] - x[k - 1]) for all k, in steps of 1, 2, 4, ... parts."""
    keep = 1 - rate
    x = torch.where(rate > 0, rate * now, 0)
    x = torch.cat([torch.addcmul(x[:1], keep[:1], start), x[1:]])
    step = 1
    while step < len(x):  # x and keep are now right for runs of so many parts
        x = torch.cat([x[:step], torch.addcmul(x[step:], keep[step:], x[:-step])])
        keep = torch.cat([keep[:step], keep[step:] * keep[:-step]])
        step *= 2
    return x


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


RECENT = 16
"""Batches that are remembered for their recomputation."""


class Recent:
    """What recent batches were normalized by, for activation checkpointing to repeat it.

    A batch is known by the means of its samples. Copies begin with none.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[Tensor, Any]] = deque(maxlen=RECENT)

    def add(self, mean: Tensor, what: Any) -> None:
        """Keep it; not when compiled, as a compiled graph recomputes by itself."""
        if not torch.compiler.is_compiling():
            self._kept.append((mean, what))

    def like(self, mean: Tensor, who: str) -> Any:
        """What was kept for the batch that is most like; None if there is none of its shape."""
        fitting = [
            (seen, what)
            for seen, what in self._kept
            if seen.shape == mean.shape and seen.device == mean.device
        ]
        if not fitting:
            return None
        distances = torch.stack([(seen - mean).abs().max() for seen, _ in fitting])
        nearest = int(distances.nan_to_num(torch.inf).argmin())
        if float(distances[nearest]) > 1e-3 * float(mean.abs().max()):
            raise ConfigError(
                f"{who} cannot recompute a batch that was followed by more than {RECENT} others: "
                f"it no longer knows what that was normalized by. Take gradients sooner, or use "
                f"statistics of the batch alone."
            )
        return fitting[nearest][1]

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    def __reduce__(self) -> Any:
        return Recent, ()
