"""Moments that flow in closed form: against draws, by differences, and which ways there are."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

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
DRAWN = 20_000_000
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
SMALL = {"channels": 1, "elements": 20_000_000, "sizes": (8, 8)}

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
        lambda m, x, y: m.conv(torch.cat([F.relu(x), F.max_pool2d(y, 3, 1, 1)], 1)),
        conv(8, size=1), 2,
    ),
    "leaky relu": Way(lambda m, x: m.conv(F.leaky_relu(x, 0.2)), conv()),
    "leaky relu that bends up": Way(lambda m, x: m.conv(F.leaky_relu(x, -0.7)), conv()),
    "leaky relus": Way(lambda m, x: m.conv(F.leaky_relu(F.leaky_relu(x, 0.5), 0.5)), conv()),
    "clamp": Way(lambda m, x: m.conv(x.clamp(min=0)), conv()),
    "gelu": Way(lambda m, x: m.conv(F.gelu(x)), conv()),
    "silu": Way(lambda m, x: m.conv(F.silu(x)), conv()),
    "elu": Way(lambda m, x: F.elu(x, 0.7)),
    "relu6": Way(lambda m, x: F.relu6(x)),
    "hardswish": Way(lambda m, x: F.hardswish(x)),
    "relu of a stream and a branch": Way(lambda m, x, y: F.relu(F.relu(x) + y), sources=2),
    "that, then a convolution": Way(lambda m, x, y: m.conv(F.relu(F.relu(x) + y)), conv(), 2),
    "that, then one of 1x1": Way(
        lambda m, x, y: m.conv(F.relu(F.relu(x) + y)), conv(size=1, out=12), 2
    ),
    "leaky relu of a stream and a branch": Way(
        lambda m, x, y: F.leaky_relu(F.leaky_relu(x, 0.2) + y, 0.1), sources=2
    ),
    "gate": Way(
        lambda m, x, y: F.relu(x) * torch.sigmoid(3 * y.mean((2, 3), keepdim=True)), sources=2
    ),
    "nearest": Way(lambda m, x: F.interpolate(F.relu(x), scale_factor=2)),
    "prelu": Way(lambda m, x: m.conv(m.prelu(x)), lambda: {"prelu": nn.PReLU(init=0.4)} | conv()()),
    "prelu of each channel": Way(lambda m, x: m.conv(m.prelu(x)), per_channel),
    "max pool": Way(lambda m, x: m.conv(F.max_pool2d(F.relu(x), 2)), conv()),
    "max pool that overlaps": Way(lambda m, x: F.max_pool2d(F.relu(x), 3, 2, 1)),
    "leaky relu, max pool": Way(lambda m, x: F.max_pool2d(F.leaky_relu(x, 0.1), (2, 3))),
    "prelu, max pool": Way(lambda m, x: F.max_pool2d(m.prelu(x), 2), lambda: {"prelu": nn.PReLU()}),
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
    "conv, flatten": Way(lambda m, x: m.conv(x).flatten(1), conv(1, 1), **SMALL),
    "relu, linear": Way(lambda m, x: m.linear(F.relu(x)), linear(4, 5), sizes=()),
    "dropout": Way(
        lambda m, x: m.conv(m.drop(F.relu(x))), lambda: {"drop": nn.Dropout(0.3)} | conv()()
    ),
    "global mean": Way(lambda m, x: F.relu(x).mean((2, 3)), **FEW),
    "global mean, kept": Way(lambda m, x: F.relu(x).mean((2, 3), keepdim=True), **FEW),
    "global mean of a convolution": Way(
        lambda m, x: m.linear(F.adaptive_avg_pool2d(F.relu(m.conv(x)), 1).flatten(1)),
        lambda: linear(2)() | conv(1, 2, 1)(), **SMALL,
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


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", WAYS)
def test_moments_are_those_of_many_draws_to_a_percent(name):
    mean, var = errors(WAYS[name])
    assert mean < 0.01
    assert var < 0.01


# ---- against exact values


def gaussian(mean, var, **options) -> Gaussian:
    """Of one channel and one position."""
    mean, var = (torch.tensor([[[v]]], dtype=torch.float64) for v in (mean, var))
    return Gaussian(mean, var, ((0,),), **options)


def integrated(function, mean: float, var: float) -> tuple[float, float]:
    """Mean and variance of ``function(x)`` by a sum over very many x."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    weight = (-z * z / 2).exp()
    weight /= weight.sum()
    y = function(mean + math.sqrt(var) * z)
    first = (weight * y).sum()
    return float(first), float((weight * (y - first).square()).sum())


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0, -0.5, 2.0])
@pytest.mark.parametrize(("mean", "var"), [(0, 1), (0.7, 0.2), (-3, 1.5), (6, 1), (2, 1e-4)])
def test_rectified_moments_are_exact(slope, mean, var):
    found = flow.realised(gaussian(mean, var, slope=slope))
    exact = integrated(lambda x: torch.where(x < 0, slope * x, x), mean, var)
    assert (found.mean.item(), found.var.item()) == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "slope", [0.0, 0.2, 1.0, torch.tensor([0.2], dtype=torch.float64)], ids=str
)
@pytest.mark.parametrize("mean", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_far_from_the_bend_no_digits_are_lost(slope, mean, dtype):
    x = Gaussian(torch.full((1, 1), mean, dtype=dtype), torch.full((1, 1), 2.0, dtype=dtype))
    found = flow.realised(flow.rectified(x, slope))
    factor = float(slope) if mean < 0 else 1.0
    assert found.mean.item() == pytest.approx(factor * mean, rel=1e-6, abs=1e-30)
    assert found.var.item() == pytest.approx(factor**2 * 2, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("slope", [0.0, 0.3])
@pytest.mark.parametrize("mean", [2.0, 0.0, -2.0])
@pytest.mark.parametrize("pool", [False, True])
def test_elements_that_do_not_vary_have_finite_gradients(slope, mean, pool):
    mean, var = torch.full((1, 2, 1), mean), torch.zeros(1, 2, 1)
    leaves = mean.requires_grad_(), var.requires_grad_()
    x = flow.rectified(Gaussian(*leaves, ((0, 0, 0, 0),)), slope)
    y = flow.max_pooled(x, [2], [2], [0], [1]) if pool else flow.realised(x)
    torch.testing.assert_close(y.mean, F.leaky_relu(mean, slope))
    torch.testing.assert_close(y.var, torch.zeros_like(y.var))
    found = torch.autograd.grad(y.mean.sum() + y.var.sum(), leaves, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in found)


def test_maps_that_do_not_vary_but_in_their_borders_have_finite_gradients():
    mean = torch.tensor([[[5.0, 1.0]]]).requires_grad_()
    var = torch.zeros(1, 1, 2).requires_grad_()
    y = flow.max_pooled(Gaussian(mean, var, ((0, 1, 1, 0),)), [2], [2], [0], [1])
    torch.testing.assert_close(y.mean, torch.full_like(y.mean, 5.0))
    torch.testing.assert_close(y.var, torch.zeros_like(y.var))
    found = torch.autograd.grad(y.mean.sum() + y.var.sum(), (mean, var))
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("count", [1, 2, 4, 9, 25])
@pytest.mark.parametrize("slope", [1.0, 0.25])
@pytest.mark.parametrize("mean", [0.0, -2.0, 100.0])
def test_the_largest_of_many_is_exact_to_a_percent(count, slope, mean):
    x = gaussian(mean, 1.0)
    x = Gaussian(x.mean, x.var, ((0,) * count,), slope)
    found = flow.max_pooled(x, [count], [1], [0], [1])
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    below = torch.special.ndtr(z) ** count
    weight, middle = below.diff(), mean + (z[1:] + z[:-1]) / 2
    y = torch.where(middle < 0, slope * middle, middle)
    exact = (weight * y).sum()
    spread = (weight * (y - exact).square()).sum()
    assert found.mean.item() == pytest.approx(float(exact), rel=0, abs=0.01 * float(spread.sqrt()))
    assert found.var.item() == pytest.approx(float(spread), rel=0.01)


def test_a_window_over_elements_of_very_different_deviations():
    mean = torch.tensor([[[0.0, 0.5]]], dtype=torch.float64)
    var = torch.tensor([[[1e-6, 1.0]]], dtype=torch.float64)
    found = flow.max_pooled(Gaussian(mean, var, ((0, 1),)), [2], [2], [0], [1])
    # beside the other, the first is a constant
    exact = integrated(lambda x: x.clamp_min(0), 0.5, 1.0)
    assert found.mean.item() == pytest.approx(exact[0], abs=0.01 * math.sqrt(exact[1]))
    assert found.var.item() == pytest.approx(exact[1], rel=0.01)


# ---- every position, without classes


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (11,)),
    "2d": (nn.Conv2d(4, 6, 3, padding=1), (6, 7)),
    "larger than the map": (nn.Conv2d(4, 6, 7, padding=3), (4, 3)),
    "strided": (nn.Conv2d(4, 6, (3, 4), stride=(2, 3), padding=(2, 1)), (9, 10)),
    "dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=(2, 1)), (7, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (5, 6)),
    "depthwise": (nn.Conv2d(4, 8, 5, padding=1, groups=4, bias=False), (9, 6)),
    "3d": (nn.Conv3d(4, 2, 3, padding=1, stride=(1, 2, 1), groups=2), (5, 6, 4)),
}


