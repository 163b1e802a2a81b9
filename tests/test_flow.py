"""Moments that flow in closed form: against draws, by differences, and which ways there are."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evenkeel.graph import capture, flow
from evenkeel.graph.flow import Gaussian
from evenkeel.graph.prediction import Prediction, plan
from evenkeel.norm import standardize_weights_
from networks import Net

SQUARE = (16, 16)
DRAWN = 30_000_000
"""Elements that each figure by draws is of."""
KINDS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Way:
    """From the outputs of normalizers ``a``, ``b`` to the input of ``last``."""

    run: Callable[..., torch.Tensor]
    parts: Callable[[], dict[str, nn.Module]] = dict
    sources: int = 1
    channels: int = 4
    sizes: tuple[int, ...] = SQUARE
    elements: int = DRAWN
    standard: tuple[str, ...] = field(default=())

    def build(self) -> nn.Module:
        """Its network, which gives one input to all sources."""
        names = "ab"[: self.sources]
        kind = KINDS[len(self.sizes)]
        parts = self.parts()
        inputs = torch.zeros(2, self.channels, *self.sizes)
        with torch.no_grad():
            shape = self.run(Net(None, **parts).eval(), *[inputs] * self.sources).shape
        parts |= {name: kind(self.channels) for name in names}
        parts["last"] = KINDS[len(shape) - 2](shape[1])

        def run(m, x):
            return m.last(self.run(m, *(getattr(m, name)(x) for name in names)))

        net = Net(run, **parts)
        if self.standard:
            standardize_weights_(net, self.standard)
        return net

    def planned(self, net: nn.Module) -> Prediction:
        inputs = torch.zeros(2, self.channels, *self.sizes)
        return plan(capture(net, inputs), [*"ab"[: self.sources], "last"])

    def given(self, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Mean and variance (1, C) of each source."""
        g = torch.Generator().manual_seed(seed)
        return [
            (
                2 * torch.rand(1, self.channels, generator=g) - 1,
                0.5 + torch.rand(1, self.channels, generator=g) * 2,
            )
            for _ in range(self.sources)
        ]


def conv(into=4, out=6, size=3, kind=nn.Conv2d, **options) -> Callable[[], dict[str, nn.Module]]:
    if "padding" not in options:
        options["padding"] = size // 2
    return lambda: {"conv": kind(into, out, size, **options)}


def after_relu(m, x):
    return m.conv(F.relu(x))


def per_channel() -> dict[str, nn.Module]:
    prelu = nn.PReLU(4)
    with torch.no_grad():
        prelu.weight.copy_(torch.tensor([0.5, -0.3, 0.0, 1.5]))
    return {"prelu": prelu} | conv()()


def linear(into, out=2) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {"linear": nn.Linear(into, out)}


FEW = {"channels": 1, "elements": 60_000_000}
"""Where there is one output of a map, there must be more maps."""

