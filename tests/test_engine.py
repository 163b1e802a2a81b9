"""The engine under the normalizers: moments in one read, any program, and its exact derivative."""

import threading

import pytest
import torch
from torch.nn import functional as F
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from evenkeel.errors import ShapeError
from evenkeel.moments import Moments, measure, normalize, passes

EPS = 1e-5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SHAPES = [(5, 6), (5, 6, 7), (3, 6, 4, 5), (2, 6, 2, 3, 4)]
LARGE_SHAPE = (2, 8, 96, 96)  # beyond passes.LARGE


def batch_norm(moments, weight, bias):
    mean = moments.mean.mean(0)
    away = moments.mean - mean
    scale = weight * ((moments.var + away.square()).mean(0) + EPS).rsqrt()
    return scale.expand_as(away), away * scale + bias


def instance_norm(moments, weight, bias):
    return weight * (moments.var + EPS).rsqrt(), bias.expand_as(moments.mean)


def group_norm(moments, weight, bias, groups=2):
    mean, var = (m.unflatten(1, (groups, -1)) for m in moments[:2])
    away = mean - mean.mean(2, keepdim=True)
    inverse = ((var + away.square()).mean(2, keepdim=True) + EPS).rsqrt()
    scale = weight * inverse.expand_as(mean).flatten(1)
    return scale, scale * away.flatten(1) + bias


def layer_norm(moments, weight, bias):
    return group_norm(moments, weight, bias, groups=1)


def rows(tensor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(C,) in the shape that broadcasts against x."""
    return tensor.view(-1, *(1,) * (x.dim() - 2))


NORMS = {
    "batch": (batch_norm, lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True)),
    "instance": (instance_norm, lambda x, w, b: F.instance_norm(x, weight=w, bias=b)),
    "group": (group_norm, lambda x, w, b: F.group_norm(x, 2, w, b)),
    "layer": (layer_norm, lambda x, w, b: F.layer_norm(x, x.shape[1:]) * rows(w, x) + rows(b, x)),
}

# What a program may leave out, and the same in plain operations on activations.
PARTIAL = {
    "only the mean": (
        lambda m, w, b: (w.expand_as(m.mean), b + m.mean - m.mean.mean(0)),
        lambda x, m, v, w, b: rows(w, x) * (x - m) + rows(b, x) + m - m.mean(0),
    ),
    "only the variance": (
        lambda m, w, b: (w * (m.var + EPS).rsqrt(), b.expand_as(m.var)),
        lambda x, m, v, w, b: rows(w, x) * (v + EPS).rsqrt() * (x - m) + rows(b, x),
    ),
    "neither": (
        lambda m, w, b: (w.expand_as(m.mean), b.expand_as(m.mean)),
        lambda x, m, v, w, b: rows(w, x) * (x - m) + rows(b, x),
    ),
    "no parameter in the scale": (
        lambda m, w, b: (torch.ones_like(m.mean), w * b * m.mean),
        lambda x, m, v, w, b: x - m + rows(w * b, x) * m,
    ),
}


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def permuted(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x + 1], dim=-1)[..., 0]


LAYOUTS = [plain, channels_last, permuted, sliced]
BOTH = [plain, channels_last]


def by_name(value):
    return value.__name__ if callable(value) else None


def given(shape, dtype=torch.float32, layout=plain, *, grad=True, mean=1.0, deviation=2.0):
    """An input, and a weight and bias for its channels."""
    x = layout((mean + deviation * torch.randn(shape, dtype=torch.float64)).to(dtype))
    weight, bias = 0.5 + torch.rand(shape[1], dtype=dtype), torch.randn(shape[1], dtype=dtype)
    return [t.requires_grad_(grad) for t in (x.detach(), weight, bias)]


def applied(program, x, *parameters, relu=False):
    return normalize(x, measure(x), program, *parameters, relu=relu)


def gradients(function, leaves, dy):
    return torch.autograd.grad(function(*leaves), leaves, dy, allow_unused=True)


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of every sample and channel, in float64."""
    x = x.detach().double().reshape(*x.shape[:2], -1)
    mean = x.mean(2)
    return mean, (x - mean.unsqueeze(2)).square().mean(2)


def assert_moments(x: torch.Tensor, rtol: float, rtol_var: float | None = None) -> None:
    mean, var = reference(x)
    found = passes.sample_moments(x)
    assert all(m.dtype == passes.statistics_dtype(x) for m in found)
    deviation = var.sqrt() + mean.abs()
    assert ((found[0].double() - mean).abs() <= rtol * deviation).all()
    torch.testing.assert_close(found[1].double(), var, rtol=rtol_var or rtol, atol=0)


@pytest.fixture(params=["as is", "small tiles", "tiny tiles", "large", "no kernels"])
def way(request, monkeypatch):
    """Each of the ways to go through the activations."""
    if request.param == "small tiles":
        monkeypatch.setattr(passes, "TILE", 80)
    if request.param == "tiny tiles":
        monkeypatch.setattr(passes, "TILE", 7)
    if request.param == "large":
        monkeypatch.setattr(passes, "LARGE", 1)
    if request.param == "no kernels":
        monkeypatch.setattr(passes, "TILE", 50)
        monkeypatch.setattr(passes, "_has_native", lambda rows: False)
    return request.param


# ---- moments of samples


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@pytest.mark.parametrize("layout", LAYOUTS, ids=by_name)
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.float16, 2e-6), (torch.bfloat16, 2e-6)],
)
def test_moments_of_every_sample(shape, layout, dtype, rtol, way):
    x = layout((3 + 2 * torch.randn(shape, dtype=torch.float64)).to(dtype))
    assert_moments(x, rtol)
    assert torch.equal(measure(x).mean, passes.sample_moments(x)[0])
    assert measure(x).positions == x[0, 0].numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=by_name)
