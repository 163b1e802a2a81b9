"""One training run of a fully connected or a residual network, balanced after each step or not."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import evenkeel as ek
from evenkeel.errors import ConfigError
from evenkeel.models import build
from evenkeel.models.resnet import ResidualBlock
from evenkeel.studies.equi_norm.networks import fully_connected
from evenkeel.studies.frame import load_training_data
from evenkeel.studies.training import train


def trained(
    data: str,
    root: Path | None,
    cache: Path,
    network: dict[str, Any],
    norm: str,
    depth_factor: float | None,
    seed: int,
    epochs: int,
    samples: int,
    batch_size: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    augment: bool,
    precision: str,
) -> dict[str, Any]:
    """Train; error in percent after each epoch, on all test samples.

    ``network`` holds either ``intermediate`` and ``width``, or the ``name`` of an architecture.
    ``depth_factor`` is that of the balancing after each step; None for none. A killed run goes on
    after its last epoch. One that leaves the numbers is wrong on all that follows.
    """
    settings = {k: v for k, v in locals().items() if k not in ("root", "cache")}
    x, _ = load_training_data(data, root)

    def make() -> nn.Module:
        if "name" in network:
            made = build(network["name"], norm=norm)
            if norm == "none":
                open_branches_(made)
            return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
        inputs = math.prod(x.shape[1:])
        return fully_connected(network["intermediate"], network["width"], inputs, norm)

    def optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            model.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay
        )

    def balancing(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        if depth_factor is None:
            return lambda: None
        example = x[:2].to(next(model.parameters()).device)
        balancer = ek.Balancer(model, example, optimizer, depth_factor=depth_factor)

        def step() -> None:
            with contextlib.suppress(ConfigError):  # weights that have left the numbers stay so
                balancer.step()

        return step

    return train(
        "equi_norm",
        make,
        settings,
        root=root,
        cache=cache,
        augment=augment,
        make_optimizer=optimizer,
        make_schedule=linear,
        after_step=balancing,
    )


def open_branches_(network: nn.Module) -> None:
    """Let residual branches begin at 1 / sqrt(their number) instead of at zero.

    Balanced, a scale near zero becomes small weights before it, with gradients as much larger.
    """
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    for block in blocks:
        nn.init.constant_(block.norm2.weight, len(blocks) ** -0.5)  # type: ignore[arg-type]


def linear(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """From the optimizer's learning rate down to zero."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
