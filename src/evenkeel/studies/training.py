"""Training runs of studies: one network, its error after every epoch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenkeel.data.dataset import fingerprint
from evenkeel.studies.frame import Facts, load_data, load_training_data
from evenkeel.studies.measures import error
from evenkeel.train import crop_and_flip, fit, launched

Watch = Callable[[nn.Module, int, Any, torch.device], Facts]
"""From the network, the epoch, batches of test samples and the device to what is told of it."""


def train(
    study: str,
    make: Callable[[], nn.Module],
    settings: Facts,
    *,
    root: Path | None,
    cache: Path,
    augment: bool,
    watch: Watch = lambda network, epoch, test, device: {},
    **options: Any,
) -> Facts:
    """Train by a run's settings on the first so many samples; its settings and epochs.

    Each epoch tells the error in percent on all test samples, and what ``watch`` sees. A killed run
    goes on after its last epoch; ``options`` are those of :func:`evenkeel.train.fit`.
    """
    known: list[Facts] = []
    x, y = load_training_data(settings["data"], root)
    test = load_data(settings["data"], root).test
    fabric = launched(settings["precision"], who=f"evenkeel study {study}", devices=1)

    def watched(network: nn.Module) -> Facts:
        with fabric.autocast():
            facts = {"error": error(network, test, fabric.device)}
        return facts | watch(network, len(known) + 1, test, fabric.device)

    checkpoint = cache / f"{fingerprint([json.dumps(settings)])}.checkpoint"
    fit(
        make,
        x[: settings["samples"]],
        y[: settings["samples"]],
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        augment=crop_and_flip if augment else lambda x: x,
        seed=settings["seed"],
        fabric=fabric,
        checkpoint=checkpoint,
        identity=settings,
        on_epoch=known.append,
        watch=watched,
        **options,
    )
    checkpoint.unlink(missing_ok=True)
    return settings | {"epochs": known}
