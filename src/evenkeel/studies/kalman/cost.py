"""What priors cost: the time of a training step."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

import evenkeel as ek
from evenkeel.bench.timing import compare
from evenkeel.models import build
from evenkeel.norm import GhostBatchNorm2d
from evenkeel.studies.equi_norm.networks import resnet18_cifar
from evenkeel.studies.frame import Facts

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet14_cifar10": lambda: build("resnet14_cifar10"),
    "ResNet-18": resnet18_cifar,
}


def step_times(network: str, batch: int, together: Sequence[int], rounds: int) -> list[Facts]:
    """Of batch norm over the batch, batch norm over parts, and with priors; by samples of a part.

    The batch norm that priors are compared with has the same parts.
    """
    torch.manual_seed(0)
    plain = NETWORKS[network]()
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    found = []
    for size in together:
        whole = size >= batch
        alike = NETWORKS[network]()
        if not whole:
            ek.norm.convert_(alike, lambda c, size=size: GhostBatchNorm2d(c, size))  # type: ignore[misc]
        kalman = ek.norm.kalmanize(plain, x[:1], normalization_batch=None if whole else size)
        steps = [_step(of, x, y) for of in (alike, kalman, plain)]
        ours = compare(steps, rounds)
        found.append(
            {
                "network": network,
                "batch": batch,
                "together": size,
                "batch_norm_ms": ours[0].median_ms,
                "kalman_ms": ours[1].median_ms,
                "ratio": ours[1].ratio,
                "ratio_of_native": ours[1].ratio / ours[2].ratio,
                "threads": torch.get_num_threads(),
            }
        )
    return found


def _step(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    network = network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    x = x.to(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()

    return step