def through(layer: nn.Module, x: Gaussian) -> Gaussian:
    return flow.convolved(
        x,
        layer.weight,
        layer.bias,
        stride=layer.stride,
        padding=[(p, p) for p in layer.padding],
        dilation=layer.dilation,
        groups=layer.groups,
    )


def spread_out(x: Gaussian, of: torch.Tensor) -> torch.Tensor:
    """One value for every position."""
    for i, axis in enumerate(x.axes):
        of = of.index_select(2 + i, torch.tensor(axis))
    return of


def maps(parts: int, channels: int, sizes, *, alike: bool) -> Gaussian:
    """The same at every position, or not at any two of an axis."""
    axes = [(0,) * size if alike else tuple(range(size)) for size in sizes]
    shape = parts, channels, *(max(axis) + 1 for axis in axes)
    mean = torch.randn(shape, dtype=torch.float64)
    var = 0.2 + torch.rand(shape, dtype=torch.float64)
    return Gaussian(mean, var, tuple(axes))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("alike", [True, False])
def test_a_convolution_is_that_of_the_maps(name, alike):
    layer, sizes = CONVOLUTIONS[name]
    layer = layer.double()
    x = maps(3, 4, sizes, alike=alike)
    y = through(layer, x)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(sizes) - 1]
    how = layer.stride, layer.padding, layer.dilation, layer.groups
    mean, var = (spread_out(x, of) for of in (x.mean, x.var))
    mean, var = layer(mean), convolve(var, layer.weight.square(), None, *how)
    torch.testing.assert_close(spread_out(y, y.mean), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(spread_out(y, y.var), var, rtol=1e-12, atol=1e-12)
    positions = tuple(range(2, mean.dim()))
    exact = mean.mean(positions), var.mean(positions) + mean.var(positions, correction=0)
    torch.testing.assert_close(y.pooled(), exact, rtol=1e-12, atol=1e-12)


def test_only_a_few_classes_of_positions_are_worked_out():
    x = Gaussian.alike(torch.zeros(1, 4), torch.ones(1, 4), (500, 300))
    y = through(nn.Conv2d(4, 6, 3, padding=1), through(nn.Conv2d(4, 4, 3, padding=1), x))
    assert [len(axis) for axis in y.axes] == [500, 300]
    assert y.mean.shape == (1, 6, 5, 5)


@pytest.mark.parametrize("factors", [(1, 3), (2, 2)])
def test_positions_are_repeated(factors):
    x = through(nn.Conv2d(4, 6, 3, padding=1).double(), maps(1, 4, (6, 7), alike=True))
    y = flow.repeated(x, factors)
    exact = F.interpolate(spread_out(x, x.mean), scale_factor=[float(n) for n in factors])
    torch.testing.assert_close(spread_out(y, y.mean), exact)
    torch.testing.assert_close(y.pooled()[0], exact.mean((2, 3)))


# ---- derivatives


def pool(x: Gaussian) -> Gaussian:
    return flow.max_pooled(x, [3, 2], [2, 2], [1, 0], [1, 1])


def other(x: Gaussian, weight) -> Gaussian:
    """With other classes than those of ``x``."""
    layer = {"stride": [1, 1], "padding": [(1, 1), (0, 0)], "dilation": [1, 1], "groups": 1}
    return flow.convolved(x, weight, None, **layer)


FLOWS = {
    "realised": lambda x, w: flow.realised(flow.rectified(x)),
    "leaky": lambda x, w: flow.realised(flow.rectified(x, 0.3)),
    "bends up": lambda x, w: flow.realised(flow.rectified(x, -0.3)),
    "prelu": lambda x, w: flow.realised(flow.rectified(x, w[0, :, 0, 0])),
    "convolved": other,
    "rectified, convolved": lambda x, w: other(flow.rectified(x), w),
    "max pooled": lambda x, w: pool(x),
    "rectified, max pooled": lambda x, w: pool(flow.rectified(x)),
    "leaky, max pooled": lambda x, w: pool(flow.rectified(x, 0.2)),
    "average pooled": lambda x, w: flow.average_pooled(flow.rectified(x), [2, 3], [1, 2], [1, 1]),
    "averaged": lambda x, w: flow.averaged(flow.rectified(x)),
    "added": lambda x, w: flow.added(flow.rectified(x), other(x, w), -1.5),
    "concatenated": lambda x, w: flow.concatenated(flow.rectified(x), other(x, w), x),
    "scaled": lambda x, w: flow.scaled(flow.rectified(x), -2.0, 0.5),
    "dropped": lambda x, w: flow.dropped(flow.rectified(x), 0.3),
    "mapped": lambda x, w: flow.mapped(flow.flattened(flow.rectified(x)),
        w.flatten(1).repeat(1, 35)[:, :70], None),
    "in a row": lambda x, w: pool(flow.rectified(other(pool(flow.rectified(other(x, w))), w))),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "classes"])
