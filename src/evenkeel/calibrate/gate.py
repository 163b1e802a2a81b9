"""The do-no-harm gate: samples that the fit has not seen decide whether it is kept."""

import math
from collections.abc import Iterable
from typing import Any

from evenkeel.batches import narrow, size
from evenkeel.calibrate.collect import LEAST, Collected
from evenkeel.layers import RunningStatistics
from evenkeel.moments import BatchMoments

HELD_OUT = 4
"""One sample in this many is kept from the fit for the gate."""


MARGIN = 0.3
"""Share by which one held-out sample must fit better; a number of samples divides it.

A few samples can fit better by chance. On the digits network, clean or under light noise, fits to 3
and 6 samples that did harm had bettered the misfit of 1 and 2 held-out ones by up to 25 and 11 %.
"""


def misfit(statistics: RunningStatistics, observed: list[BatchMoments]) -> float:
    r"""How far activations are from the statistics that a normalizer holds of them, in deviations.

    $$ \sqrt{\mathrm{mean}_c\, 2\,\mathrm{KL}_c}, \qquad
       2\,\mathrm{KL} = \frac{v + (m-\mu)^2}{\sigma^2} - 1 - \ln\frac{v}{\sigma^2} $$

    for observed moments $m, v$ and kept ones $\mu, \sigma^2$ of each channel, both taken as normal
    distributions. A pure shift of the mean by $d$ deviations gives $d$.
    """
    whole = BatchMoments.pool(observed)
    eps = max(float(getattr(statistics, "eps", 1e-5)), LEAST)
    kept = statistics.running_var.double() + eps
    ratio = (whole.var + eps) / kept
    shift2 = (whole.mean - statistics.running_mean.double()).square() / kept
    return math.sqrt(float((ratio + shift2 - 1 - ratio.log()).clamp_min(0).mean()))


def misfits(normalizers: dict[str, RunningStatistics], observed: Collected) -> dict[str, float]:
    """The misfit of every normalizer that was reached."""
    return {path: misfit(normalizers[path], moments) for path, moments in observed.items()}


def split(batches: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Batches for the fit and batches for the gate: every fourth, or a fourth of a single one."""
    every = list(batches)
    if len(every) >= HELD_OUT:
        held = every[HELD_OUT - 1 :: HELD_OUT]
        return [b for i, b in enumerate(every) if i % HELD_OUT != HELD_OUT - 1], held
    fit, held = [], []
    for batch in every:
        samples = size(batch)
        cut = samples - max(1, samples // HELD_OUT) if samples > 1 else samples
        fit.append(narrow(batch, 0, cut))
        if cut < samples:
            held.append(narrow(batch, cut, samples))
    return fit, held


def verdict(
    before: dict[str, float], after: dict[str, float], *, held_out: int
) -> tuple[bool, str]:
    """Whether new statistics are kept, and why, from the misfits of each normalizer."""
    if held_out == 0:
        return False, "Not kept: the gate needs at least 2 samples, one to fit and one to judge by."
    was, now = (sum(shifts.values()) / len(shifts) for shifts in (before, after))
    figures = f"{was:.3f} before, {now:.3f} after, on {held_out} held-out samples"
    if now < was * (1 - MARGIN / held_out):
        return True, f"Kept: the mean shift is {figures}."
    return False, (
        f"Not kept: the mean shift would hardly fall ({figures}). The old statistics fit about as "
        f"well; more samples may tell more."
    )
