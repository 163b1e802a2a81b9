"""Hardening by noise injection: the noise-specific method that calibration is compared with."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from evenkeel.analog.harden import InjectedNoise
from evenkeel.audit.names import resolve
from evenkeel.data.dataset import fingerprint
from evenkeel.data.sets import sha256
from evenkeel.layers import weight_layer
from evenkeel.saving import describe, load, save
from evenkeel.studies.frame import Desk
from evenkeel.train import crop_and_flip, fit

CLIP = 2.5
"""Standard deviations to which weights are clipped meanwhile (Joshi et al.: 2.0 to 2.5)."""
RATE = 0.05
"""Peak learning rate of the fine-tuning."""


def hardened_network(desk: Desk, plain: Path, on: str, epochs: int) -> tuple[Path, float]:
    """Fine-tune a network under the noise of a Gaussian device; its file and the minutes it took.

    Resumable: a finished one is found again, a killed one goes on after its last epoch.
    """
    made_of = fingerprint([sha256(plain), on, epochs, CLIP, RATE])
    name = f"{plain.stem}_hardened_{made_of[:12]}"
    path = desk.cache / f"{name}.safetensors"
    if not path.exists():
        x, y = desk.training_data()
        seconds: list[float] = []
        network = fit(
            lambda: _noisy(plain, resolve("devices", on).level),
            x,
            y,
            epochs=epochs,
            batch_size=128,
            learning_rate=RATE,
            augment=crop_and_flip if x.shape[1] == 3 else lambda x: x,
            checkpoint=desk.cache / f"{name}.checkpoint",
            on_step=lambda done, total: desk.progress("hardening", done, total),
            on_epoch=lambda epoch: seconds.append(epoch["seconds"]),
        )
        for module in network.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        save(network, path, minutes=sum(seconds) / 60, on=on)
    return path, float(describe(path)["about"]["minutes"])


def _noisy(plain: Path, level: float) -> nn.Module:
    network: nn.Module = load(plain)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for path, module in list(network.named_modules()):
        if weight_layer(module) is not None:
            noise = InjectedNoise(level, CLIP, seed=0, path=path)
            parametrize.register_parametrization(module, "weight", noise)
    return network
