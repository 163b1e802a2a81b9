"""Quaternions: algebra, products, initialisation, batch norm and the smaller layers."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evenkeel.errors import ConfigError, ShapeError
from evenkeel.quaternion import (
    QuaternionBatchNorm,
    QuaternionConv2d,
    QuaternionDropout,
    QuaternionLinear,
    QuaternionMaxPool2d,
    conjugate,
    from_quaternion,
    hamilton,
    modulus,
    quaternion_init_,
    rotated,
    to_quaternion,
)
from evenkeel.quaternion.product import assembled, eight, in_eight, taken_apart

DOUBLE = torch.float64
KINDS = ("whitening", "variance")
close = torch.testing.assert_close


def double(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def structure():
    """T[k, i, j]: part k of the product of units i and j."""
    units = torch.eye(4, dtype=DOUBLE)
    return torch.stack([hamilton(u.expand(4, 4), units) for u in units]).permute(2, 0, 1)


# ---- the algebra


def test_the_table_of_the_units():
    table = ["+1 +i +j +k", "+i -1 +k -j", "+j -k -1 +i", "+k +j -i -1"]
    units = torch.eye(4)
    for p, row in zip(units, table, strict=True):
        for q, entry in zip(units, row.split(), strict=True):
            expected = units["1ijk".index(entry[1])] * (1 if entry[0] == "+" else -1)
            assert torch.equal(hamilton(p, q, dim=0), expected)


def test_the_laws_of_quaternions():
    p, q, r = double(3, 5, 8)
    close(hamilton(hamilton(p, q), r), hamilton(p, hamilton(q, r)))
    close(modulus(hamilton(p, q)), modulus(p) * modulus(q))
    close(conjugate(hamilton(p, q)), hamilton(conjugate(q), conjugate(p)))
    square = torch.cat([modulus(p).square(), torch.zeros(5, 6, dtype=DOUBLE)], 1)
    close(hamilton(p, conjugate(p)), square)


def test_other_axes_broadcast_and_any_axis_may_hold_the_parts():
    p, q = double(3, 1, 8, 5), double(1, 2, 8, 1)
    out = hamilton(p, q, dim=2)
    assert out.shape == (3, 2, 8, 5)
    close(out[2, 1, :, 4], hamilton(p[2, 0, :, 4], q[0, 1, :, 0], dim=0))
    close(hamilton(p.mT, q.mT, dim=-1), out.mT)
    close(modulus(p.mT, dim=-1), modulus(p, dim=2).mT)
    close(conjugate(p.mT, dim=-1), conjugate(p, dim=2).mT)


def test_rotated_is_the_rotation_matrix():
    angle, axis = 0.7, F.normalize(double(3), dim=0)
    x, y, z = axis.tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=DOUBLE)
    matrix = torch.linalg.matrix_exp(angle * cross)
    by = 3 * torch.cat([torch.tensor([math.cos(angle / 2)]), math.sin(angle / 2) * axis])
    q = double(6, 4)
    turned = rotated(q, by.expand(6, 4))
    close(turned[:, 1:], q[:, 1:] @ matrix.T)
    close(turned[:, 0], q[:, 0])


def test_many_quaternions_are_rotated_by_one():
    q, by = double(2, 8), double(1, 4)
    every_one = by.repeat_interleave(2, 1).expand(2, 8)
    close(rotated(q, by), rotated(q, every_one))


@pytest.mark.parametrize("call", [conjugate, modulus, lambda q: hamilton(q, q)])
@pytest.mark.parametrize("channels", [0, 3, 6])
def test_channels_that_are_no_quaternions_are_refused(call, channels):
    with pytest.raises(ShapeError, match=r"multiple of 4 along axis 1.*got shape \(2, "):
        call(torch.zeros(2, channels))


# ---- both forms of the product


def test_eight_multiplications_are_the_hamilton_product_in_whole_numbers():
    units = torch.eye(4, dtype=DOUBLE)
    left, seen = eight(4 * units), []

    def product(x, kernel, bias):
        seen.append(x)
        return x * kernel

    found = torch.stack(
        [in_eight(units, kernels.view(8, 1, 1), None, product) for kernels in left.T], 1
    )
    assert torch.equal(left, left.round())
    assert torch.equal(found.permute(2, 1, 0), 4 * structure())
    assert len(seen) == 8 * 4


def test_the_assembled_matrix_is_the_hamilton_product_in_whole_numbers():
    found = torch.stack([assembled(u.view(4, 1, 1)) for u in torch.eye(4, dtype=DOUBLE)], 1)
    assert torch.equal(found, structure())


@pytest.mark.parametrize("kernel", [(), (3,), (2, 3)])
def test_taken_apart_is_the_way_back_and_the_nearest(kernel):
    weight = double(4, 3, 2, *kernel)
    assert torch.equal(taken_apart(assembled(weight)), weight)
    matrix = double(12, 8, *kernel)
    nearest = taken_apart(matrix)
    close((assembled(weight) * (matrix - assembled(nearest))).sum(), torch.zeros((), dtype=DOUBLE))
    distance = (matrix - assembled(nearest)).norm()
    assert all((matrix - assembled(nearest + 0.1 * weight * s)).norm() > distance for s in (1, -1))


# ---- how weights begin

SQUARES = {"isotropic": 4, "cube": 4, "rayleigh": 2, "orthant": 1 / 3}


@pytest.mark.parametrize("kind", SQUARES)
@pytest.mark.parametrize("scale", ["glorot", "he"])
def test_initial_weights_have_their_mean_and_length(kind, scale):
    outputs, inputs, area = 128, 96, 9
    weight = quaternion_init_(torch.empty(4, outputs, inputs, 3, 3), kind, scale)
    square = 1 / (2 * area * (inputs + outputs if scale == "glorot" else inputs))
    found = weight.square().sum(0).mean().item()
    assert found == pytest.approx(SQUARES[kind] * square, rel=0.01)
    assert weight.flatten(1).mean(1).abs().max() < 0.015 * math.sqrt(square)
    assert weight[0].square().mean().item() == pytest.approx(found / 2, rel=0.02)


def test_directions_are_those_of_their_kind():
    def directions(kind):
        return F.normalize(quaternion_init_(torch.empty(4, 300, 300), kind)[1:].flatten(1), dim=0)

    sphere = directions("isotropic")
    close(sphere @ sphere.T / 90_000, torch.eye(3) / 3, atol=5e-3, rtol=0)
    assert sphere.pow(4).mean().item() == pytest.approx(1 / 5, rel=0.01)
    cube = directions("cube")
    close(cube @ cube.T / 90_000, torch.eye(3) / 3, atol=5e-3, rtol=0)
    assert cube.pow(4).mean() < 0.195
    for kind in ("orthant", "rayleigh"):
        assert (directions(kind).sign().sum(0).abs() == 3).all()


def test_layers_take_the_published_scales():
    layer = QuaternionConv2d(256, 512, 3, groups=2)
    square = 4 / (2 * 9 * (32 + 128))
    assert layer.weight.square().sum(0).mean().item() == pytest.approx(square, rel=0.01)
    layer = QuaternionLinear(1024, 512)
    assert layer.weight.square().sum(0).mean().item() == pytest.approx(4 / 512, rel=0.02)
    assert not layer.bias.any()


def test_initial_weights_come_from_the_generator_or_from_torchs():
    def drawn(generator=None):
        return quaternion_init_(torch.empty(4, 3, 2), generator=generator)

    state = torch.get_rng_state()
    first = drawn(torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn(torch.Generator().manual_seed(5)), first)
    torch.manual_seed(5)
    assert torch.equal(drawn(), first)
    assert not torch.equal(drawn(), first)


@pytest.mark.parametrize("kind", SQUARES)
def test_initial_weights_of_lower_precision_and_of_no_memory(kind):
    for dtype in (torch.float16, torch.bfloat16):
        layer = QuaternionLinear(512, 512, init=kind, dtype=dtype)
        assert layer.weight.dtype == dtype
        found = layer.weight.float().square().sum(0).mean().item()
        assert found == pytest.approx(SQUARES[kind] / 256, rel=0.05)
    assert quaternion_init_(torch.empty(4, 3, 2, device="meta"), kind).is_meta


@pytest.mark.parametrize(("option", "value"), [("kind", "cubic"), ("scale", "lecun")])
def test_unknown_ways_to_begin_are_refused(option, value):
    with pytest.raises(ConfigError, match=f"Unknown {option} '{value}'"):
        quaternion_init_(torch.empty(4, 2, 2), **{option: value})


# ---- batch norm


def mixed(n=64, channels=8, *positions):
    """Correlated parts of different means, (n, channels, ...)."""
    x = double(n, 4, channels // 4, *positions)
    mix = torch.eye(4, dtype=DOUBLE) + torch.ones(4, 4, dtype=DOUBLE).tril(-1) / 2
    x = torch.einsum("pq,nq...->np...", mix, x) + 3 * double(1, 4, *x.shape[2:]).mean()
    return x.flatten(1, 2)


def moments(x):
    """Mean (4, C) and covariance (C, 4, 4) in double precision, unbiased."""
    parts = (
        x.double().unflatten(1, (4, -1)).flatten(3)
        if x.dim() > 2
        else x.double().view(len(x), 4, -1, 1)
    )
    parts = parts.permute(2, 1, 0, 3).flatten(2)
    return parts.mean(2).T, torch.stack([part.cov() for part in parts])


def expected_norm(x, mean, variance, kind, gain, eps=1e-5):
    away = x.double().unflatten(1, (4, -1)) - mean.view(1, 4, -1, *[1] * (x.dim() - 2))
    if kind == "variance":
        total = variance.diagonal(dim1=1, dim2=2).sum(1)
        y = away / (total + eps).sqrt().view(1, 1, -1, *[1] * (x.dim() - 2))
    else:
        factor = torch.linalg.cholesky(variance + eps * torch.eye(4, dtype=DOUBLE))
        y = torch.einsum("cpq,nqc...->npc...", torch.linalg.inv(factor), away)
    return gain * y.flatten(1, 2)


@pytest.mark.parametrize("positions", [(), (7,), (5, 6), (3, 4, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_whitened_parts_are_independent(positions, affine):
    y = QuaternionBatchNorm(12, affine=affine)(mixed(200, 12, *positions).float())
    mean, covariance = moments(y)
    number = y.numel() // 12
    identity = torch.eye(4, dtype=DOUBLE) / (4 if affine else 1)
    close(covariance * (number - 1) / number, identity.expand(3, 4, 4), atol=1e-3, rtol=0)
    close(mean, torch.zeros(4, 3, dtype=DOUBLE), atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", [(), (7,), (5, 6), (3, 4, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_normalized_quaternions_against_double_precision(kind, positions):
    x = mixed(40, 8, *positions)
    norm = QuaternionBatchNorm(8, kind=kind)
    number = x.numel() // 8
    mean, unbiased = moments(x)
    gain = 0.5 if kind == "whitening" else 1.0
    biased = unbiased * (number - 1) / number
    y = norm(x.float())
    close(y.double(), expected_norm(x, mean, biased, kind, gain), atol=2e-4, rtol=1e-3)
    with torch.no_grad():
        norm.bias.copy_(torch.arange(8.0))
        shifted = norm(x.float()) - y
    close(shifted.movedim(1, -1), torch.arange(8.0).expand(*shifted.movedim(1, -1).shape))


def test_gamma_is_a_symmetric_matrix():
    x, norm = mixed(), QuaternionBatchNorm(8, dtype=DOUBLE)
    whitened = QuaternionBatchNorm(8, affine=False)(x).view(-1, 4, 2)
    nn.init.normal_(norm.weight)
    gamma = torch.zeros(2, 4, 4, dtype=DOUBLE)
    for n, (p, q) in enumerate(zip(*torch.tril_indices(4, 4).tolist(), strict=True)):
        gamma[:, p, q] = gamma[:, q, p] = norm.weight[:, n].detach()
    close(norm(x), torch.einsum("cpq,nqc->npc", gamma, whitened).flatten(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_averages_against_double_precision(kind, momentum):
    norm = QuaternionBatchNorm(8, kind=kind, momentum=momentum)
    mean, variance = torch.zeros(4, 2, dtype=DOUBLE), torch.eye(4, dtype=DOUBLE).expand(2, 4, 4)
    for i in range(5):
        x = mixed(30, 8, 3)
        norm(x.float())
        share = 1 / (i + 1) if momentum is None else momentum
        mean, variance = (
            a.lerp(b, share) for a, b in zip((mean, variance), moments(x), strict=True)
        )
    kept = variance if kind == "whitening" else variance.diagonal(dim1=1, dim2=2).sum(1)
    close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    close(norm.running_var.double(), kept, rtol=1e-5, atol=1e-5)
    assert norm.num_batches_tracked == 5
    x, gain = mixed(10, 8, 2), 0.5 if kind == "whitening" else 1.0
    norm.eval()
    y = norm(x.float()).double()
    close(y, expected_norm(x, mean, variance, kind, gain), atol=2e-4, rtol=1e-3)
    close(norm(x[:1].float()), y[:1].float(), msg="the other samples of a batch do not count")
    assert norm.num_batches_tracked == 5
    norm.reset_running_stats()
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_serving_agree_after_many_batches(kind):
    norm, x = QuaternionBatchNorm(8, kind=kind, momentum=None), mixed(40_000).float()
    for part in x.split(4000):
        y = norm(part)
    close(norm.eval()(part), y, atol=0.1, rtol=0.1)
    close(norm(x), QuaternionBatchNorm(8, kind=kind)(x), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_mean_with_a_small_variance(kind):
    x = (1e4 + torch.randn(500, 8, 4)).requires_grad_()
    y = QuaternionBatchNorm(8, kind=kind)(x)
    mean, unbiased = moments(x.detach())
    expected = expected_norm(
        x.detach(), mean, unbiased * 1999 / 2000, kind, 0.5 if kind == "whitening" else 1.0
    )
    close(y.double(), expected, atol=5e-3, rtol=0)
    y.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.3, 1e4])
def test_channels_that_do_not_change(kind, value):
    x = torch.randn(50, 8, 4)
    x[:, ::2] = value
    x.requires_grad_()
    norm = QuaternionBatchNorm(8, kind=kind)
    y = norm(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert norm.eval()(x).isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_grey_pictures_of_0_to_255(training):
    for scale in (1, 100, 255, 1000, 10_000):
        x = to_quaternion(scale * torch.rand(16, 1, 16, 16))
        norm = QuaternionBatchNorm(4, momentum=None)
        y = norm(x)
        assert (y if training else norm.eval()(x)).isfinite().all(), scale


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_with_its_quaternion(kind):
    x = torch.randn(20, 12, 3)
    x[4, 5, 1] = math.nan
    y = QuaternionBatchNorm(12, kind=kind)(x).unflatten(1, (4, 3))
    assert y[:, :, [0, 1]].isfinite().all()
    assert y[4, :, 2, 1].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm_of_lower_precision_keeps_better_statistics(kind):
    x = mixed(200, 8, 4)
    norm, other = QuaternionBatchNorm(8, kind=kind), QuaternionBatchNorm(8, kind=kind)
    y = norm(x.bfloat16())
    assert y.dtype == torch.bfloat16
    close(y.float(), other(x.bfloat16().float()), atol=0.02, rtol=0.01)
    close(norm.running_var, other.running_var)


def test_statistics_under_autocast():
    x = mixed(200, 8, 4).float()
    norm, other = QuaternionBatchNorm(8), QuaternionBatchNorm(8)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    close(y, other(x), atol=1e-4, rtol=1e-4)
    close(norm.running_var, other.running_var)


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_values_for_a_variance(kind):
    norm = QuaternionBatchNorm(8, kind=kind)
    for shape in ((1, 8), (1, 8, 1, 1), (0, 8, 3, 3)):
        with pytest.raises(ShapeError, match="2 values or more"):
            norm(torch.randn(shape))
    assert norm.num_batches_tracked == 0
    norm.eval()
    for shape in ((1, 8), (1, 8, 1, 1), (0, 8, 3, 3), (2, 8, 0)):
        assert norm(torch.randn(shape)).shape == shape


def test_an_empty_batch_of_features_is_served():
    assert QuaternionBatchNorm(8).eval()(torch.zeros(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_batch_norm_goes_round(kind):
    norm = QuaternionBatchNorm(8, kind=kind)
    for _ in range(3):
        norm(mixed().float())
    with torch.no_grad():
        norm.weight.add_(0.1)
    file = io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    other = QuaternionBatchNorm(8, kind=kind)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = mixed().float()
    assert torch.equal(other.eval()(x), norm.eval()(x))


# ---- dropout, pooling, pictures


@pytest.mark.parametrize(("shape", "dim"), [((50, 80, 6), 1), ((50, 6, 80), -1)])
def test_dropout_drops_whole_quaternions_and_scales_the_rest(shape, dim):
    x = torch.randn(shape).abs() + 1
    y = QuaternionDropout(0.3, dim=dim)(x)
    dropped = torch.stack(y.chunk(4, dim)) == 0
    assert torch.equal(dropped.any(0), dropped.all(0))
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    close(y[y != 0], x[y != 0] / 0.7)


def test_dropout_of_none_of_all_and_in_eval():
    x = torch.randn(5, 8)
    assert torch.equal(QuaternionDropout(0.0)(x), x)
    assert not QuaternionDropout(1.0)(x).any()
    assert torch.equal(QuaternionDropout(0.9).eval()(x), x)


def longest(x, kernel, stride, padding, dilation, out):
    """Window by window, (C, H, W) of one sample."""
    parts = x.unflatten(0, (4, -1))
    lengths, y = parts.norm(dim=0), torch.zeros(4, len(parts[0]), *out)
    for c, h, w in np.ndindex(len(parts[0]), *out):
        rows = [h * stride - padding + dilation * u for u in range(kernel)]
        columns = [w * stride - padding + dilation * v for v in range(kernel)]
        inside = [
            (r, s)
            for r, s in itertools.product(rows, columns)
            if 0 <= r < x.shape[1] and 0 <= s < x.shape[2]
        ]
        r, s = max(inside, key=lambda place: lengths[c, *place].item())
        y[:, c, h, w] = parts[:, c, r, s]
    return y.flatten(0, 1)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "ceil"),
    [
        (2, None, 0, 1, False),
        (3, 2, 1, 1, False),
        (2, 2, 0, 1, True),
        (2, 1, 1, 2, False),
        (3, 3, 1, 1, True),
    ],
)
def test_the_longest_quaternion_is_chosen_whole(kernel, stride, padding, dilation, ceil):
    x = torch.randn(2, 8, 7, 5)
    options = (kernel, stride, padding, dilation)
    y = QuaternionMaxPool2d(*options, ceil_mode=ceil)(x)
    theirs = nn.MaxPool2d(*options, ceil_mode=ceil)(x)
    assert y.shape == theirs.shape
    for one, of in zip(y, x, strict=True):
        assert torch.equal(one, longest(of, kernel, stride or kernel, *options[2:], y.shape[2:]))


def test_pooling_of_one_picture_is_refused_in_words():
    with pytest.raises(ShapeError):
        QuaternionMaxPool2d(2)(torch.randn(8, 8, 8))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_pictures_there_and_back(lead):
    colour, grey = torch.rand(*lead, 3, 4, 5), torch.rand(*lead, 1, 4, 5)
    q = to_quaternion(colour)
    assert q.shape == (*lead, 4, 4, 5)
    assert not q[..., 0, :, :].any()
    assert torch.equal(from_quaternion(q), colour)
    luma = (colour * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3, keepdim=True)
    close(from_quaternion(to_quaternion(colour, mode="gray")), luma.expand_as(colour))
    for mode in ("rgb", "gray"):
        assert torch.equal(from_quaternion(to_quaternion(grey, mode=mode)), grey.expand_as(colour))


def test_what_is_no_picture_is_refused():
    for shape in ((4, 5), (2, 4, 5, 5)):
        with pytest.raises(ShapeError, match="3, H, W"):
            to_quaternion(torch.zeros(shape))
    with pytest.raises(ShapeError, match="4, H, W"):
        from_quaternion(torch.zeros(8, 5, 5))
    with pytest.raises(ConfigError, match="gray"):
        to_quaternion(torch.zeros(3, 2, 2), mode="grey")