def test_moments_of_large_samples(dtype, layout):
    x = layout((3 + 2 * torch.randn(LARGE_SHAPE, dtype=torch.float64)).to(dtype))
    assert x[0].numel() > passes.LARGE
    assert_moments(x, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
def test_a_sample_of_several_tiles(layout, monkeypatch):
    monkeypatch.setattr(passes, "TILE", 64)
    tiles = []
    cut = passes._tiles
    monkeypatch.setattr(passes, "_tiles", lambda r: [tiles.append(t) or t for t in cut(r)])
    assert_moments(layout(torch.randn(3, 4, 20, 20)), 1e-6)
    positions = {p.start for _, p in tiles}
    assert len(positions) > 6
    assert len({a.start for a, _ in tiles}) >= 3


@pytest.mark.parametrize("shape", [(3, 4, 15, 15), (1, 8, 96, 96)], ids=["small", "large"])
@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("ratio", [0, 1, 1e2, 1e4])
def test_a_mean_far_larger_than_the_deviation(shape, layout, ratio):
    assert_moments(layout(ratio + torch.randn(shape)), 3e-7 if ratio > 1 else 1e-5, 1e-4)


@pytest.mark.parametrize("shape", [(3, 4, 15, 15), (1, 8, 96, 96)], ids=["small", "large"])
@pytest.mark.parametrize("layout", BOTH, ids=by_name)
def test_a_mean_of_a_million_deviations(shape, layout):
    assert_moments(layout(1e6 + torch.randn(shape)), 3e-7, 1e-3)


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("scale", [1e-3, 1e-15, 1e15])
def test_tiny_and_huge_variance(layout, scale, way):
    assert_moments(layout(scale * torch.randn(3, 4, 8, 8)), 3e-6)


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("at", [0, -1])
def test_one_huge_outlier(layout, at, way):
    x = layout(torch.randn(3, 4, 8, 8))
    x[1, 2, at, at] = 1e8
    assert_moments(x, 1e-5, 1e-4)


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
def test_the_first_positions_may_be_unlike_the_rest(layout, way):
    x = torch.randn(2, 3, 16, 8)
    x[:, :, :2] += 1e4
    assert_moments(layout(x), 1e-5, 1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 1e-20])
@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_input_has_no_variance(value, layout, dtype, way):
    x = layout(torch.full((2, 3, 8, 9), value, dtype=dtype))
    mean, var = passes.sample_moments(x)
    torch.testing.assert_close(mean, x[:, :, 0, 0].float(), rtol=5e-7, atol=0)
    assert (var <= (1e-6 * value) ** 2).all()
    assert (var >= 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (3, 4, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_element_has_no_variance(shape, dtype):
    x = 1e4 * torch.randn(shape).to(dtype)
    mean, var = passes.sample_moments(x)
    assert torch.equal(mean.double(), x.double().view(shape[:2]))
    assert torch.equal(var, torch.zeros_like(var))


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sample_and_channel(layout, value, way):
    x = layout(torch.randn(3, 4, 8, 8))
    clean = applied(instance_norm, x, torch.ones(4), torch.zeros(4))
    x[1, 2, 5, 3] = value
    mean, var = passes.sample_moments(x)
    y = applied(instance_norm, x, torch.ones(4), torch.zeros(4))
    bad = torch.zeros(3, 4, dtype=torch.bool)
    bad[1, 2] = True
    assert torch.equal(var.isfinite(), ~bad)
    assert torch.equal(mean.isfinite(), ~bad)
    assert torch.equal(y.isfinite().flatten(2).all(2), ~bad)
    torch.testing.assert_close(y[~bad], clean[~bad], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0), (2, 3, 4, 0)])
