"""One training run, with priors or without."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import evenkeel as ek
from evenkeel.models import build
from evenkeel.studies.frame import Facts, load_training_data
from evenkeel.studies.kalman.estimates import distances
from evenkeel.studies.training import train


def trained(
    data: str,
    root: Path | None,
    cache: Path,
    architecture: str,
    norm: str,
    kalman: Facts | None,
    normalization_batch: int | None,
    seed: int,
    epochs: int,
    samples: int,
    batch_size: int,
    learning_rate: float,
    precision: str,
    watched: Facts | None = None,
) -> dict[str, Any]:
    """Error in percent after each epoch.

    ``kalman`` are the options of :func:`evenkeel.norm.kalmanize`; None for none. ``watched`` are
    those of :func:`distances`, with the ``epochs`` after which they are taken, 0 for before all.
    """
    settings = {k: v for k, v in locals().items() if k not in ("root", "cache")}
    x, _ = load_training_data(data, root)

    def make() -> nn.Module:
        size = normalization_batch if kalman is None else None
        network = build(architecture, norm=norm, normalization_batch=size)
        if kalman is not None:
            network = ek.norm.kalmanize(
                network, x[:1], normalization_batch=normalization_batch, **kalman
            )
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def watch(network: nn.Module, epoch: int, test: Any, device: torch.device) -> Facts:
        if watched is None or epoch not in watched["epochs"]:
            return {}
        return {"distances": distances(network, x[samples:].to(device), **how)}

    how = {k: v for k, v in (watched or {}).items() if k != "epochs"}
    done = train(
        "kalman", make, settings, root=root, cache=cache, augment=data != "digits", watch=watch
    )
    if watched is not None and 0 in watched["epochs"]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            done["distances"] = distances(make(), x[samples:], **how)
    return done
