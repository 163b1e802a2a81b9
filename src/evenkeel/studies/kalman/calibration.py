"""Whether a prediction helps to calibrate a chip by a handful of images.

An experiment. From the weights that a chip has come to hold, the moments of every layer are
predicted, and likewise from those that were meant; what the two differ by is put on the statistics
that the network keeps. Calibration then starts from there.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import evenkeel as ek
from evenkeel.analog import Gaussian
from evenkeel.audit.run import evaluate
from evenkeel.audit.tasks import Classify
from evenkeel.layers import running_normalizers
from evenkeel.studies.frame import load_data, load_network

DEAD = 1e-12
"""Variance below which a channel is left as it is: nothing comes to it."""
WAYS = ("none", "calibrate", "predicted", "predicted+calibrate")


def few_images(
    network: Path,
    data: str,
    root: Path | None,
    level: float,
    chip: int,
    images: int,
    test_samples: int,
) -> dict[str, Any]:
    """Accuracy in percent of one chip, by what was done with so many unlabelled images."""
    model, samples = load_network(network), load_data(data, root).limited(test=test_samples)
    few = torch.cat([batch[0] for batch in samples.calibration])[:images]
    task, accuracy = Classify(), {}
    for way in WAYS:
        programmed = ek.analog.program(model, Gaussian(level), seed=chip)
        if "predicted" in way:
            predict_(programmed, model, few)
        if "calibrate" in way:
            ek.calibrate_(programmed, few.split(64))
        accuracy[way] = task.value(evaluate(programmed, samples, task))
    return {"level": level, "chip": chip, "images": images, "accuracy": accuracy}


@torch.no_grad()
def predict_(chip: ek.analog.Chip, model: nn.Module, x: Tensor) -> None:
    """Shift a chip's statistics by what the weights that it holds are predicted to change."""
    noisy = copy.deepcopy(model)
    for path, array in chip.arrays():
        noisy.get_submodule(path).weight.copy_(array.weight)  # type: ignore[operator]
    before, after = _predicted(model, x), _predicted(noisy, x)
    for path, normalizer in running_normalizers(chip.model):
        (mean, var), (new_mean, new_var) = before[path], after[path]
        live = (var > DEAD) & (new_var > DEAD)
        size = (normalizer.running_var / var).sqrt()  # of the network's deviation to that predicted
        normalizer.running_mean += torch.where(live, size * (new_mean - mean), 0)
        normalizer.running_var *= torch.where(live, new_var / var, 1)


def _predicted(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By normalizer, its prior where it has one, and the moments of ``x`` where it has not."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hear(path: str, prior: Any, fused: Any, observed: Any) -> None:
        found[path] = tuple(t[0] for t in prior or observed)

    kalman = ek.norm.kalmanize(model, x[:1], propagate="normalized").train()
    kalman.listen(hear)
    kalman(x)
    return found