def test_nothing_has_moments_of_zero_and_a_gradient_of_zero(shape):
    x, weight, bias = given(shape)
    moments = measure(x)
    assert torch.equal(moments.mean, torch.zeros(shape[:2]))
    assert torch.equal(moments.var, torch.zeros(shape[:2]))
    y = applied(instance_norm, x, weight, bias, relu=True)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(3))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_nothing_has_a_second_derivative_too(shape):
    x, weight, bias = given(shape)
    y = applied(instance_norm, x, weight, bias)
    dx, dw = torch.autograd.grad(y.sum(), (x, weight), create_graph=True)
    assert dx.shape == shape
    assert torch.equal(dw, torch.zeros(3))


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(2, 3).int(), torch.zeros(2, 3).cfloat()])
def test_inputs_that_have_no_channels_or_no_fractions(x):
    with pytest.raises(ShapeError, match=r"\(N, C, \*spatial\); got shape") as error:
        measure(x)
    assert str(tuple(x.shape)) in str(error.value)
    assert str(x.dtype) in str(error.value)


# ---- values


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0, 1, 1e2, 1e4])
def test_batch_norm_is_about_as_exact_as_the_native_one(layout, dtype, ratio):
    ours, theirs = [], []
    for _ in range(3):
        x, weight, bias = given((4, 64, 14, 14), dtype, layout, grad=False, mean=ratio, deviation=1)
        expected = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
        ours.append(applied(batch_norm, x, weight, bias) - expected)
        theirs.append(F.batch_norm(x, None, None, weight, bias, True) - expected)
    error, native = (torch.stack(e).square().mean().sqrt() for e in (ours, theirs))
    assert error < 2 * native


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", [(5, 6, 7), (3, 6, 4, 5), (2, 6, 2, 3, 4)], ids=len)
@pytest.mark.parametrize("layout", LAYOUTS, ids=by_name)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("relu", [False, True])
def test_programs_are_the_norms_they_spell(name, shape, layout, dtype, relu, way):
    program, theirs = NORMS[name]
    leaves = given(shape, dtype, layout)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}

    def ours(*leaves):
        return applied(program, *leaves, relu=relu)

    def expected(*leaves):
        return theirs(*leaves).relu() if relu else theirs(*leaves)

    torch.testing.assert_close(ours(*leaves), expected(*leaves), **close)
    dy = torch.randn(shape, dtype=dtype)
    found = gradients(ours, leaves, dy)
    torch.testing.assert_close(found, gradients(expected, leaves, dy), **close)