def test_derivatives_by_differences(name, alike):
    start = maps(2, 2, (5, 7), alike=alike)
    weight = torch.randn(2, 2, 3, 1, dtype=torch.float64)

    def run(mean, var, weight):
        y = FLOWS[name](Gaussian(mean, var, start.axes), weight)
        return y.mean, y.var, *y.pooled()

    leaves = [t.requires_grad_() for t in (start.mean, start.var, weight)]
    assert torch.autograd.gradcheck(run, leaves)


# ---- which ways there are


PARAMETER = nn.Parameter(torch.ones(4, 4, 1, 1))


def of(run, sizes=(8, 8), **parts):
    """The place of the last normalizer."""
    way = Way(run, lambda: parts, sizes=sizes)
    return way.planned(way.build()).places[-1]


GOES = {
    "in place": (lambda m, x: x.relu_(), {}),
    "a module": (lambda m, x: m.act(x), {"act": nn.ReLU(inplace=True)}),
    "a copy": (lambda m, x: x.contiguous().clone(), {}),
    "another dtype": (lambda m, x: x.to(torch.float64).float(), {}),
    "a number first": (lambda m, x: 3 + 2 * x, {}),
    "identity": (lambda m, x: m.same(x), {"same": nn.Identity()}),
    "flattened twice": (lambda m, x: x.flatten(1).reshape(len(x), -1), {}),
    "sizes from the input": (lambda m, x: x.view(x.size(0), x.shape[1] * x.shape[2] * 8), {}),
    "weights that are computed": (lambda m, x: F.conv2d(x, m.w * 2), {"w": PARAMETER}),
    "a buffer": (lambda m, x: F.conv2d(x, m.w), {"w": PARAMETER.data}),
}


