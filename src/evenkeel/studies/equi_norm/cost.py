"""What balancing costs: rounds of the solver, seconds for a large network, share of a step."""

import copy
import time
from typing import Any

import torch
from torch.nn import functional as F

import evenkeel as ek
from evenkeel.balance.balance import blocks_of
from evenkeel.balance.solve import solve
from evenkeel.bench.timing import compare
from evenkeel.graph import find_scales
from evenkeel.studies.equi_norm.networks import chain, resnet18_cifar, resnet50


def rounds(layers: int, width: int, seed: int) -> dict[str, Any]:
    """Rounds to a relative excess of 1e-8 for a chain, layer by layer and all at once."""
    network = chain(layers, width, seed)
    scales = find_scales(network, torch.zeros(2, width))
    blocks = blocks_of(network, scales, p=2.0, depth_factor=1.0, biases=True)
    found = {
        way: solve(blocks, scales.number, simultaneous=way == "simultaneous")
        for way in ("layer by layer", "simultaneous")
    }
    return {
        "layers": layers,
        "width": width,
        "seed": seed,
        "rounds": {way: solution.rounds for way, solution in found.items()},
        "excess": {way: solution.excess for way, solution in found.items()},
    }


def seconds(repeats: int) -> dict[str, Any]:
    """Median seconds to capture and to balance a ResNet-50, as initialised."""
    torch.manual_seed(0)
    network, x = resnet50().eval(), torch.randn(2, 3, 64, 64)
    find_scales(network, x)  # the exporter's own start
    captures, wholes = [], []
    for _ in range(repeats):
        fresh = copy.deepcopy(network)
        started = time.perf_counter()
        find_scales(fresh, x)
        captures.append(time.perf_counter() - started)
        started = time.perf_counter()
        done = ek.balance_(fresh, x)
        wholes.append(time.perf_counter() - started)
    middle = repeats // 2
    return {
        "capture_s": sorted(captures)[middle],
        "balance_s": sorted(wholes)[middle],
        "rounds": done.rounds,
        "error": done.error,
        "free": done.free,
        "threads": torch.get_num_threads(),
    }


def share_of_a_step(batch: int, rounds: int) -> dict[str, Any]:
    """Time of a sweep, against that of a training step of a ResNet-18 on 32x32 images."""
    torch.manual_seed(0)
    network = resnet18_cifar().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    balancer = ek.Balancer(network, x[:2], optimizer)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()

    training, sweep = compare([step, balancer.step], rounds)
    return {
        "batch": batch,
        "step_ms": training.median_ms,
        "sweep_ms": sweep.median_ms,
        "share": sweep.ratio,
        "threads": torch.get_num_threads(),
    }