@pytest.mark.parametrize("name", ["batch", "layer"])
@pytest.mark.parametrize("relu", [False, True])
def test_of_one_position_too(name, relu):
    program, theirs = NORMS[name]
    leaves = given((7, 6), torch.float64)
    dy = torch.randn(7, 6, dtype=torch.float64)
    for ours, expected in zip(
        gradients(lambda *t: applied(program, *t, relu=relu), leaves, dy),
        gradients(lambda *t: theirs(*t).relu() if relu else theirs(*t), leaves, dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_samples_have_the_same_gradients(layout, relu, dtype):
    leaves = given(LARGE_SHAPE, dtype, layout)
    dy = layout(torch.randn(LARGE_SHAPE).to(dtype))
    found = gradients(lambda *t: applied(group_norm, *t, relu=relu), leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = gradients(
        lambda *t: F.group_norm(t[0], 2, *t[1:]).relu() if relu else F.group_norm(t[0], 2, *t[1:]),
        wide,
        dy.double(),
    )
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).norm() < rtol * exact.norm()


@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("relu", [False, True])
def test_programs_need_not_use_all_they_get(name, layout, relu):
    program, by_hand = PARTIAL[name]
    leaves = given((3, 4, 5, 6), torch.float64, layout)
    dy = torch.randn(3, 4, 5, 6, dtype=torch.float64)

    def expected(x, weight, bias):
        var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        y = by_hand(x, mean, var, weight, bias)
        return y.relu() if relu else y

    torch.testing.assert_close(applied(program, *leaves, relu=relu), expected(*leaves))
    found = gradients(lambda *t: applied(program, *t, relu=relu), leaves, dy)
    for ours, exact in zip(found, gradients(expected, leaves, dy), strict=True):
        torch.testing.assert_close(ours, exact if exact is not None else ours)


@pytest.mark.parametrize("name", [*NORMS, *PARTIAL])
@pytest.mark.parametrize("relu", [False, True])
def test_derivatives_by_differences(name, relu):
    program = (NORMS | PARTIAL)[name][0]
    leaves = given((3, 4, 2, 2), torch.float64)

    def run(*leaves):
        return applied(program, *leaves, relu=relu)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("create_graph", [False, True])
def test_only_the_gradients_that_are_wanted(wanted, create_graph):
    leaves = given((3, 4, 5, 5), torch.float64)
    dy = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    expected = gradients(lambda *t: applied(batch_norm, *t), leaves, dy)
    for k, t in enumerate(leaves):
        t.requires_grad_(k in wanted)
    asked = [leaves[k] for k in wanted]
    found = torch.autograd.grad(applied(batch_norm, *leaves), asked, dy, create_graph=create_graph)
    assert create_graph or not any(g.requires_grad for g in found)
    torch.testing.assert_close([g.detach() for g in found], [expected[k] for k in wanted])


def test_nothing_is_recorded_where_no_gradient_is_wanted():
    leaves = given((3, 4, 5, 5))
    with torch.no_grad():
        assert not applied(batch_norm, *leaves).requires_grad
    assert not measure(leaves[0]).mean.requires_grad
    assert not applied(batch_norm, *given((3, 4, 5, 5), grad=False)).requires_grad


# ---- a program that brings its derivative along


class Derived:
    """Instance norm, derived by hand."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, moments, weight, bias):
        return instance_norm(moments, weight, bias)

    def forward(self, moments, weight, bias):
        inverse = (moments.var + EPS).rsqrt()
        return (weight * inverse, bias.expand_as(inverse)), (weight, inverse)

    def backward(self, kept, d_scale, d_shift):
        self.calls += 1
        weight, inverse = kept
        return (
            None,
            -0.5 * d_scale * weight * inverse**3,
            (d_scale * inverse).sum(0),
            d_shift.sum(0),
        )


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("relu", [False, True])
def test_a_derived_program_is_the_same_as_a_plain_one(layout, relu):
    leaves = given((3, 4, 5, 5), torch.float64, layout)
    dy = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    derived = Derived()
    assert torch.equal(
        applied(derived, *leaves, relu=relu), applied(instance_norm, *leaves, relu=relu)
    )
    found = gradients(lambda *t: applied(derived, *t, relu=relu), leaves, dy)
    assert derived.calls == 1
    expected = gradients(lambda *t: applied(instance_norm, *t, relu=relu), leaves, dy)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradgradcheck(lambda *t: applied(derived, *t), leaves, fast_mode=True)


# ---- memory and layout


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("program", [batch_norm, instance_norm, group_norm, Derived()])
def test_one_activation_is_kept_the_input_itself(program, layout, relu):
    leaves = given((3, 4, 9, 9), layout=layout)
    x, kept = leaves[0], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = applied(program, *leaves, relu=relu)
    full = [t for t in kept if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in full] == [x.data_ptr()]
    aside = [t for t in tree_leaves(vars(y.grad_fn)) if torch.is_tensor(t)]
    assert aside
    assert all(t.numel() <= 12 for t in aside)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_is_only_read(relu, layout, dtype, way):
    leaves = given((3, 4, 5, 6), dtype, layout)
    before = [t.detach().clone() for t in leaves]
    version = leaves[0]._version
    dy = torch.randn(3, 4, 5, 6).to(dtype)
    given_dy = dy.clone()
    applied(batch_norm, *leaves, relu=relu).backward(dy)
    assert all(torch.equal(t, b) for t, b in zip(leaves, before, strict=True))
    assert leaves[0]._version == version
    assert torch.equal(dy, given_dy)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=by_name)
def test_what_follows_may_change_the_output_in_place(relu, layout, way):
    leaves = given((3, 4, 5, 6), torch.float64, layout)
    dy = torch.randn(3, 4, 5, 6, dtype=torch.float64)

    def changed(*leaves):
        return applied(batch_norm, *leaves, relu=relu).mul_(2).relu_()

    def apart(*leaves):
        return (2 * applied(batch_norm, *leaves, relu=relu)).relu()

    assert torch.equal(changed(*leaves), apart(*leaves))
    torch.testing.assert_close(gradients(changed, leaves, dy), gradients(apart, leaves, dy))


def test_an_input_that_is_changed_before_backward_is_noticed():
    x, weight, bias = given((3, 4, 5, 5))
    inner = x * 1
    y = applied(batch_norm, inner, weight, bias)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("program", [batch_norm, Derived()])
def test_backward_twice_gives_the_same(program, relu):
    leaves = given((3, 4, 5, 5))
    y = applied(program, *leaves, relu=relu)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    third = torch.autograd.grad(y, leaves, dy, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(third, first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant):
    leaves = given((3, 4, 5, 5))
    dy = torch.randn(3, 4, 5, 5)

    def run(*leaves):
        return applied(batch_norm, leaves[0].tanh(), *leaves[1:], relu=True)

    again = checkpoint.checkpoint(run, *leaves, use_reentrant=use_reentrant)
    again.backward(dy)
    for t, exact in zip(leaves, gradients(run, leaves, dy), strict=True):
        assert torch.equal(t.grad, exact)


@pytest.mark.parametrize("shape", [*SHAPES, LARGE_SHAPE], ids=str)
@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relu", [False, True])
def test_dtype_and_layout_are_kept(shape, layout, dtype, relu):
    x, weight, bias = given(shape, dtype, layout)
    y = applied(batch_norm, x, weight, bias, relu=relu)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for t in (y, dx):
        assert (t.dtype, t.shape, t.stride()) == (x.dtype, x.shape, x.stride())


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 4, 5, 6), LARGE_SHAPE], ids=str)
@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("other", LAYOUTS, ids=by_name)
@pytest.mark.parametrize("relu", [False, True])
def test_gradients_in_another_layout(shape, layout, other, relu):
    leaves = given(shape, torch.float64, layout)
    dy = torch.randn(shape, dtype=torch.float64)
    expected = gradients(lambda *t: applied(batch_norm, *t, relu=relu), leaves, layout(dy))
    found = gradients(lambda *t: applied(batch_norm, *t, relu=relu), leaves, other(dy))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), LARGE_SHAPE], ids=["small", "large"])
@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("part", [(1, 1, 1, 1), (3, 1, 1, 1), (1, 4, 1, 1), (3, 4, 5, 1)], ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_expanded_gradients(shape, layout, part, relu):
    part = [n if k > 1 else 1 for n, k in zip(shape, part, strict=True)]
    leaves = given(shape, torch.float64, layout)
    dy = torch.randn(part, dtype=torch.float64).expand(shape)
    found = gradients(lambda *t: applied(batch_norm, *t, relu=relu), leaves, dy)
    expected = gradients(lambda *t: applied(batch_norm, *t, relu=relu), leaves, layout(dy))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# ---- what else torch does with functions


def norm(x, weight, bias):
    return applied(batch_norm, x, weight, bias, relu=True)


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
def test_vmap(layout):
    x, weight, bias = given((6, 4, 5, 5), grad=False)
    x = torch.stack([layout(t) for t in x.split(2)])
    expected = torch.stack([norm(t, weight, bias) for t in x])
    torch.testing.assert_close(torch.vmap(norm, (0, None, None))(x, weight, bias), expected)


def test_vmap_over_parameters():
    x, weight, bias = given((2, 4, 5, 5), grad=False)
    weights = torch.stack([weight, 2 * weight])
    expected = torch.stack([norm(x, w, bias) for w in weights])
    torch.testing.assert_close(torch.vmap(norm, (None, 0, None))(x, weights, bias), expected)


@pytest.mark.parametrize("argnums", [0, 1, (0, 1, 2)])
def test_functional_gradients(argnums):
    leaves = given((3, 4, 5, 5), torch.float64, grad=False)
    dy = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    found = torch.func.grad(lambda *t: (norm(*t) * dy).sum(), argnums)(*leaves)
    expected = gradients(norm, [t.requires_grad_() for t in leaves], dy)
    wanted = [expected[k] for k in argnums] if isinstance(argnums, tuple) else [expected[argnums]]
    found = found if isinstance(found, tuple) else (found,)
    torch.testing.assert_close(list(found), wanted)


def test_gradients_of_every_sample():
    x, weight, bias = given((5, 4, 6, 6), torch.float64, grad=False)

    def loss(weight, sample):
        return applied(instance_norm, sample[None], weight, bias).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    expected = torch.stack([torch.func.grad(loss)(weight, sample) for sample in x])
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_functional_jvp():
    leaves = given((3, 4, 5, 5), torch.float64, grad=False)
    tangents = [torch.randn_like(t) for t in leaves]
    value, found = torch.func.jvp(norm, tuple(leaves), tuple(tangents))
    torch.testing.assert_close(value, norm(*leaves))
    step = 1e-6
    up, down = (
        norm(*(t + s * v for t, v in zip(leaves, tangents, strict=True))) for s in (step, -step)
    )
    torch.testing.assert_close(found, (up - down) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
def test_batches_of_gradients(layout):
    x, weight, bias = given((3, 4, 5, 5), torch.float64, layout)
    y = norm(x, weight, bias)
    dy = torch.randn(2, *y.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in dy]
    torch.testing.assert_close(found, torch.stack(expected))


class Layer(torch.nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(channels) + 0.5)
        self.bias = torch.nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return norm(x, self.weight, self.bias)


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
def test_export_in_torchs_own_operators(layout):
    layer, x = Layer(), layout(torch.randn(3, 4, 5, 5))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    called = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert called
    assert {t.namespace for t in called if hasattr(t, "namespace")} == {"aten"}
    for n in (3, 7):
        other = layout(torch.randn(n, 4, 5, 5))
        torch.testing.assert_close(exported.module()(other), layer(other))


def compiled(function, backend, **options):
    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("program", [batch_norm, Derived()])
def test_compiled_as_one_graph(backend, layout, program):
    leaves = given((3, 4, 5, 5), torch.float64, layout)
    dy = layout(torch.randn(3, 4, 5, 5, dtype=torch.float64))

    def run(*leaves):
        return applied(program, *leaves, relu=True)

    fast = compiled(run, backend)
    y = fast(*leaves)
    torch.testing.assert_close(y, run(*leaves))
    assert y.stride() == leaves[0].stride()
    torch.testing.assert_close(gradients(fast, leaves, dy), gradients(run, leaves, dy))


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiled_to_machine_code():
    leaves = given((3, 16, 6, 6), layout=channels_last)
    dy = channels_last(torch.randn(3, 16, 6, 6))
    fast = compiled(norm, "inductor")
    y = fast(*leaves)
    torch.testing.assert_close(y, norm(*leaves), rtol=1e-5, atol=1e-5)
    assert y.stride() == leaves[0].stride()
    found, expected = gradients(fast, leaves, dy), gradients(norm, leaves, dy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
def test_under_autocast(layout):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), Layer())
    x = layout(torch.randn(3, 3, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        inner = net[0](x)
    assert y.dtype == inner.dtype == torch.bfloat16
    assert torch.equal(y, net[1](inner))
    y.float().square().sum().backward()
    assert net[1].weight.grad.dtype == net[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), net(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layout", BOTH, ids=by_name)
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5, 6), LARGE_SHAPE], ids=str)
def test_on_the_meta_device(layout, shape):
    leaves = [t.detach().to("meta").requires_grad_() for t in given(shape, layout=layout)]
    y = norm(*leaves)
    assert y.is_meta
    assert y.stride() == leaves[0].stride()
    y.sum().backward()
    assert leaves[0].grad.shape == shape


# ---- threads


def test_threads_do_not_share_room(monkeypatch):
    monkeypatch.setattr(passes, "TILE", 2**12)
    inputs = [given((4, 8, 24, 24), torch.bfloat16, channels_last) for _ in range(2)]
    dy = channels_last(torch.randn(4, 8, 24, 24).bfloat16())
    expected = [(norm(*i).detach(), *gradients(norm, i, dy)) for i in inputs]
    wrong, together = [], threading.Barrier(2)

    def work(leaves, right):
        together.wait()
        for _ in range(40):
            found = (norm(*leaves).detach(), *gradients(norm, leaves, dy))
            if not all(torch.equal(f, r) for f, r in zip(found, right, strict=True)):
                wrong.append(leaves)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_thread_has_room_of_its_own():
    rooms = []

    def ask():
        rooms.append(passes._scratch(torch.empty(10), torch.float32).data_ptr())
        together.wait()

    together = threading.Barrier(2)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(rooms)) == 2


def test_moments_say_how_many_positions_they_are_of():
    moments = measure(torch.zeros(2, 3, 4, 5))
    assert isinstance(moments, Moments)
    assert moments.positions == 20
