"""Quaternion convolutions, by both forms of their products, against real ones of the same width."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.bench.timing import compare
from evenkeel.quaternion import QuaternionConv2d
from evenkeel.quaternion.product import assembled

BATCH, SIZE = 8, 32
CHANNELS = (16, 32, 64, 128, 192, 256, 512, 1024)
KERNELS = (1, 3)
WAYS = ("inference", "training")


class AssembledConv2d(QuaternionConv2d):
    """Its real kernel is assembled at each forward, as the libraries before did it."""

    def forward(self, x: Tensor) -> Tensor:
        """The real convolution."""
        return F.conv2d(x, assembled(self.weight), self.bias, self.stride, self.padding)


def layers(channels: int, kernel: int) -> dict[str, nn.Module]:
    """What is timed; the first is what the others are compared with."""
    options: Any = {"padding": kernel // 2}
    return {
        "assembled": AssembledConv2d(channels, channels, kernel, **options),
        **{
            algorithm: QuaternionConv2d(channels, channels, kernel, algorithm=algorithm, **options)
            for algorithm in ("dense", "fast", "auto")
        },
        "real": nn.Conv2d(channels, channels, kernel, **options),
    }


def bench(
    device: str = "cpu",
    *,
    channels: tuple[int, ...] = CHANNELS,
    rounds: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """A row of figures for every kernel, number of channels, way of running and layer."""
    places = [(kernel, width, way) for kernel in KERNELS for width in channels for way in WAYS]
    rows: list[dict[str, Any]] = []
    for done, place in enumerate(places):
        progress(done, len(places))
        rows += _rows(*place, device, rounds)
    progress(len(places), len(places))
    return rows


def _rows(
    kernel: int, channels: int, way: str, device: str, rounds: int
) -> Iterator[dict[str, Any]]:
    training = way == "training"
    x = torch.randn(BATCH, channels, SIZE, SIZE, device=device, requires_grad=training)
    dy = torch.randn_like(x)
    named = layers(channels, kernel)

    def step(layer: nn.Module) -> None:
        x.grad = None
        with torch.set_grad_enabled(training):
            y = layer(x)
        if training:
            y.backward(dy)

    placed = [layer.to(device).train(training) for layer in named.values()]
    timings = compare([functools.partial(step, layer) for layer in placed], rounds)
    for (name, layer), timing in zip(named.items(), timings, strict=True):
        yield {
            "kernel": kernel,
            "channels": channels,
            "way": way,
            "layer": name,
            "parameters": sum(p.numel() for p in layer.parameters()),
            **timing.to_dict(),
        }
