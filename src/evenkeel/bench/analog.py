"""A new chip and its forward pass against plain torch, and aihwkit where it is installed."""

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from evenkeel.analog import PCM, Converter, Device, Periphery, program
from evenkeel.bench.timing import compare

Ways = dict[str, Callable[[], object]]

AGE_S = 3600.0
BATCHES = (10, 100)
LARGE = (2500, 4000)
"""Outputs and inputs."""
EIGHT = {"dac": Converter(8), "adc": Converter(8), "rows": 512}
DEVICES = {
    "PCM": Device(PCM()),
    "8-bit DAC and ADC": Device(PCM(), periphery=Periphery(**EIGHT)),  # type: ignore[arg-type]
    "reads of their own": Device(PCM(), periphery=Periphery(reads="each")),
    "IR drop": Device(PCM(), periphery=Periphery(wire_ohm=0.35)),
}


def network() -> nn.Sequential:
    """Three convolutions with batch norm and pooling, and a classifier: 24k weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, 16, 32, 64)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.MaxPool2d(2),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


@torch.no_grad()
def bench(
    *,
    rounds: int = 9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """A row of figures for every batch and way: program, age one hour, one forward pass."""
    rows: list[dict[str, Any]] = []
    for done, batch in enumerate((*BATCHES, None)):
        progress(done, len(BATCHES) + 1)
        ways = _large() if batch is None else _small(batch)
        timings = compare(list(ways.values()), rounds)
        rows += [
            {"batch": batch, "way": name, **timing.to_dict()}
            for name, timing in zip(ways, timings, strict=True)
        ]
    progress(len(BATCHES) + 1, len(BATCHES) + 1)
    return rows


def _large() -> Ways:
    """A chip of many weights, against random numbers for as many."""
    net, seeds = nn.Linear(LARGE[1], LARGE[0], bias=False), itertools.count()
    number = f"{math.prod(LARGE):,}"
    return {
        f"randn of {number}": lambda: torch.randn(LARGE),
        f"program and age {number}": lambda: program(net, PCM(), seed=next(seeds)).age_(AGE_S),
    }


def _small(batch: int) -> Ways:
    net, x = network(), torch.randn(batch, 3, 32, 32)
    seeds = itertools.count()

    def new(device: Device) -> object:
        return program(net, device, seed=next(seeds)).age_(AGE_S)(x)

    ways: Ways = {"plain torch": lambda: net(x)}
    ways |= {f"new chip, {name}": functools.partial(new, d) for name, d in DEVICES.items()}
    ways |= {
        f"forward, {name}": functools.partial(program(net, d, seed=0).age_(AGE_S), x)
        for name, d in DEVICES.items()
    }
    ways["8 new chips one by one"] = lambda: [new(DEVICES["PCM"]) for _ in range(8)]
    ways["8 new chips at once"] = lambda: program(
        net, DEVICES["PCM"], seed=next(seeds), chips=8
    ).age_(AGE_S)(x)
    if importlib.util.find_spec("aihwkit") is not None:
        ways |= dict(_aihwkit(net, x))
    return ways


def _aihwkit(net: nn.Module, x: torch.Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Its torch tile, for which alone it needs no compiled code."""
    from aihwkit.inference import PCMLikeNoiseModel
    from aihwkit.nn.conversion import convert_to_analog
    from aihwkit.simulator.configs import TorchInferenceRPUConfig
    from aihwkit.simulator.parameters import IOParameters

    exact = IOParameters(is_perfect=True)
    eight = IOParameters(inp_res=1 / 254, out_res=1 / 254, out_noise=0.0)
    for name, forward in (("PCM", exact), ("8-bit DAC and ADC", eight)):
        config = TorchInferenceRPUConfig(noise_model=PCMLikeNoiseModel(), forward=forward)
        model = convert_to_analog(net, config).eval()

        def new(model: Any = model) -> object:
            model.program_analog_weights()
            model.drift_analog_weights(AGE_S)
            return model(x)

        yield f"aihwkit new chip, {name}", new
        yield f"aihwkit forward, {name}", functools.partial(model, x)
