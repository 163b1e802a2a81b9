"""Batch Kalman norm: fused statistics, which priors there are, whole networks, tapes, and state."""

import copy
import math
import pickle
import threading
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import evenkeel as ek
from evenkeel import models
from evenkeel.errors import ConfigError, ShapeError
from evenkeel.moments import Moments
from evenkeel.norm import (
    BatchKalmanNorm,
    BatchKalmanNorm1d,
    BatchKalmanNorm2d,
    BatchKalmanNorm3d,
    GhostBatchNorm2d,
    convert_,
    kalmanize,
)
from evenkeel.norm.functional import batch_kalman_norm
from evenkeel.norm.programs import fused, trusted
from networks import Net, randomized_

DOUBLE = torch.float64
PROPAGATE = ["raw", "observed", "normalized"]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def prior_of(parts=1, channels=4, dtype=DOUBLE) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.randn(parts, channels, dtype=dtype)
    return mean, 0.5 + torch.rand(parts, channels, dtype=dtype)


def observed_in(x: torch.Tensor, parts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (K, C), by torch."""
    rows = x.unflatten(0, (parts, -1)).transpose(1, 2).flatten(2)
    return rows.mean(2), rows.var(2, correction=0)


def mixed(prior, seen, q):
    """Fused moments by the formula, with autograd."""
    (mp, vp), (mo, vo) = prior, seen
    return mp + q * (mo - mp), vp + q * (vo - vp) + q * (1 - q) * (mo - mp) ** 2


def normalized(x, mean, var, weight, bias, eps=1e-5):
    """Each part by its own (K, C)."""
    ones = (1,) * (x.dim() - 2)
    mean, var = (t.repeat_interleave(len(x) // len(t), 0).view(len(x), -1, *ones)
                 for t in (mean, var))  # fmt: skip
    weight, bias = (t.view(1, -1, *ones) for t in (weight, bias))
    return weight * (x - mean) / (var + eps).sqrt() + bias


def buffers(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.named_buffers()}


def grads(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def same(found, expected, **close):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], msg=lambda s, n=name: f"{n}: {s}", **close
        )


# ---- fused statistics


@pytest.mark.parametrize("gain", [0.0, 0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_fused_moments_are_those_of_the_mixture(gain, offset):
    expected = offset + torch.randn(3, 4, 50, dtype=DOUBLE)
    seen = torch.randn(3, 4, 30, dtype=DOUBLE) + torch.randn(3, 4, 1, dtype=DOUBLE) + offset
    together = torch.cat([expected, seen], 2)
    shares = torch.tensor([(1 - gain) / 50, gain / 30], dtype=DOUBLE)
    weight = shares.repeat_interleave(torch.tensor([50, 30]))
    mean = together @ weight
    var = (together - mean.unsqueeze(2)).square() @ weight
    moments = [(t.mean(2), t.var(2, correction=0)) for t in (expected, seen)]
    torch.testing.assert_close(fused(*moments, gain), (mean, var), rtol=1e-12, atol=1e-12)


def test_gain_one_is_batch_norm_and_gain_zero_the_prior_alone():
    x, prior = 3 + 2 * torch.randn(6, 4, 5, 5, dtype=DOUBLE), prior_of()
    affine = torch.randn(4, dtype=DOUBLE), torch.randn(4, dtype=DOUBLE)
    y, told = batch_kalman_norm(x, Moments(*prior, 1), *affine, gain=1.0)
    by_torch = F.batch_norm(x, None, None, *affine, training=True)
    torch.testing.assert_close(y, by_torch, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tuple(told[:2]), observed_in(x), rtol=1e-12, atol=1e-12)
    y, told = batch_kalman_norm(x, Moments(*prior, 1), *affine, gain=0.0)
    by_prior = F.batch_norm(x, *(t[0] for t in prior), *affine, training=False)
    torch.testing.assert_close(y, by_prior, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tuple(told[:2]), prior, rtol=1e-12, atol=1e-12)
    y, told = batch_kalman_norm(x, None, *affine)
    torch.testing.assert_close(y, by_torch, rtol=1e-12, atol=1e-12)
    assert told.positions == 150


PRIORS = {
    "near": ([9.0, 9.0], [1.0, 1.0], True),
    "99 times": ([99.0, 99.0], [1.0, 1.0], True),
    "100 times": ([100.0, 100.0], [1.0, 1.0], False),
    "one channel, but not on average": ([190.0, 1.0], [1.0, 1.0], True),
    "one channel, and on average": ([250.0, 1.0], [1.0, 1.0], False),
    "not a number": ([math.nan, 1.0], [1.0, 1.0], False),
    "infinite": ([1.0, math.inf], [1.0, 1.0], False),
    "nothing varies": ([3.0, 3.0], [0.0, 0.0], True),
    "one channel does not vary": ([1e6, 2.0], [0.0, 1.0], True),
    "one does not vary, the other is far": ([1.0, 150.0], [0.0, 1.0], False),
    "not a number where nothing varies": ([math.nan, 1.0], [0.0, 1.0], False),
    "infinite where nothing varies": ([math.inf, 1.0], [0.0, 1.0], False),
    "not a number, nothing varies": ([math.nan, 1.0], [0.0, 0.0], False),
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_out_of_reach_is_left_aside_for_the_layer(name):
    var, seen, used = PRIORS[name]
    prior = torch.zeros(1, 2, dtype=DOUBLE), torch.tensor([var], dtype=DOUBLE)
    seen = torch.ones(1, 2, dtype=DOUBLE), torch.tensor([seen], dtype=DOUBLE)
    found = fused(trusted(prior, seen), seen, 0.1)
    assert all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found, mixed(prior, seen, 0.1) if used else seen)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_predicted_mean_that_is_not_finite_is_left_aside(value):
    prior = torch.tensor([[value, 0]], dtype=DOUBLE), torch.ones(1, 2, dtype=DOUBLE)
    seen = torch.ones(1, 2, dtype=DOUBLE), torch.ones(1, 2, dtype=DOUBLE)
    torch.testing.assert_close(fused(trusted(prior, seen), seen, 0.1), seen)


def leaves(parts, dtype=DOUBLE):
    x = torch.randn(4, 3, 2, 2, dtype=dtype)
    given = [x, *prior_of(parts, 3), torch.randn(3), torch.randn(3), torch.tensor(0.3)]
    return [t.to(dtype).requires_grad_() for t in given]


def told_by(x, mean, var, weight, bias, gain, *, parts):
    prior = Moments(mean, var, 1)
    y, moments = batch_kalman_norm(x, prior, weight, bias, gain=gain, parts=parts)
    return y, *moments[:2]


@pytest.mark.parametrize("parts", [1, 2])
def test_derivatives_by_differences(parts):
    def run(*given):
        return told_by(*given, parts=parts)

    assert torch.autograd.gradcheck(run, leaves(parts))
    assert torch.autograd.gradgradcheck(run, leaves(parts))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("ends", [(0, 1, 2), (0,), (1, 2)], ids=["all", "output", "moments"])
def test_gradients_are_those_of_plain_operations(learned, ends):
    x, mean, var, weight, bias, gain = given = leaves(2)
    q = gain if learned else 0.3
    by = mixed((mean, var), observed_in(x, 2), q)
    expected = normalized(x, *by, weight, bias), *by
    found = told_by(x, mean, var, weight, bias, q, parts=2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    seeds = [torch.randn_like(t) for t in expected]
    both = (
        torch.autograd.grad([of[i] for i in ends], given, [seeds[i] for i in ends],
                            allow_unused=True, materialize_grads=True)
        for of in (found, expected)
    )  # fmt: skip
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)


def test_without_a_prior_gradients_are_batch_norms():
    x, _, _, weight, bias, _ = leaves(1)
    y, _ = batch_kalman_norm(x, None, weight, bias)
    expected = F.batch_norm(x, None, None, weight, bias, training=True)
    dy = torch.randn_like(y)
    found, exact = (torch.autograd.grad(t, (x, weight, bias), dy) for t in (y, expected))
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_vmap_over_everything():
    stacked = [torch.stack(of) for of in zip(leaves(2), leaves(2), leaves(2), strict=True)]

    def run(*given):
        return told_by(*given, parts=2)

    expected = [torch.stack(of) for of in zip(*(run(*g) for g in zip(*stacked, strict=True)),
                                              strict=True)]  # fmt: skip
    found = torch.vmap(run)(*stacked)
    torch.testing.assert_close(list(found), expected)
    given = leaves(2)
    jacobian = torch.func.jacrev(run, argnums=tuple(range(6)))(*given)
    exact = torch.autograd.functional.jacobian(run, tuple(given))
    torch.testing.assert_close(jacobian, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_statistics_in_float32(dtype):
    x = (5 + torch.randn(8, 4, 16, 16)).to(dtype)
    mean, var = prior_of(dtype=torch.float32)
    weight, bias = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    y, told = batch_kalman_norm(x, Moments(mean, var, 1), weight, bias, gain=0.5)
    assert (y.dtype, told.mean.dtype, told.var.dtype) == (dtype, torch.float32, torch.float32)
    exact = mixed((mean.double(), var.double()), observed_in(x.double()), 0.5)
    torch.testing.assert_close([t.double() for t in told[:2]], list(exact), rtol=1e-5, atol=1e-5)
    expected = normalized(x.double(), *exact, weight.double(), bias.double())
    assert (y - expected).norm() < torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("shape", [(4, 8, 6, 5), (4, 8, 3, 4, 5)])
def test_the_layout_stays(shape):
    x = channels_last(torch.randn(shape)).requires_grad_()
    affine = torch.ones(8), torch.zeros(8)
    prior = Moments(*prior_of(2, 8, torch.float32), 1)
    y, _ = batch_kalman_norm(x, prior, *affine, parts=2)
    assert y.stride() == x.stride()
    (dx,) = torch.autograd.grad(y, x, channels_last(torch.randn(shape)))
    assert dx.stride() == x.stride()
    other, _ = batch_kalman_norm(x.contiguous(), prior, *affine, parts=2)
    torch.testing.assert_close(y, other)


def test_a_mean_far_larger_than_the_deviation():
    x = 1e4 + torch.randn(4, 8, 12, 12)
    prior = torch.full((1, 8), 1e4 + 1), torch.full((1, 8), 1.5)
    y, told = batch_kalman_norm(x, Moments(*prior, 1), torch.ones(8), torch.zeros(8), gain=0.4)
    exact = mixed([p.double() for p in prior], observed_in(x.double()), 0.4)
    expected = normalized(x.double(), *exact, torch.ones(8), torch.zeros(8))
    assert (y - expected).norm() < 3e-3 * expected.norm()
    torch.testing.assert_close(told.mean.double(), exact[0], rtol=3e-7, atol=0)
    torch.testing.assert_close(told.var.double(), exact[1], rtol=1e-3, atol=0)


# ---- which layers have a prior


def conv_bn(into, out, size=3, **options):
    return nn.Sequential(
        nn.Conv2d(into, out, size, padding=size // 2, bias=False, **options), nn.BatchNorm2d(out)
    )


def chain(*widths, act=nn.ReLU, kind=nn.Conv2d, norm=nn.BatchNorm2d) -> nn.Sequential:
    """Convolutions with norm and activation."""
    layers = []
    for into, out in pairwise(widths):
        layers += [kind(into, out, 3, padding=1, bias=False), norm(out), act()]
    return nn.Sequential(*layers)


class PreActivation(nn.Module):
    def __init__(self, into, out):
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(into), nn.Conv2d(into, out, 3, 1, 1)
        self.n2, self.c2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1)
        self.short = nn.Conv2d(into, out, 1) if into != out else None

    def forward(self, x):
        y = F.relu(self.n1(x))
        z = self.c2(F.relu(self.n2(self.c1(y))))
        return z + (x if self.short is None else self.short(y))


class PostActivation(nn.Module):
    def __init__(self, into, out, stride=1):
        super().__init__()
        self.a, self.b = conv_bn(into, out, stride=stride), conv_bn(out, out)
        self.short = conv_bn(into, out, 1, stride=stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x))) + self.short(x))


def inception(m, x):
    x = F.relu(m.stem(x))
    pooled = m.pooled(F.max_pool2d(x, 3, 1, 1))
    return m.last(torch.cat([F.relu(m.one(x)), F.relu(m.three(x)), F.relu(pooled)], 1))


def dense(m, x):
    x = m.stem(x)
    for norm, layer in ((m.na, m.a), (m.nb, m.b)):
        x = torch.cat([x, layer(F.relu(norm(x)))], 1)
    return F.relu(m.nc(x))


def in_the_way(m, x):
    x = F.relu(m.a(x))
    return m.c(m.b(x).softmax(1))


NETS = {
    "chain": lambda: chain(3, 4, 6, 5),
    "vgg": lambda: nn.Sequential(
        *chain(3, 4, 4), nn.MaxPool2d(2), *chain(4, 6, 6), nn.AvgPool2d(2), nn.Dropout(0.2),
        nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3),
    ),
    "pre-activation": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), PreActivation(4, 4), PreActivation(4, 6), nn.BatchNorm2d(6),
    ),
    "pre-activation, stem": lambda: nn.Sequential(
        conv_bn(3, 4), nn.ReLU(), PreActivation(4, 4), PreActivation(4, 6), nn.BatchNorm2d(6)
    ),
    "post-activation": lambda: nn.Sequential(
        conv_bn(3, 4), nn.ReLU(), PostActivation(4, 4), PostActivation(4, 6, 2)
    ),
    "inception": lambda: Net(
        inception, stem=conv_bn(3, 4), one=conv_bn(4, 3, 1), three=conv_bn(4, 5),
        pooled=conv_bn(4, 2, 1), last=conv_bn(10, 6),
    ),
    "dense": lambda: Net(
        dense, stem=conv_bn(3, 4), na=nn.BatchNorm2d(4), a=nn.Conv2d(4, 3, 3, padding=1),
        nb=nn.BatchNorm2d(7), b=nn.Conv2d(7, 3, 3, padding=1), nc=nn.BatchNorm2d(10),
    ),
    "in the way": lambda: Net(
        in_the_way, a=conv_bn(3, 4), b=conv_bn(4, 4), c=conv_bn(4, 4)
    ),
    "1d": lambda: chain(3, 4, 6, kind=nn.Conv1d, norm=nn.BatchNorm1d),
    "linear": lambda: nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)
    ),
}  # fmt: skip
INPUT = "it reads the network's input"
FOUND = {
    "chain": ({"4": ["1"], "7": ["4"]}, {"1": INPUT}),
    "vgg": (
        {"4": ["1"], "8": ["4"], "11": ["8"], "16": ["11"], "20": ["16"]},
        {"1": INPUT},
    ),
    "pre-activation": (
        {"1.n2": ["1.n1"], "2.n2": ["2.n1"], "3": ["2.n1", "2.n2"]},
        {"1.n1": INPUT, "2.n1": INPUT},
    ),
    "pre-activation, stem": (
        {
            "2.n1": ["0.1"],
            "2.n2": ["2.n1"],
            "3.n1": ["0.1", "2.n2"],
            "3.n2": ["3.n1"],
            "4": ["3.n1", "3.n2"],
        },
        {"0.1": INPUT},
    ),
    "post-activation": (
        {
            "2.a.1": ["0.1"],
            "2.b.1": ["2.a.1"],
            "3.a.1": ["0.1", "2.b.1"],
            "3.b.1": ["3.a.1"],
            "3.short.1": ["0.1", "2.b.1"],
        },
        {"0.1": INPUT},
    ),
    "inception": (
        {
            "one.1": ["stem.1"],
            "three.1": ["stem.1"],
            "pooled.1": ["stem.1"],
            "last.1": ["one.1", "pooled.1", "three.1"],
        },
        {"stem.1": INPUT},
    ),
    "dense": (
        {"na": ["stem.1"], "nb": ["na", "stem.1"], "nc": ["na", "nb", "stem.1"]},
        {"stem.1": INPUT},
    ),
    "in the way": (
        {"b.1": ["a.1"]},
        {"a.1": INPUT, "c.1": "softmax is on the way, which has no closed form here"},
    ),
    "1d": ({"4": ["1"]}, {"1": INPUT}),
    "linear": ({"4": ["1"]}, {"1": INPUT}),
}


def shape_of(name: str, batch: int = 2, size: int = 8) -> tuple[int, ...]:
    return {"1d": (batch, 3, size), "linear": (batch, 3)}.get(name, (batch, 3, size, size))


def built(name: str, dtype=torch.float32, **options):
    net = randomized_(NETS[name]()).to(dtype).train()
    return kalmanize(net, torch.zeros(shape_of(name), dtype=dtype), **options)


@pytest.mark.parametrize("name", NETS)
def test_which_layers_have_a_prior_and_why_others_have_none(name):
    kalman = built(name)
    priors = {path: sorted(of) for path, of in kalman.priors.items()}
    assert (priors, kalman.without) == FOUND[name]
    assert all(path in kalman.table() for path in [*kalman.priors, *kalman.without])
    assert kalman.to_dict() == {"priors": kalman.priors, "without": kalman.without}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("transition", "propagate"),
    [("layer", "raw"), ("linear", "observed"), ("layer", "normalized")],
)
def test_it_trains_at_other_sizes_and_all_parameters_have_gradients(name, transition, propagate):
    kalman = built(name, transition=transition, propagate=propagate, learn_gain=True)
    heard = {}
    kalman.listen(lambda path, prior, *_: heard.update({path: prior}))
    for batch, size in ((5, 12), (3, 17)):
        heard.clear()
        x = torch.randn(shape_of(name, batch, size))
        y = kalman(x)
        assert {path for path, prior in heard.items() if prior is not None} == set(kalman.priors)
        assert {path for path, prior in heard.items() if prior is None} == set(kalman.without)
        kalman.zero_grad()
        (y * torch.randn_like(y)).sum().backward()
        missing = [n for n, p in kalman.named_parameters() if p.grad is None]
        assert missing == []
        assert all(p.grad.isfinite().all() for p in kalman.parameters())
    names = {n.rpartition(".")[0].removeprefix("network.") for n, _ in kalman.named_parameters()
             if n.endswith("gain_logit")}  # fmt: skip
    assert names == set(kalman.priors)


def resized(m, x):
    x = m.a(x)
    return m.c(torch.cat([x, F.interpolate(m.b(F.relu(x)), scale_factor=2.0)], 1))


def test_resized_maps_at_other_sizes():
    net = Net(resized, a=conv_bn(3, 4), b=conv_bn(4, 4, stride=2), c=nn.BatchNorm2d(8))
    kalman = kalmanize(net, torch.zeros(2, 3, 8, 8)).train()
    for size in (8, 16):
        assert kalman(torch.randn(2, 3, size, size)).isfinite().all()


@pytest.mark.parametrize("name", ["vgg", "in the way"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(name, training):
    model = NETS[name]().train(training)
    state = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    kalman = kalmanize(model, torch.zeros(shape_of(name)))
    assert kalman.training == training
    kalman.train()(torch.randn(shape_of(name))).sum().backward()
    assert [type(m) for m in model.modules()] == kinds
    assert [m.training for m in model.modules()] == [training] * len(kinds)
    same(model.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_drawn():
    kalman = built("post-activation", normalization_batch=1)
    before = torch.get_rng_state()
    kalman(torch.ones(2, 3, 8, 8)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_where_there_is_no_prior_a_layer_is_batch_norm():
    kalman = built("in the way", DOUBLE, gain=0.1)
    given = {}
    kalman.network.c[1].register_forward_hook(lambda m, x, y: given.update(x=x[0], y=y))
    kalman(torch.randn(3, 3, 8, 8, dtype=DOUBLE))
    layer = kalman.network.c[1]
    expected = F.batch_norm(given["x"], None, None, layer.weight, layer.bias, training=True)
    torch.testing.assert_close(given["y"], expected)


# ---- whole networks, against the method written out


def residual(m, x):
    x = m.stem(x)
    y = m.b(F.relu(m.a(F.relu(x))))
    return F.relu(m.last(F.relu(x + y)))


def residual_net(**options):
    net = Net(
        residual,
        stem=conv_bn(3, 4),
        a=nn.Sequential(nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 1), groups=2), nn.BatchNorm2d(6)),
        b=nn.Sequential(nn.Conv2d(6, 4, 5, (1, 1), (2, 0)), nn.BatchNorm2d(4)),
        last=conv_bn(4, 5, stride=2),
    )
    net.stem[0].stride, net.b[0].padding = (2, 1), (2, 2)
    net.a[0].stride, net.a[0].padding, net.a[0].kernel_size = (1, 1), (1, 1), (3, 3)
    net.a[0].weight = nn.Parameter(torch.randn(6, 2, 3, 3) / 4)
    net = randomized_(net).double().train()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("0.weight"):
                p.mul_(2)
    return kalmanize(net, torch.zeros(2, 3, 6, 9, dtype=DOUBLE), **options).double()


def rectified(mean, var):
    std = var.sqrt()
    above = torch.special.ndtr(mean / std)
    middle = std * torch.exp(-(mean**2) / (2 * var)) / math.sqrt(2 * math.pi)
    first = mean * above + middle
    return first, (mean**2 + var) * above + mean * middle - first**2


class ByHand:
    """The forward of ``residual``, one part of a batch, by maps of every position."""

    def __init__(self, network, gain, propagate, transition):
        self.network, self.gain = network, gain
        self.propagate, self.transition = propagate, transition
        self.found = {}

    def __call__(self, x):
        net = self.network
        x, told_x = self.normalized("stem", net.stem[0](x), None, [])
        size = x.shape[2:]
        prior = self.predicted(net.a[0], rectified(*told_x), size)
        a, told_a = self.normalized("a", net.a[0](x.relu()), prior, [told_x])
        prior = self.predicted(net.b[0], rectified(*told_a), size)
        b, told_b = self.normalized("b", net.b[0](a.relu()), prior, [told_a])
        joint = rectified(told_x[0] + told_b[0], told_x[1] + told_b[1])
        prior = self.predicted(net.last[0], joint, size)
        return self.normalized("last", net.last[0]((x + b).relu()), prior, [told_x, told_b])[
            0
        ].relu()

    def predicted(self, conv, moments, size):
        maps = [t.view(1, -1, 1, 1).expand(-1, -1, *size) for t in moments]
        mean = conv(maps[0])
        var = F.conv2d(maps[1], conv.weight**2, None, conv.stride, conv.padding, 1, conv.groups)
        mean, var = mean.flatten(2)[0], var.flatten(2)[0]
        return mean.mean(1), var.mean(1) + mean.var(1, correction=0)

    def normalized(self, name, x, prior, sources):
        layer = getattr(self.network, name)[1]
        rows = x.transpose(0, 1).flatten(1)
        seen = rows.mean(1), rows.var(1, correction=0)
        if prior is not None and self.transition == "linear":
            mean, var = 0, layer.transition.log_noise.exp()
            for weight, (m, v) in zip(layer.transition.weights, sources, strict=True):
                mean, var = mean + weight @ m, var + weight**2 @ v
            prior = mean, var
        q = self.gain if layer.gain_logit is None else layer.gain_logit.sigmoid()
        mean, var = seen if prior is None else mixed(prior, seen, q)
        assert prior is None or (prior[1] / seen[1]).mean() < 100
        shape = 1, -1, 1, 1
        std = (var + layer.eps).sqrt()
        y = layer.weight.view(shape) * (x - mean.view(shape)) / std.view(shape)
        y = y + layer.bias.view(shape)
        told = {
            "raw": (mean, var),
            "observed": (
                layer.bias + layer.weight * (seen[0] - mean) / std,
                layer.weight**2 * seen[1] / (var + layer.eps),
            ),
            "normalized": (layer.bias, layer.weight**2),
        }[self.propagate]
        share = 1 if prior is None else q
        self.found[name] = mean, var + share * seen[1] / (rows.shape[1] - 1)
        return y, told


@pytest.mark.parametrize("propagate", PROPAGATE)
@pytest.mark.parametrize("transition", ["layer", "linear"])
@pytest.mark.parametrize("learn_gain", [False, True])
@pytest.mark.parametrize(("samples", "size"), [(4, None), (6, 2), (7, 2), (3, 1)])
def test_a_forward_is_the_method_written_out(propagate, transition, learn_gain, samples, size):
    kalman = residual_net(
        gain=0.3, propagate=propagate, transition=transition, learn_gain=learn_gain,
        normalization_batch=size,
    )  # fmt: skip
    with torch.no_grad():
        for name, p in kalman.named_parameters():
            if "transition" in name or "gain" in name:
                p.add_(0.1 * torch.randn_like(p))
    before = buffers(kalman.network)
    by_hand = ByHand(kalman.network, 0.3, propagate, transition)
    x = torch.randn(samples, 3, 6, 9, dtype=DOUBLE)
    outputs, founds = [], []
    for part in x.split(size or samples):
        outputs.append(by_hand(part))
        founds.append(by_hand.found)
        by_hand.found = {}
    expected, y = torch.cat(outputs), kalman(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    dy = torch.randn_like(y)
    parameters = list(kalman.parameters())
    found, exact = (torch.autograd.grad(t, parameters, dy) for t in (y, expected))
    for (name, _), ours, theirs in zip(kalman.named_parameters(), found, exact, strict=True):
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm() + 1e-11, name
    if size is None or samples % size == 0:
        for name in founds[0]:
            mean, var = (torch.stack([f[name][i] for f in founds]).mean(0) for i in (0, 1))
            for which, now in (("running_mean", mean), ("running_var", var)):
                path = f"{name}.1.{which}"
                followed = before[path].lerp(now, 0.1)
                torch.testing.assert_close(kalman.network.get_buffer(path), followed)


def test_what_is_learned_is_of_the_networks_precision():
    kalman = built("chain", DOUBLE, transition="linear", learn_gain=True)
    assert {p.dtype for p in kalman.parameters()} == {DOUBLE}


@pytest.mark.parametrize("propagate", PROPAGATE)
@pytest.mark.parametrize("transition", ["layer", "linear"])
def test_each_part_is_as_if_it_were_alone(propagate, transition):
    options = {"propagate": propagate, "transition": transition}
    kalman = residual_net(normalization_batch=2, **options)
    alone = copy.deepcopy(kalman)
    for layer in alone.modules():
        if isinstance(layer, BatchKalmanNorm):
            layer.normalization_batch = None
    x = torch.randn(7, 3, 6, 9, dtype=DOUBLE)
    parts = torch.cat([alone(part) for part in x.split(2)])
    y = kalman(x)
    torch.testing.assert_close(y, parts, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(y)
    y.backward(dy)
    parts.backward(dy)
    same(grads(kalman), grads(alone), rtol=1e-8, atol=1e-9)


def test_running_variances_are_averages_of_unbiased_ones():
    whole = BatchKalmanNorm1d(4, normalization_batch=3, momentum=1.0, dtype=DOUBLE)
    x = torch.randn(5, 4, 6, dtype=DOUBLE)
    whole(x)
    seen = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in x.split(3)])
    torch.testing.assert_close(whole.running_var, seen.mean(0))


def test_learned_gains_start_where_they_are_told_and_move():
    kalman, fixed = (residual_net(gain=0.2, learn_gain=learn) for learn in (True, False))
    fixed.load_state_dict({k: v for k, v in kalman.state_dict().items() if "gain" not in k})
    x = torch.randn(4, 3, 6, 9, dtype=DOUBLE)
    torch.testing.assert_close(kalman(x), fixed(x))
    optimizer = torch.optim.SGD(kalman.parameters(), 0.1)
    kalman(x).square().sum().backward()
    optimizer.step()
    gains = [m.gain_logit.sigmoid().item() for m in kalman.modules()
             if isinstance(m, BatchKalmanNorm) and m.gain_logit is not None]  # fmt: skip
    assert len(gains) == 3
    assert all(abs(gain - 0.2) > 1e-6 for gain in gains)


def test_a_residual_branch_that_starts_at_zero_has_finite_gradients():
    for propagate in PROPAGATE:
        kalman = residual_net(propagate=propagate)
        nn.init.zeros_(kalman.network.b[1].weight)
        nn.init.zeros_(kalman.network.a[1].weight)
        kalman(torch.randn(4, 3, 6, 9, dtype=DOUBLE)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in kalman.parameters())


# ---- tapes


def trained(kalman, x):
    """A forward and its gradients."""
    y = kalman(x)
    y.square().sum().backward()
    return y


def test_two_threads_at_once_do_not_see_each_other():
    kalman, x = residual_net(), torch.randn(2, 4, 3, 6, 9, dtype=DOUBLE)
    expected = [kalman(of) for of in x]
    meet, found = threading.Barrier(2, timeout=30), {}

    def run(i):
        found[i] = kalman(x[i])

    for name in ("stem", "a", "b"):  # both are between the same two layers
        getattr(kalman.network, name).register_forward_hook(lambda *_: meet.wait() * 0 or None)
    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_forward_inside_a_forward():
    kalman, x = residual_net(), torch.randn(2, 4, 3, 6, 9, dtype=DOUBLE)
    expected, inside = [kalman(of) for of in x], []

    def once_more(*_):
        if not inside:
            inside.append(None)
            inside.append(kalman(x[1]))

    kalman.network.a.register_forward_hook(once_more)
    assert torch.equal(kalman(x[0]), expected[0])
    assert torch.equal(inside[1], expected[1])


def test_an_error_leaves_no_tape_open():
    kalman, x = residual_net(), torch.randn(4, 3, 6, 9, dtype=DOUBLE)
    expected = kalman.network(x)

    def fail(*_):
        raise ArithmeticError

    hook = kalman.network.b.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        kalman(x)
    hook.remove()
    assert torch.equal(kalman.network(x), expected)
    assert not torch.equal(kalman(x), expected)


def test_the_network_by_itself_is_the_models_batch_norm():
    model = randomized_(NETS["post-activation"]()).double().train()
    kalman = kalmanize(model, torch.zeros(2, 3, 8, 8, dtype=DOUBLE))
    for training in (True, False):
        x = torch.randn(4, 3, 8, 8, dtype=DOUBLE)
        y, expected = kalman.train(training).network(x), model.train(training)(x)
        torch.testing.assert_close(y, expected)
        model.zero_grad(), kalman.zero_grad()
        expected.square().sum().backward(), y.square().sum().backward()
        same(grads(kalman.network), grads(model), rtol=1e-7, atol=1e-8)
    same(buffers(kalman.network), buffers(model))


def again(m, x):
    """With the middle done again in backward."""
    call = (
        (lambda part, x: checkpoint(part, x, use_reentrant=False))
        if m.again
        else nn.Module.__call__
    )
    x = m.stem(x)
    return m.last(F.relu(x + call(m.middle, F.relu(x))))


def checkpointed(**options):
    net = Net(again, stem=conv_bn(3, 4), middle=chain(4, 4, 5)[:-1].append(conv_bn(5, 4)),
              last=conv_bn(4, 5))  # fmt: skip
    net.again = False
    net = randomized_(net).double().train()
    return kalmanize(net, torch.zeros(2, 3, 8, 8, dtype=DOUBLE), **options).double()


RECOMPUTED = [
    {"propagate": "raw", "learn_gain": True, "normalization_batch": 3},
    {"propagate": "observed", "normalization_batch": 2},
    {"propagate": "normalized", "learn_gain": True},
    {"propagate": "raw", "transition": "linear", "learn_gain": True},
    {"propagate": "observed", "transition": "linear", "normalization_batch": 3},
    {},
]


@pytest.mark.parametrize("options", RECOMPUTED, ids=str)
@pytest.mark.parametrize("what", ["middle", "all", "both"])
def test_recomputation_gives_the_same_and_updates_nothing(options, what):
    kalman = checkpointed(**options)
    other = copy.deepcopy(kalman)
    other.network.again = what != "all"
    x = torch.randn(2, 4, 3, 8, 8, dtype=DOUBLE)
    call = nn.Module.__call__ if what == "middle" else checkpoint
    how = {} if what == "middle" else {"use_reentrant": False}
    for _ in range(2):  # both forwards, then both backwards
        expected = [kalman(of) for of in x]
        found = [call(other, of, **how) for of in x]
        assert all(map(torch.equal, found, expected))
        for outputs in (found, expected):
            for y in outputs:
                y.square().sum().backward()
        same(grads(other), grads(kalman), rtol=0, atol=0)
        same(buffers(other), buffers(kalman), rtol=0, atol=0)


@pytest.mark.parametrize("what", ["middle", "all"])
def test_reentrant_recomputation_is_right_or_refused(what):
    kalman = checkpointed()
    other, x = copy.deepcopy(kalman), torch.randn(4, 3, 8, 8, dtype=DOUBLE)
    trained(kalman, x)
    if what == "middle":
        part, inside = other.network.middle, other.network.middle.forward
        part.forward = lambda t: checkpoint(inside, t, use_reentrant=True)
    try:
        y = other(x) if what == "middle" else checkpoint(
            other, x.clone().requires_grad_(), use_reentrant=True
        )  # fmt: skip
        y.square().sum().backward()
    except ConfigError:
        return
    same(grads(other), grads(kalman), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("propagate", ["raw", "observed"])
@pytest.mark.parametrize("frozen", ["stem", "a", "b"])
def test_a_frozen_layer_in_a_network_that_trains_tells_its_running_statistics(propagate, frozen):
    kalman = residual_net(propagate=propagate, normalization_batch=2)
    layer = getattr(kalman.network, frozen)[1].eval()
    before, heard = buffers(layer), {}
    kalman.listen(lambda path, prior, *_: heard.update({path: prior}))
    kalman(torch.randn(5, 3, 6, 9, dtype=DOUBLE)).sum().backward()
    same(buffers(layer), before, rtol=0, atol=0)
    assert f"{frozen}.1" not in heard
    assert all(heard[path] is not None for path in kalman.priors if path != f"{frozen}.1")
    assert all(p.grad is not None for p in kalman.parameters())
    if frozen != "a":
        return
    told = layer.running_mean, layer.running_var
    if propagate == "observed":
        scale = layer.weight / (told[1] + layer.eps).sqrt()
        told = layer.bias, scale.square() * told[1]
    by_hand = ByHand(kalman.network, 0.1, propagate, "layer")
    exact = by_hand.predicted(kalman.network.b[0], rectified(*told), (3, 9))
    for found, of in zip(heard["b.1"], exact, strict=True):
        torch.testing.assert_close(found, of.expand(3, -1))


def twice(m, x):
    return m.norm(m.b(F.relu(m.norm(m.a(x)))))


def under_two_names(m, x):
    return m.second(m.b(F.relu(m.first(m.a(x)))))


@pytest.mark.parametrize("names", [["norm"], ["first", "second"]])
def test_a_normalizer_that_is_used_twice(names):
    norm = nn.BatchNorm2d(4)
    net = Net(twice if len(names) == 1 else under_two_names, a=nn.Conv2d(3, 4, 3, padding=1),
              b=nn.Conv2d(4, 4, 3, padding=1), **dict.fromkeys(names, norm))  # fmt: skip
    kalman = kalmanize(net.train(), torch.zeros(2, 3, 8, 8))
    heard = []
    kalman.listen(lambda path, prior, *_: heard.append(prior))
    y = kalman(torch.randn(4, 3, 8, 8))
    assert [prior is None for prior in heard] == [True, False]
    y.square().sum().backward()
    assert all(p.grad is not None for p in kalman.parameters())
    assert kalman.priors


# ---- eval mode and state


@pytest.mark.parametrize("name", ["chain", "vgg", "post-activation", "1d", "linear"])
def test_in_eval_mode_it_is_batch_norm_exactly(name):
    kalman = built(name, learn_gain=True)
    for _ in range(3):
        kalman(torch.randn(shape_of(name, 4)))
    plain = kalman.eval().to_batch_norm()
    assert not any(isinstance(m, BatchKalmanNorm) for m in plain.modules())
    originals = [type(m) for m in NETS[name]().modules()]
    assert [type(m) for m in plain.modules()] == originals
    x = torch.randn(shape_of(name, 5, 12))
    assert torch.equal(kalman(x), plain(x))
    same(kalman.to_batch_norm().state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, DOUBLE])
@pytest.mark.parametrize("scale", [1, 1000])
def test_in_eval_mode_it_is_batch_norm_exactly_in_any_precision(dtype, scale):
    kalman = built("chain").to(dtype)
    for _ in range(3):
        kalman((scale * torch.randn(4, 3, 8, 8)).to(dtype))
    x = (scale * torch.randn(4, 3, 8, 8)).to(dtype)
    assert torch.equal(kalman.eval()(x), kalman.to_batch_norm()(x))


def test_batch_norms_without_weights():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False))
    kalman = kalmanize(model.train(), torch.zeros(2, 3, 8, 8))
    kalman(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert not any(kalman.network.load_state_dict(model.state_dict(), strict=True))
    assert not any(kalman.to_batch_norm().load_state_dict(model.state_dict(), strict=True))


def test_it_folds_into_the_convolutions():
    kalman = built("chain", DOUBLE)
    for _ in range(3):
        kalman(torch.randn(4, 3, 8, 8, dtype=DOUBLE))
    plain = kalman.eval().to_batch_norm()
    folded = nn.Sequential(*(
        layer for conv, norm in zip(plain[::3], plain[1::3], strict=True)
        for layer in (fuse_conv_bn_eval(conv, norm), nn.ReLU())
    ))  # fmt: skip
    x = torch.randn(4, 3, 8, 8, dtype=DOUBLE)
    y = kalman(x)
    assert (folded(x) - y).norm() < 1e-6 * y.norm()


OPTIONS = [{}, {"learn_gain": True}, {"transition": "linear", "learn_gain": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "pickle"])
def test_copies_are_networks_of_their_own(options, way, tmp_path):
    kalman, x = residual_net(**options), torch.randn(4, 3, 6, 9, dtype=DOUBLE)
    with torch.no_grad():
        for p in kalman.parameters():
            p.add_(0.05 * torch.randn_like(p))
    trained(kalman, x)
    kalman.zero_grad()
    if way == "deepcopy":
        other = copy.deepcopy(kalman)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(kalman))
    else:
        other = residual_net(**options)
        if way == "file":
            ek.save(kalman, tmp_path / "kalman.safetensors")
            ek.load(tmp_path / "kalman.safetensors", model=other)
        else:
            assert not any(other.load_state_dict(kalman.state_dict(), strict=True))
    heard = []
    other.listen(lambda path, *_: heard.append(path))
    expected = trained(kalman, x)
    assert heard == []
    assert torch.equal(trained(other, x), expected)
    assert heard == ["stem.1", "a.1", "b.1", "last.1"]
    same(grads(other), grads(kalman), rtol=0, atol=0)
    same(other.state_dict(), kalman.state_dict(), rtol=0, atol=0)
    with torch.no_grad():  # priors of the copy are made from the copy's weights
        for p in kalman.parameters():
            p.mul_(2)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_checkpoint_of_batch_norm_loads(options):
    model = randomized_(NETS["post-activation"]()).train()
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    kalman = built("post-activation", **options)
    extra = {k: v.clone() for k, v in kalman.state_dict().items()
             if "gain" in k or "transition" in k}  # fmt: skip
    state = model.state_dict()
    names = set(state)
    assert not any(kalman.network.load_state_dict(state, strict=True))
    assert set(state) == names
    same({k: kalman.state_dict()[k] for k in extra}, extra, rtol=0, atol=0)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(kalman.eval()(x), model.eval()(x))


def test_gaps_in_a_checkpoint_are_noticed():
    kalman = built("chain")
    state = kalman.state_dict()
    state.pop("network.4.running_var")
    with pytest.raises(RuntimeError, match="running_var"):
        kalman.load_state_dict(state)


def test_it_exports_in_eval_mode():
    kalman = built("post-activation").eval()
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(kalman, (x,))
    torch.testing.assert_close(program.module()(x), kalman(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("residual", {"propagate": "observed"}),
        ("chain", {"transition": "linear", "learn_gain": True, "normalization_batch": 2}),
    ],
)
def test_compiled_it_is_the_same(name, options):
    kalman = residual_net(**options) if name == "residual" else built(name, **options).double()
    other = copy.deepcopy(kalman)
    torch.compiler.reset()
    fast = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(5, 3, 6, 9, dtype=DOUBLE)
        expected = trained(kalman, x)
        torch.testing.assert_close(trained(fast, x), expected, rtol=1e-9, atol=1e-9)
        same(grads(other), grads(kalman), rtol=1e-8, atol=1e-9)
        same(buffers(other), buffers(kalman), rtol=1e-9, atol=1e-9)


# ---- precision and hostile input


@pytest.mark.parametrize("transition", ["layer", "linear"])
def test_autocast_to_bfloat16(transition):
    kalman = built("post-activation", transition=transition, propagate="observed")
    exact, heard = copy.deepcopy(kalman), []
    kalman.listen(lambda path, prior, fused, seen: heard.extend([*(prior or ()), *fused, *seen]))
    x = torch.randn(8, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kalman(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in heard} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in kalman.parameters())
    expected = exact(x)
    assert (y - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, DOUBLE])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_any_precision_keeps_running_statistics_in_float32_or_better(dtype, options):
    kalman = built("post-activation", **options).to(dtype)
    exact = copy.deepcopy(kalman).double()
    x = torch.randn(8, 3, 8, 8).to(dtype)
    y = kalman(x)
    y.square().sum().backward()
    assert y.dtype == dtype
    assert all(p.grad.dtype == dtype for p in kalman.parameters())
    wide = torch.promote_types(dtype, torch.float32)
    for name, value in kalman.named_buffers():
        assert value.dtype == (torch.int64 if "tracked" in name else wide)
    expected = exact(x.double())
    assert (y - expected).norm() < 10 * torch.finfo(dtype).eps * expected.norm()
    assert kalman.eval()(x).dtype == dtype


def test_on_the_meta_device_and_off_it():
    kalman = built("post-activation", learn_gain=True)
    other = copy.deepcopy(kalman).to("meta")
    x = torch.zeros(2, 3, 8, 8, device="meta")
    assert other(x).is_meta
    assert other.eval()(x).is_meta
    other = other.to_empty(device="cpu").train()
    other.load_state_dict(kalman.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), kalman(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [None, 2])
def test_an_empty_batch_changes_nothing(training, size):
    kalman = built("chain", normalization_batch=size).train(training)
    before = buffers(kalman)
    y = kalman(torch.zeros(0, 3, 8, 8))
    assert y.shape == (0, 5, 8, 8)
    y.sum().backward()
    same(buffers(kalman), before, rtol=0, atol=0)


def test_one_value_per_channel_needs_a_prior():
    with pytest.raises(ShapeError, match="more than one value per channel to train on, or a prior"):
        built("linear")(torch.randn(1, 3))
    kalman = built("chain")
    kalman.network[0].stride = kalman.network[3].stride = (1, 1)
    net = nn.Sequential(conv_bn(3, 4), nn.ReLU(), nn.Conv2d(4, 6, 8), nn.BatchNorm2d(6))
    kalman = kalmanize(randomized_(net).train(), torch.zeros(2, 3, 8, 8))
    y = kalman(torch.randn(1, 3, 8, 8))
    assert y.shape == (1, 6, 1, 1)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in kalman.parameters())
    assert all(b.isfinite().all() for b in kalman.buffers())
    with pytest.raises(ShapeError, match="needs more than one value per channel"):
        kalman.network(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("kind", [BatchKalmanNorm, BatchKalmanNorm1d])
@pytest.mark.parametrize("size", [None, 1, 3])
def test_one_value_per_channel_of_the_layer_or_a_part(kind, size):
    samples = 1 if size is None else 4
    layer = kind(4, normalization_batch=size)
    with pytest.raises(ShapeError, match="more than one value per channel"):
        layer(torch.randn(samples, 4))
    same(buffers(layer), buffers(kind(4)), rtol=0, atol=0)
    assert layer.eval()(torch.randn(samples, 4)).isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("propagate", PROPAGATE)
@pytest.mark.parametrize("transition", ["layer", "linear"])
def test_input_that_is_not_finite_leaves_running_statistics_finite(value, propagate, transition):
    kalman = residual_net(propagate=propagate, transition=transition)
    x = torch.randn(4, 3, 6, 9, dtype=DOUBLE)
    clean = x.clone()
    x[1, 2, 3, 3] = value
    kalman(x)
    assert all(b.isfinite().all() for b in kalman.buffers())
    assert kalman(clean).isfinite().all()
    assert kalman.eval()(clean).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(BatchKalmanNorm1d, (6, 4)), (BatchKalmanNorm1d, (6, 4, 5)), (BatchKalmanNorm2d, (3, 4, 2, 5)),
     (BatchKalmanNorm3d, (3, 4, 2, 5, 3)), (BatchKalmanNorm, (3, 4, 2, 5))],
)  # fmt: skip
@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
def test_the_layer_alone_is_batch_norm(kind, shape, momentum):
    ours = randomized_(kind(4, momentum=momentum, eps=1e-3, dtype=DOUBLE))
    theirs = nn.BatchNorm1d(4, momentum=momentum, eps=1e-3, dtype=DOUBLE)
    theirs._check_input_dim = lambda x: None
    theirs.load_state_dict(ours.state_dict())
    for step in range(4):
        ours.train(step < 3), theirs.train(step < 3)
        x = 2 + 3 * torch.randn(shape, dtype=DOUBLE)
        torch.testing.assert_close(trained(ours, x), trained(theirs, x))
        same(grads(ours), grads(theirs))
        same(buffers(ours), buffers(theirs))


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gain": -0.1}, "gain must be from 0, the prior alone, to 1, batch norm; got -0.1"),
        ({"gain": 1.5}, "got 1.5"),
        ({"gain": math.nan}, "got nan"),
        ({"gain": 1.0, "learn_gain": True}, "must start between 0 and 1; got 1.0"),
        ({"normalization_batch": 0}, "normalization_batch must be 1 or more; got 0"),
        ({"normalization_batch": -2}, "got -2"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(ConfigError, match=says):
        BatchKalmanNorm(4, **options)
    with pytest.raises(ConfigError, match=says):
        built("chain", **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"transition": "liner"}, "Unknown transition 'liner'.*Did you mean 'linear'"),
        ({"propagate": "observd"}, "Unknown propagate 'observd'.*Did you mean 'observed'"),
        ({"propagate": "x"}, "Known: normalized, observed, raw"),
    ],
)
def test_options_that_are_not_known(options, says):
    with pytest.raises(ConfigError, match=says):
        built("chain", **options)


def test_a_model_without_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    with pytest.raises(ConfigError, match=r"batch norm.*Sequential has none.*GroupNorm is not a"):
        kalmanize(model, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "says"),
    [
        (BatchKalmanNorm1d, (2, 4, 4, 4), "2 or 3 dimensions"),
        (BatchKalmanNorm2d, (2, 4, 4), "4 dimensions"),
        (BatchKalmanNorm3d, (2, 4, 4, 4), "5 dimensions"),
        (BatchKalmanNorm2d, (2, 6, 4, 4), r"\(N, 4, \*spatial\); got \(2, 6, 4, 4\)"),
        (BatchKalmanNorm, (4,), "Channels are axis 1"),
    ],
)
def test_inputs_that_do_not_fit(kind, shape, says, training):
    layer = kind(4).train(training)
    with pytest.raises(ShapeError, match=says):
        layer(torch.zeros(shape))
    same(buffers(layer), buffers(kind(4)), rtol=0, atol=0)


def test_what_the_function_refuses():
    one, x = torch.ones(4), torch.randn(6, 4, 3)
    with pytest.raises(ConfigError, match="parts must divide the batch; got 4 for 6 samples"):
        batch_kalman_norm(x, None, one, one, parts=4)
    with pytest.raises(ConfigError, match="got 0 for 6"):
        batch_kalman_norm(x, None, one, one, parts=0)
    with pytest.raises(ShapeError, match=r"\(parts, channels\) = \(2, 4\); got \[\(1, 4\)"):
        batch_kalman_norm(x, Moments(*prior_of(), 1), one, one, parts=2)
    with pytest.raises(ShapeError, match=r"got \[\(4,\)"):
        batch_kalman_norm(x, Moments(one, one, 1), one, one)
    with pytest.raises(ShapeError, match="needs input of shape"):
        batch_kalman_norm(torch.randn(6, 3, 3), None, one, one)
    with pytest.raises(ShapeError, match="int64"):
        batch_kalman_norm(torch.zeros(6, 4, dtype=torch.int64), None, one, one)


def test_it_says_what_it_was_made_with():
    layer = BatchKalmanNorm2d(8, gain=0.3, learn_gain=True, normalization_batch=2)
    text = "BatchKalmanNorm2d(8, gain=0.3, learn_gain=True, normalization_batch=2)"
    assert repr(layer) == text
    other = BatchKalmanNorm2d(8, **layer.options())
    assert other.options() == layer.options()


# ---- several processes


def in_ddp(rank, folder):
    """Gradients and buffers of a network of which every process has a part of each batch."""
    torch.set_num_threads(1)
    wait = timedelta(seconds=15)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=wait)
    torch.manual_seed(0)
    kalman = residual_net(normalization_batch=2, learn_gain=True)
    parallel = DistributedDataParallel(kalman)
    parallel(batch_of_all()[4 * rank :][:4]).square().mean().backward()
    torch.save((grads(kalman), buffers(kalman)), f"{folder}/{rank}.pt")
    dist.barrier()  # one that leaves early may take the other with it
    dist.destroy_process_group()


def batch_of_all():
    return torch.randn(8, 3, 8, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


@pytest.mark.timeout(60)
def test_processes_that_normalize_their_own_samples_are_as_one_that_cuts_the_batch(tmp_path):
    mp.spawn(in_ddp, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    one = residual_net(normalization_batch=2, learn_gain=True)
    one(batch_of_all()).square().mean().backward()
    found, buffers_ = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), strict=True)
    for of in found:
        same(of, grads(one), rtol=1e-9, atol=1e-12)
    running = {name: t for name, t in buffers(one).items() if "running" in name}
    both = {name: (buffers_[0][name] + buffers_[1][name]) / 2 for name in running}
    same(both, running, rtol=1e-9, atol=1e-12)


def test_a_batch_that_was_cut_anew_on_the_way_has_no_prior():
    class Cuts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = conv_bn(3, 4), conv_bn(4, 4)

        def forward(self, x):
            y = self.first(x)
            return self.second(torch.cat([y, y]) if self.training else y)

    kalman, heard = kalmanize(Cuts(), torch.zeros(2, 3, 8, 8), normalization_batch=2).train(), {}
    assert set(kalman.priors) == {"second.1"}
    kalman.listen(lambda path, prior, *others: heard.update({path: prior}))
    kalman(torch.randn(4, 3, 8, 8))
    assert heard == {"first.1": None, "second.1": None}


def test_layers_without_weights_stay_so():
    net = nn.Sequential(
        *conv_bn(3, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)
    )
    kalman = kalmanize(net, torch.zeros(2, 3, 8, 8)).train()
    assert set(kalman.network.state_dict()) == set(net.state_dict())
    kalman(torch.randn(2, 3, 8, 8)).sum().backward()
    kalman.eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(kalman(x), kalman.to_batch_norm()(x))


def test_no_more_activations_are_kept_than_without_priors():
    net, x = models.build("resnet8_digits").train(), torch.randn(32, 1, 8, 8)
    kalman = kalmanize(net, x, normalization_batch=2)

    def kept(network):
        """Shapes of the activations, of 32 samples, that autograd holds on to."""
        seen = {}

        def note(t):
            seen[t.untyped_storage().data_ptr()] = t.shape
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            network(x).sum()
        return sorted(shape for shape in seen.values() if shape[:1] == (32,))

    convert_(net, lambda channels: GhostBatchNorm2d(channels, normalization_batch=2))
    assert kept(kalman) == kept(net)
