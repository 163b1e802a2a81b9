"""calibrate_: re-align normalizers with the hardware they run on, and the certificate of it."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.batches import Forward, default_forward, size
from evenkeel.calibrate.collect import collect
from evenkeel.calibrate.estimate import ESTIMATORS, Shrinkage, shrink
from evenkeel.calibrate.gate import HELD_OUT, misfits, split, verdict
from evenkeel.calibrate.match import OutputMatch
from evenkeel.calibrate.statistics import (
    Statistics,
    in_eval,
    normalizers_of,
    read,
    tell_trackers,
    uncompiled,
    write,
)
from evenkeel.errors import ConfigError, nearest
from evenkeel.layers import RunningStatistics
from evenkeel.moments import BatchMoments


@dataclass
class Calibration:
    """The certificate of :func:`calibrate_`: what was fitted, how it was judged, and the way back.

    Attributes:
        kept: whether the network now has the new statistics.
        reason: why, in a sentence.
        shift_before: by normalizer, how far the activations of held-out samples were from the old
            statistics, in standard deviations (see :func:`evenkeel.calibrate.gate.misfit`).
        shift_after: the same with the new ones.
        samples: number of samples that the statistics were fitted to.
        methods: by normalizer, "statistics" for one of the network's own, "output matching" for one
            that :func:`match_` has put behind a layer.
        key: what the statistics belong to, such as chip and age, as given.
    """

    kept: bool
    reason: str
    shift_before: dict[str, float]
    shift_after: dict[str, float]
    samples: int
    methods: dict[str, str]
    key: Mapping[str, str | int | float]
    _normalizers: dict[str, RunningStatistics] = field(repr=False)
    _old: dict[str, Statistics] = field(repr=False)
    _new: dict[str, Statistics] = field(repr=False)

    def undo(self) -> None:
        """Put the old statistics back, bit for bit."""
        write(self._normalizers, self._old)
        tell_trackers(self._normalizers, trusted=False)

    def state_dict(self) -> dict[str, Tensor]:
        """The statistics in use: the new ones if kept, else the old.

        Named as in the model: ``load_state_dict(..., strict=False)``.
        """
        return {
            f"{path}.{name}": value.clone()
            for path, values in (self._new if self.kept else self._old).items()
            for name, value in zip(("running_mean", "running_var"), values, strict=True)
        }

    def to_dict(self) -> dict[str, Any]:
        """All but the statistics themselves, for JSON."""
        return {
            "kept": self.kept,
            "reason": self.reason,
            "samples": self.samples,
            "methods": self.methods,
            "shift_before": self.shift_before,
            "shift_after": self.shift_after,
            "key": dict(self.key),
        }

    def table(self) -> str:
        """A row per normalizer: shift before and after, in standard deviations, and the method."""
        width = max(map(len, self.shift_before))
        rows = [f"{'normalizer':<{width}}  before   after  method"]
        rows += [
            f"{path:<{width}}  {before:6.3f}  {self.shift_after[path]:6.3f}  {self.methods[path]}"
            for path, before in self.shift_before.items()
        ]
        return "\n".join([*rows, self.reason])


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: str = "pooled",
    shrinkage: Shrinkage = "auto",
    gate: bool = True,
    layers: Collection[str] | None = None,
    reads: int = 1,
    forward: Forward = default_forward,
    key: Mapping[str, str | int | float] | None = None,
) -> Calibration:
    r"""Fit a network's normalization statistics to the hardware it runs on, in place.

    Noise in the weights shifts and stretches the distributions of activations; normalizers still
    hold the statistics of the clean network. This measures them anew on the noisy one, with a few
    unlabelled inputs, no gradients and no model of the noise: the network may be a simulated chip,
    another simulator's model, or a module that drives a real chip. Only normalizers with running
    statistics change; nothing leaves eval mode.

    Use when batch norm follows the noisy layers, or :func:`match_` has put something behind them
    that can be fitted. Not when inputs at hand are of one class or another domain than in use.

    Args:
        model: changed in place, or left as it was if anything fails.
        batches: inputs like those in use: tensors, mappings of arguments, or tuples whose first
            item is the input (labels are ignored).
        estimator: "pooled", "mean" (of the batches) or "adabs" (the rule of Joshi et al.).
        shrinkage: pull toward the old statistics where the sample is small: "auto" by measured
            sampling error, a number for their worth in samples, or None.
        gate: hold a fourth of the samples back and keep the new statistics only if these samples'
            activations fit them better than the old ones.
        layers: paths or patterns of the normalizers to fit; default: all.
        reads: how often each batch is run. More than once pays where few inputs are at hand and
            noise is drawn anew at every read, so that one read tells little of the others.
        forward: how to run the model on a batch.
        key: what the statistics are for, such as ``{"chip": 7, "age_s": 3600}``; kept with them.

    Returns:
        The certificate: kept or not and why, shifts before and after, ``undo()``.

    Raises:
        CalibrationError: no normalizer to calibrate, no batches, or activations not finite.

    Examples:
        >>> import torch, evenkeel as ek
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> images = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> chip = ek.analog.program(net, ek.analog.Gain(0.5), seed=0)
        >>> ek.calibrate_(chip, images.split(64)).kept
        True

    References:
        Tsai et al., "Robust Processing-In-Memory Neural Networks via Noise-Aware Normalization",
        arXiv 2007.03230 (idea, as told in its abstracts); Joshi et al., Nature Communications 11,
        2473 (2020) (AdaBS). Shrinkage and gate are evenkeel's.
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(f"Unknown estimator {estimator!r}. {nearest(estimator, ESTIMATORS)}")
    if (isinstance(shrinkage, str) and shrinkage != "auto") or (
        isinstance(shrinkage, int | float) and not 0 <= shrinkage < math.inf
    ):
        raise ConfigError(
            f"shrinkage must be 'auto', a number of samples (0 or more) or None; got {shrinkage!r}."
        )
    model = uncompiled(model)
    normalizers = normalizers_of(model, layers)
    options: dict[str, Any] = {"layers": layers, "reads": reads, "forward": forward}
    fit, held = split(batches) if gate else (list(batches), [])
    measured = collect(model, fit, **options)
    old = read(normalizers)
    new = {
        path: _fitted(old[path], moments, estimator, shrinkage)
        for path, moments in measured.items()
    }
    judged = held or fit[: 1 + len(fit) // HELD_OUT]
    before = misfits(normalizers, collect(model, judged, normalize_by="running", **options))
    with in_eval(model, normalizers):
        write(normalizers, new)
        after = misfits(normalizers, collect(model, judged, normalize_by="running", **options))
    if gate:
        kept, reason = verdict(before, after, held_out=sum(size(batch) for batch in held))
    else:
        kept, reason = True, "Kept without a gate."
    if kept:
        write(normalizers, new)
        tell_trackers(normalizers, trusted=True)
    samples = max(sum(m.samples for m in moments) for moments in measured.values())
    methods = {
        path: "output matching" if isinstance(normalizers[path], OutputMatch) else "statistics"
        for path in measured
    }
    return Calibration(
        kept, reason, before, after, samples, methods, key or {}, normalizers, old, new
    )


def _fitted(
    old: Statistics, moments: list[BatchMoments], estimator: str, shrinkage: Shrinkage
) -> Statistics:
    before = Statistics(old.mean.double(), old.var.double())
    after = ESTIMATORS[estimator](before, moments)
    if estimator == "adabs":
        return after  # the rule as published has its own memory of the old statistics
    return shrink(before, after, moments, shrinkage)
