"""Normalizers, forward and backward, against torch's batch norm."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.bench.timing import compare
from evenkeel.norm import BatchChannelNorm2d

SHAPES = ((32, 64, 56, 56), (128, 16, 32, 32), (2, 256, 28, 28))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def layers(channels: int) -> dict[str, nn.Module]:
    """What is timed; the first is what the others are compared with."""
    groups = min(32, channels // 4)
    return {
        "batch norm": nn.BatchNorm2d(channels),
        "group norm": nn.GroupNorm(groups, channels),
        "batch norm, group norm": nn.Sequential(
            nn.BatchNorm2d(channels), nn.GroupNorm(groups, channels)
        ),
        "batch-channel": BatchChannelNorm2d(channels, groups),
        "batch-channel, running": BatchChannelNorm2d(channels, groups, statistics="running"),
    }


def bench(
    device: str = "cpu",
    *,
    compiled: bool = True,
    rounds: int = 9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """A row of figures for every shape, layout, way of running and layer."""
    places = [
        (shape, layout, way)
        for shape in SHAPES
        for layout in LAYOUTS
        for way in ("eager", *(["compiled"] if compiled else []))
    ]
    rows: list[dict[str, Any]] = []
    for done, (shape, layout, way) in enumerate(places):
        progress(done, len(places))
        rows += _rows(shape, layout, way, device, rounds)
    progress(len(places), len(places))
    return rows


def _rows(
    shape: tuple[int, ...], layout: str, way: str, device: str, rounds: int
) -> Iterator[dict[str, Any]]:
    x, dy = (torch.randn(shape, device=device) for _ in range(2))
    x, dy = (t.to(memory_format=LAYOUTS[layout]) for t in (x, dy))
    x.requires_grad_()
    torch._dynamo.reset()
    named = {name: layer.to(device) for name, layer in layers(shape[1]).items()}
    kept = {name: _kept(layer, x) for name, layer in named.items()}
    runs: dict[str, Any] = named
    if way == "compiled":
        runs = {name: torch.compile(layer, fullgraph=True) for name, layer in named.items()}

    def step(layer: Callable[[Tensor], Tensor]) -> None:
        x.grad = None
        layer(x).backward(dy)

    timings = compare([functools.partial(step, layer) for layer in runs.values()], rounds)
    for name, timing in zip(runs, timings, strict=True):
        yield {
            "shape": list(shape),
            "layout": layout,
            "way": way,
            "layer": name,
            **timing.to_dict(),
            "activations_kept": kept[name] if way == "eager" else None,
        }


def _kept(layer: nn.Module, x: Tensor) -> int:
    """Tensors as large as the input that are kept for backward."""
    places: set[int] = set()

    def note(t: Tensor) -> Tensor:
        if t.numel() == x.numel():
            places.add(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = layer(x)
    del y
    return len(places)