WAYS = {
    "identity": Way(lambda m, x: x),
    "relu": Way(lambda m, x: F.relu(x)),
    "conv": Way(lambda m, x: m.conv(x), conv()),
    "relu, conv": Way(after_relu, conv()),
    "no bias": Way(after_relu, conv(bias=False)),
    "no padding": Way(after_relu, conv(padding=0)),
    "wide kernel": Way(after_relu, conv(size=7)),
    "stride": Way(after_relu, conv(stride=2)),
    "strides and paddings": Way(after_relu, conv(size=(3, 5), stride=(3, 2), padding=(0, 4))),
    "groups": Way(after_relu, conv(groups=2)),
    "depthwise": Way(after_relu, conv(out=8, groups=4)),
    "dilation": Way(after_relu, conv(dilation=2, padding=2)),
    "same": Way(after_relu, conv(size=4, padding="same")),
    "same, dilated": Way(after_relu, conv(size=(4, 3), padding="same", dilation=(1, 3))),
    "valid": Way(after_relu, conv(padding="valid")),
    "kernel larger than the map": Way(
        after_relu, conv(size=9, padding=4), sizes=(4, 4), elements=2 * DRAWN
    ),
    "1d": Way(after_relu, conv(kind=nn.Conv1d, size=5), sizes=(64,)),
    "3d": Way(after_relu, conv(kind=nn.Conv3d, stride=(1, 2, 1)), sizes=(8, 8, 8)),
    "computed weights": Way(after_relu, conv(), standard=("conv",)),
    "sum": Way(lambda m, x, y: m.conv(F.relu(x)) + y, conv(out=4), 2),
    "difference": Way(lambda m, x, y: torch.sub(m.conv(x), y, alpha=2), conv(out=4), 2),
    "sum, relu": Way(lambda m, x, y: F.relu(m.conv(x) + y), conv(out=4), 2),
    "sum of rectified ones": Way(lambda m, x, y: F.relu(x) + F.relu(y), sources=2),
    "scaled and shifted": Way(lambda m, x: m.conv((2 * F.relu(x) - 0.5) / 4 + 0.3), conv()),
    "concatenation": Way(
        lambda m, x, y: m.conv(torch.cat([F.relu(x), y, F.avg_pool2d(y, 1)], 1)), conv(12), 2
    ),
    "leaky relu": Way(lambda m, x: m.conv(F.leaky_relu(x, 0.2)), conv()),
    "leaky relu that bends up": Way(lambda m, x: m.conv(F.leaky_relu(x, -0.7)), conv()),
    "leaky relus": Way(lambda m, x: m.conv(F.leaky_relu(F.leaky_relu(x, 0.5), 0.5)), conv()),
    "relu after one that bends up": Way(lambda m, x: F.relu(F.leaky_relu(x, -0.7))),
    "clamp": Way(lambda m, x: m.conv(x.clamp(min=0)), conv()),
    "prelu": Way(lambda m, x: m.conv(m.prelu(x)), lambda: {"prelu": nn.PReLU(init=0.4)} | conv()()),
    "prelu of each channel": Way(lambda m, x: m.conv(m.prelu(x)), per_channel),
    "max pool": Way(lambda m, x: m.conv(F.max_pool2d(F.relu(x), 2)), conv()),
    "max pool that overlaps": Way(lambda m, x: F.max_pool2d(F.relu(x), 3, 2, 1)),
    "max pool, leaky relu": Way(lambda m, x: F.leaky_relu(F.max_pool2d(x, (2, 3)), 0.1)),
    "leaky relu, max pool": Way(lambda m, x: F.max_pool2d(F.leaky_relu(x, 0.1), (2, 3))),
    "prelu, max pool": Way(lambda m, x: F.max_pool2d(m.prelu(x), 2), per_channel),
    "dilated max pool": Way(lambda m, x: F.max_pool2d(x, 2, 1, 0, 3)),
    "max pool, 1d": Way(lambda m, x: F.max_pool1d(F.relu(x), 4), sizes=(64,)),
    "max pool, 3d": Way(lambda m, x: F.max_pool3d(x, 2), sizes=(8, 8, 8), elements=2 * DRAWN),
    "average pool": Way(lambda m, x: m.conv(F.avg_pool2d(F.relu(x), 2)), conv()),
    "average pool that overlaps": Way(lambda m, x: F.avg_pool2d(F.relu(x), 3, 1, 1)),
    "average pool, 1d": Way(lambda m, x: F.avg_pool1d(F.relu(x), 2), sizes=(64,)),
    "average pool, 3d": Way(lambda m, x: F.avg_pool3d(F.relu(x), 2), sizes=(8, 8, 8)),
    "flatten, linear": Way(
        lambda m, x: m.linear(F.relu(x).flatten(1)), linear(256), **FEW
    ),
    "pool, flatten, linear": Way(
        lambda m, x: m.linear(F.max_pool2d(F.relu(x), 4).view(len(x), -1)), linear(16), **FEW
    ),
    "conv, flatten": Way(lambda m, x: m.conv(x).flatten(1), conv(1, 1), **FEW | {"sizes": (6, 6)}),
    "relu, linear": Way(lambda m, x: m.linear(F.relu(x)), linear(4, 5), sizes=()),
    "dropout": Way(
        lambda m, x: m.conv(m.drop(F.relu(x))), lambda: {"drop": nn.Dropout(0.3)} | conv()()
    ),
    "global mean": Way(lambda m, x: F.relu(x).mean((2, 3)), **FEW),
    "global mean, kept": Way(lambda m, x: F.relu(x).mean((2, 3), keepdim=True), **FEW),
    "global mean of a convolution": Way(
        lambda m, x: m.linear(F.adaptive_avg_pool2d(F.relu(m.conv(x)), 1).flatten(1)),
        lambda: linear(2)() | conv(1, 2, 1)(), **FEW,
    ),
}  # fmt: skip


def predicted(way: Way, net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    prediction = way.planned(net)
    *sources, last = prediction.places
    known = {
        place.step: Gaussian.alike(mean, var, way.sizes)
        for place, (mean, var) in zip(sources, way.given(), strict=True)
    }
    assert prediction.sources(last.prior) == sorted(place.step for place in sources)
    with torch.no_grad():
        mean, var = prediction.evaluate(last.prior, known, net).pooled()
    return mean[0], var[0]


@torch.no_grad()
def by_draws(way: Way, net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel over all positions of all draws."""
    net.train()
    ones = (1,) * len(way.sizes)
    per_draw = way.channels * math.prod(way.sizes)
    draws = max(10_000, way.elements // per_draw)
    chunk = max(1, 500_000 // per_draw)
    total = squares = count = 0
    for _ in range(-(-draws // chunk)):
        maps = [
            torch.randn(chunk, way.channels, *way.sizes)
            .mul_(var.sqrt().view(1, -1, *ones))
            .add_(mean.view(1, -1, *ones))
            for mean, var in way.given()
        ]
        y = way.run(net, *maps).transpose(0, 1).flatten(1)
        count += y.shape[1]
        total, squares = total + y.sum(1).double(), squares + y.square().sum(1).double()
    mean = total / count
    return mean, squares / count - mean.square()


def errors(way: Way) -> tuple[float, float]:
    """The largest of the mean, in deviations, and of the variance, relative."""
    net = way.build()
    mean, var = predicted(way, net)
    exact_mean, exact_var = by_draws(way, net)
    away = ((mean - exact_mean).abs() / exact_var.sqrt()).max()
    return float(away), float((var / exact_var - 1).abs().max())


@pytest.mark.parametrize("name", WAYS)
def test_moments_are_those_of_many_draws_to_a_percent(name):
    mean, var = errors(WAYS[name])
    assert mean < 0.01
    assert var < 0.01
