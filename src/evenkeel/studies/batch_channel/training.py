"""One training run: a network with a normalizer, its error after every epoch, its dead units."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.batches import first
from evenkeel.draws import Draws
from evenkeel.models import build
from evenkeel.norm import BatchChannelNorm2d, singularity
from evenkeel.studies.training import train

WATCHED = 500
"""Test samples that dead units are counted on."""


def trained(
    data: str,
    root: Path | None,
    cache: Path,
    architecture: str,
    norm: str,
    weight_standard: bool,
    normalization_batch: int | None,
    seed: int,
    epochs: int,
    samples: int,
    batch_size: int,
    learning_rate: float,
    precision: str,
    watched: bool,
    update_rate: float | None = None,
    displaced: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Train on the first so many samples; error in percent after each epoch, on all test samples.

    A killed run goes on after its last epoch. ``update_rate`` is for the layers that have one.
    ``displaced`` are the deviations of fixed shifts and log scales that every batch norm's output
    gets before its affine parameters.
    """
    settings = {k: v for k, v in locals().items() if k not in ("root", "cache")}

    def make() -> nn.Module:
        network = build(
            architecture,
            norm=norm,
            normalization_batch=normalization_batch,
            weight_standard=weight_standard,
        )
        for layer in network.modules():
            if isinstance(layer, BatchChannelNorm2d) and update_rate is not None:
                layer.update_rate = update_rate
        if displaced is not None:
            displace_(network, *displaced, seed=seed)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def watch(network: nn.Module, epoch: int, test: Any, device: torch.device) -> dict[str, Any]:
        seen = [x.to(device) for x, _ in first(test, WATCHED)]
        found = singularity(network, seen).to_dict()
        return {"dead": found["dead"], "layers": found["rows"]}

    watching = {"watch": watch} if watched else {}
    augment = data != "digits"
    return train(
        "batch_channel", make, settings, root=root, cache=cache, augment=augment, **watching
    )


class Displaced(nn.Module):
    r"""A batch norm held away from its own point: $y = \gamma(e^{s_c}\hat x + m_c) + \beta$.

    $m_c \sim N(0, \sigma_m)$ and $s_c \sim N(0, \sigma_s)$ are drawn once for each channel.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, norm: nn.BatchNorm2d, means: float, scales: float, draws: Draws) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(norm.num_features, affine=False)
        self.weight, self.bias = norm.weight, norm.bias
        shape = (norm.num_features, 1, 1)
        self.register_buffer("shift", means * draws.normal("shift", shape))
        self.register_buffer("scale", (scales * draws.normal("scale", shape)).exp())

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        y: Tensor = self.norm(x) * self.scale + self.shift
        return y * self.weight[:, None, None] + self.bias[:, None, None]


def displace_(network: nn.Module, means: float, scales: float, *, seed: int) -> None:
    """Hold every batch norm of a network away from its point."""
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            network.set_submodule(path, Displaced(module, means, scales, Draws(seed, path)))