@pytest.mark.parametrize("name", GOES)
def test_ways_that_it_goes(name):
    run, parts = GOES[name]
    assert of(run, **parts).why is None


STOPS = {
    "clamp": (lambda m, x: x.clamp(0, 1), {}),
    "clamp,": (lambda m, x: x.clamp(min=0.5), {}),
    "reciprocal": (lambda m, x: 1 / x, {}),
    "softmax": (lambda m, x: x.softmax(1), {}),
    "max_pool2d": (lambda m, x: F.max_pool2d(x, 3, ceil_mode=True), {}),
    "avg_pool2d": (lambda m, x: F.avg_pool2d(x, 3, ceil_mode=True), {}),
    "avg_pool2d,": (lambda m, x: F.avg_pool2d(x, 3, padding=1, count_include_pad=False), {}),
    "avg_pool2d,,": (lambda m, x: F.avg_pool2d(x, 2, divisor_override=3), {}),
    "adaptive_avg_pool2d": (lambda m, x: F.adaptive_avg_pool2d(x, 2), {}),
    "pad": (lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), "reflect")), {"conv": nn.Conv2d(4, 4, 3)}),
    "conv_transpose2d": (lambda m, x: m.up(x), {"up": nn.ConvTranspose2d(4, 4, 2)}),
    "linear": (lambda m, x: m.linear(x), {"linear": nn.Linear(8, 8)}),
    "add": (lambda m, x: x + m.w, {"w": PARAMETER[:1, :, :, :]}),
    "add,": (lambda m, x: x + x.mean((2, 3), keepdim=True), {}),
    "cat": (lambda m, x: torch.cat([x, x], 2), {}),
    "mean": (lambda m, x: x.mean((0, 2), keepdim=True), {}),
    "permute": (lambda m, x: x.permute(0, 1, 3, 2), {}),
    "group_norm": (lambda m, x: m.norm(x), {"norm": nn.GroupNorm(2, 4)}),
    "view": (lambda m, x: x.view(len(x), 2, 2, 8, 8).flatten(1, 2), {}),
}  # fmt: skip
"""The operation that is named, and what calls it."""


@pytest.mark.parametrize("name", STOPS)
def test_ways_that_end_say_where(name):
    run, parts = STOPS[name]
    place = of(run, **parts)
    assert place.prior is None
    assert place.why == f"{name.strip(',')} is on the way, which has no closed form here"


def test_what_ends_in_one_branch_ends_after_the_sum():
    place = of(lambda m, x: F.relu(x) + x.softmax(1))
    assert place.why.startswith("softmax is on the way")


def test_a_normalizer_that_is_not_asked_for_ends_the_way():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    places = plan(capture(net, torch.zeros(2, 4, 8, 8)), ["0", "2"]).places
    assert [place.path for place in places] == ["0", "2"]
    assert places[1].why == "a normalizer before it is none of those that are fused"
