"""A residual network of quaternions on CIFAR-10, beside real ones."""

from pathlib import Path
from typing import Any

from torch import nn

from evenkeel.models import build
from evenkeel.studies.training import train

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "quaternion": ("quaternion_resnet14_cifar10", {"norm": "variance"}),
    "real, of its width": ("resnet14_cifar10", {}),
    "real, of its parameters": ("resnet14_cifar10_half", {}),
}


def trained_on_cifar10(
    network: str,
    data: str,
    root: Path | None,
    cache: Path,
    seed: int,
    epochs: int,
    samples: int,
    batch_size: int,
    learning_rate: float,
    precision: str,
) -> dict[str, Any]:
    """Error in percent after each epoch, and the number of parameters."""
    settings = {k: v for k, v in locals().items() if k not in ("root", "cache")}
    architecture, options = NETWORKS[network]

    def make() -> nn.Module:
        return build(architecture, **options)

    parameters = sum(p.numel() for p in make().parameters())
    run = train("quaternion", make, settings, root=root, cache=cache, augment=True)
    return run | {"parameters": parameters}
