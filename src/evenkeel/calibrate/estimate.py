"""From the moments of batches to the statistics that a normalizer should keep."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from evenkeel.calibrate.statistics import Statistics
from evenkeel.moments import BatchMoments

Estimator = Callable[[Statistics, list[BatchMoments]], Statistics]


def pooled(old: Statistics, batches: list[BatchMoments]) -> Statistics:
    """Mean and variance of all elements together.

    Batches of any size are weighted rightly, and what the means of the batches differ by counts as
    variance: with noise that is new at every read, that is the noise that will be met.
    """
    whole = BatchMoments.pool(batches)
    return Statistics(whole.mean, whole.unbiased_var)


def mean_of_batches(old: Statistics, batches: list[BatchMoments]) -> Statistics:
    """Plain average of the batches' means and variances, as most other tools do it."""
    return Statistics(
        torch.stack([b.mean for b in batches]).mean(0),
        torch.stack([b.unbiased_var for b in batches]).mean(0),
    )


ADABS_RESIDUE = 0.015
"""Share of the old statistics that the rule of Joshi et al. leaves, however many batches."""


def adabs(old: Statistics, batches: list[BatchMoments]) -> Statistics:
    r"""The exponential rule of Joshi et al.: $s \leftarrow p\,s + (1-p)\,s_i$, $p = 0.015^{1/n}$.

    Its published budgets are 13 batches of 200 images on CIFAR-10 and 1,300 images on ImageNet.
    """
    p = ADABS_RESIDUE ** (1 / len(batches))
    mean, var = old
    for b in batches:
        mean, var = p * mean + (1 - p) * b.mean, p * var + (1 - p) * b.unbiased_var
    return Statistics(mean, var)


ESTIMATORS: dict[str, Estimator] = {"pooled": pooled, "mean": mean_of_batches, "adabs": adabs}

Shrinkage = Literal["auto"] | float | None


def shrink(
    old: Statistics, new: Statistics, batches: list[BatchMoments], shrinkage: Shrinkage
) -> Statistics:
    r"""Pull estimates toward the old statistics as far as the sample is too small to trust them.

    A statistic known from an effective sample of $N$ and expected to have moved by $\tau$ standard
    deviations deserves the weight $w = N/(N + 1/\tau^2)$. With ``"auto"``, $N$ is measured for each
    channel from how much the samples differ from each other, and $\tau^2$ for each layer from how
    much more its channels moved than their sampling error explains (empirical Bayes). A layer that
    has not moved keeps its statistics, one that has moved far takes the new ones. With a number,
    it is the worth of the old statistics in samples: $w = n/(n + \text{shrinkage})$.

    Means shift linearly; variances on the logarithmic scale, as they are scales.
    """
    if shrinkage is None:
        return new
    if shrinkage != "auto":
        samples = sum(b.samples for b in batches)
        weight = torch.full_like(new.mean, samples / (samples + shrinkage))
        return _blend(old, new, weight, weight)
    whole = BatchMoments.pool(batches)
    if whole.samples < 2:
        return old  # one sample says nothing of its own error
    per = whole.samples * (whole.samples - 1)
    var_error = whole.var_spread / per / whole.var.clamp_min(TINY).square()
    stretch = (new.var.clamp_min(TINY) / old.var.clamp_min(TINY)).log()
    common = stretch.mean()
    common = common * _trust(common, var_error.mean())
    prior = Statistics(old.mean * (common / 2).exp(), old.var * common.exp())
    mean_error = whole.mean_spread / per / prior.var.clamp_min(TINY)
    shift = (new.mean - prior.mean) / prior.var.clamp_min(TINY).sqrt()
    return _blend(prior, new, _trust(shift, mean_error), _trust(stretch - common, var_error))


TINY = torch.finfo(torch.float32).tiny


def _blend(old: Statistics, new: Statistics, mean_weight: Tensor, var_weight: Tensor) -> Statistics:
    """The way from old to new, means linearly, variances (which are scales) by their logarithm."""
    stretch = (new.var.clamp_min(TINY) / old.var.clamp_min(TINY)).log()
    return Statistics(
        old.mean + mean_weight * (new.mean - old.mean),
        torch.where(old.var > 0, old.var * (var_weight * stretch).exp(), new.var),
    )


def _trust(moved: Tensor, error: Tensor) -> Tensor:
    """Weight of the new values: expected over expected plus sampling variance of their moves."""
    prior = (moved.square() - error).mean().clamp_min(0)
    total = prior + error
    return torch.where(total > 0, prior / total.clamp_min(TINY), 0.0)
