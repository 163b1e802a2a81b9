"""What studies measure networks by."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def error(network: nn.Module, batches: Any, device: torch.device) -> float:
    """Percent wrong; a network that has left the numbers is wrong on all."""
    wrong, total = 0, 0
    for x, y in batches:
        scores = network(x.to(device)).cpu()
        right = (scores.argmax(1) == y) & scores.isfinite().all(1)
        wrong, total = wrong + int((~right).sum()), total + len(y)
    return 100 * wrong / total


def interval(values: Sequence[float]) -> str:
    """Mean, and half the 95 % interval of it by Student's t; a dash for none."""
    if not values:
        return "–"
    if len(values) < 2:
        return f"{values[0]:.2f}"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.2f} ± {half:.2f}"
