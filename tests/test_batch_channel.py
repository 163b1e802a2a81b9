"""Batch-channel norm: two norms in one, estimates that every batch corrects, hostile input."""

import copy
import math
import pickle
from datetime import timedelta

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import evenkeel as ek
from evenkeel.errors import ConfigError, EvenkeelError, ShapeError
from evenkeel.moments import Moments, measure
from evenkeel.norm import (
    BatchChannelNorm,
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    BatchChannelNorm3d,
)
from evenkeel.norm.functional import batch_channel_norm
from evenkeel.norm.programs import BatchChannel, batch_statistics
from evenkeel.norm.running import RECENT

CASES = [
    (BatchChannelNorm1d, (6, 8)),
    (BatchChannelNorm1d, (6, 8, 5)),
    (BatchChannelNorm2d, (6, 8, 4, 5)),
    (BatchChannelNorm3d, (4, 8, 2, 3, 4)),
    (BatchChannelNorm, (6, 8, 4, 5)),
]
STATISTICS = ["batch", "running"]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def layouts():
    return pytest.mark.parametrize("layout", [plain, channels_last], ids=lambda f: f.__name__)


def random_(layer: nn.Module) -> nn.Module:
    """Parameters and statistics that are not the ones it starts with."""
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 1.5) if p is not getattr(layer, "bias", None) else p.normal_()
        layer.group_bias.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


def made(statistics="batch", *, kind=BatchChannelNorm, dtype=torch.float64, **options):
    return random_(kind(8, 4, statistics=statistics, dtype=dtype, **options))


def buffers(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.named_buffers()}


def same_buffers(layer: nn.Module, expected: dict[str, torch.Tensor], **close) -> None:
    for name, value in layer.named_buffers():
        torch.testing.assert_close(
            value, expected[name], msg=lambda s, n=name: f"{n}: {s}", **close
        )


def two_norms(layer, z):
    """Group norm of ``z`` as the layer has it, in torch's own operations."""
    size = layer.num_features // layer.group_weight.numel()
    weight, bias = (p.repeat_interleave(size) for p in (layer.group_weight, layer.group_bias))
    return F.group_norm(z, layer.num_groups, weight, bias, layer.eps)


def by_constants(layer, x, mean, var):
    z = F.batch_norm(x, mean, var, layer.weight, layer.bias, training=False, eps=layer.eps)
    return two_norms(layer, z)


def gradients(function, layer, x, dy):
    leaves = [x, *layer.parameters()]
    return torch.autograd.grad(function(x), leaves, dy, allow_unused=True)


def channel(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).flatten(1)


def estimate(mean, var, x, rate):
    """One step of the estimator, as published."""
    rows = channel(x.detach())
    seen = (rows - mean[:, None]).square().mean(1)
    return mean + rate * (rows.mean(1) - mean), var + rate * (seen - var)


# ---- statistics of the batch


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
@pytest.mark.parametrize("affine", ["group", "channel"])
def test_it_is_group_norm_after_batch_norm(kind, shape, momentum, affine):
    layer = made(kind=kind, momentum=momentum, affine=affine, eps=1e-3)
    first = nn.BatchNorm1d(8, eps=1e-3, momentum=momentum, dtype=torch.float64)
    first._check_input_dim = lambda x: None
    state = layer.state_dict()
    first.load_state_dict({k: state[k] for k in first.state_dict()})
    first.weight, first.bias = layer.weight, layer.bias
    for step in range(5):
        training = step < 3
        layer.train(training), first.train(training)
        x = (2 + 3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        dy = torch.randn(shape, dtype=torch.float64)
        found = gradients(layer, layer, x, dy)
        expected = gradients(lambda t: two_norms(layer, first(t)), layer, x, dy)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer(x), two_norms(layer, first(x)), rtol=1e-6, atol=1e-6)
        same_buffers(layer, buffers(first), rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == 6


@pytest.mark.parametrize("momentum", [0.37, None])
def test_running_averages_of_doubles_are_doubles(momentum):
    layer, theirs = made(momentum=momentum), nn.BatchNorm1d(8, momentum=momentum).double()
    theirs.load_state_dict({k: layer.state_dict()[k] for k in theirs.state_dict()})
    for _ in range(3):
        x = 2 + 3 * torch.randn(6, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(x), two_norms(layer, theirs(x)), rtol=1e-12, atol=1e-12)
    same_buffers(layer, buffers(theirs), rtol=1e-13, atol=1e-13)


@layouts()
@pytest.mark.parametrize("shape", [(8, 64, 14, 14), (2, 16, 80, 80), (3, 64, 1, 1)], ids=str)
@pytest.mark.parametrize("statistics", STATISTICS)
def test_float32_is_exact_to_a_millionth(layout, shape, statistics):
    layer = random_(BatchChannelNorm2d(shape[1], 8, statistics=statistics))
    exact = copy.deepcopy(layer).double()
    x = layout(1 + 2 * torch.randn(shape))
    y, expected = layer(x), exact(x.double())
    assert (y - expected).norm() < 1e-6 * expected.norm()
    if statistics == "batch":
        var, mean = torch.var_mean(channel(x.double()), 1, correction=0)
        by_torch = by_constants(exact, x.double(), mean, var)
        torch.testing.assert_close(expected, by_torch, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("affine", ["group", "channel"])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_by_differences(affine, size, training):
    layer = made(affine=affine, normalization_batch=size).train(training)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(4, 8, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    leaves = (x, *(p.detach().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_derivatives_by_differences_with_running_statistics():
    layer = made("running")
    start = buffers(layer)
    x = torch.randn(4, 8, 3, dtype=torch.float64, requires_grad=True)
    mean, var = estimate(layer.running_mean, layer.running_var, x, 0.1)

    def run(x, *parameters):
        return batch_channel_norm(x, *parameters, num_groups=4, mean=mean, var=var)

    leaves = (x, *layer.parameters())
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    dy = torch.randn_like(x)
    expected = torch.autograd.grad(run(*leaves), leaves, dy)
    torch.testing.assert_close(gradients(layer, layer, x, dy), expected)
    layer.load_state_dict(start, strict=False)
    twice = torch.autograd.grad(layer(x), x, dy, create_graph=True)[0]
    torch.testing.assert_close(twice, expected[0])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**31),
    parts=st.integers(1, 3),
    samples=st.integers(1, 4),
    groups=st.integers(1, 4),
    size=st.integers(1, 4),
    positions=st.integers(1, 50),
    observed=st.booleans(),
    per_channel=st.booleans(),
)
def test_the_derivative_by_hand_is_autograds(
    seed, parts, samples, groups, size, positions, observed, per_channel
):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape, positive=False):
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        return t.exp() if positive else t

    n, c = parts * samples, groups * size
    affine = c if per_channel else groups
    leaves = [drawn(n, c), drawn(n, c, positive=True), drawn(c), drawn(c)]
    leaves += [drawn(affine), drawn(affine)]
    leaves = [t.requires_grad_() for t in leaves]
    moments, parameters = Moments(*leaves[:2], positions), leaves[2:]
    if observed:
        kept = [t.detach() for t in batch_statistics(moments, parts)]
    else:
        kept = [drawn(parts, 1, c), drawn(parts, 1, c, positive=True)]
    program = BatchChannel(groups, 1e-3, *kept, share=1 / samples if observed else None)
    ends = drawn(n, c), drawn(n, c)
    expected = torch.autograd.grad(program(moments, *parameters), leaves, ends)
    with torch.no_grad():
        decided, way = program.forward(moments, *parameters)
        found = program.backward(way, *ends)
    torch.testing.assert_close(tuple(decided), program(moments, *parameters))
    torch.testing.assert_close(tuple(found), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_one_activation_is_kept(statistics):
    layer, kept = made(statistics), []
    x = torch.randn(4, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.normalized(x, relu=True)
    assert [t.data_ptr() for t in kept if t.numel() >= x.numel()] == [x.data_ptr()]


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("training", [True, False])
def test_relu_in_the_same_write(statistics, training):
    layer = made(statistics).train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(4, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    found = gradients(lambda t: layer.normalized(t, relu=True), layer, x, dy)
    torch.testing.assert_close(found, gradients(lambda t: other(t).relu(), other, x, dy))
    same_buffers(layer, buffers(other), rtol=0, atol=0)


# ---- running statistics


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("rate", [0.1, 0.73, 1])
@pytest.mark.parametrize("affine", ["group", "channel"])
def test_every_batch_corrects_the_estimates_and_is_normalized_by_them(kind, shape, rate, affine):
    layer = made("running", kind=kind, update_rate=rate, affine=affine)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    for step in range(4):
        x = 2 + 3 * torch.randn(shape, dtype=torch.float64)
        mean, var = estimate(mean, var, x, rate)
        y = layer(x)
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y, by_constants(layer, x, mean, var), rtol=1e-10, atol=1e-10)
        assert layer.num_batches_tracked == step + 1


@layouts()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_train_and_eval_mode_are_one_function(layout, dtype):
    layer = made("running", dtype=torch.float32)
    x = layout(torch.randn(3, 8, 6, 6)).to(dtype)
    y = layer.train()(x)
    assert torch.equal(y, layer.eval()(x))


def test_no_gradient_goes_through_the_estimates():
    layer = made("running", update_rate=1)
    x = torch.randn(4, 8, 6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    found = gradients(layer, layer, x, dy)
    mean, var = layer.running_mean, layer.running_var
    expected = gradients(lambda t: by_constants(layer, t, mean, var), layer, x, dy)
    torch.testing.assert_close(found, expected)
    assert not any(b.requires_grad for b in layer.buffers())


@pytest.mark.parametrize("statistics", STATISTICS)
def test_gradients_through_the_statistics_tell_the_modes_apart(statistics):
    # A shift of every sample by the same does nothing where the batch's own mean is taken off.
    layer = made(statistics, update_rate=0.5)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 9))
    x = torch.randn(4, 8, 6, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x), x, torch.randn_like(x))
    through = channel(dx).sum(1).abs().max()
    assert (through < 1e-10) == (statistics == "batch")


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, math.nan])
def test_rates_that_would_not_move_or_overshoot_are_refused(rate):
    with pytest.raises(ConfigError, match="update_rate must be above 0 and at most 1"):
        BatchChannelNorm(8, 4, statistics="running", update_rate=rate)


def test_many_small_batches_find_the_true_moments():
    layer = BatchChannelNorm2d(4, 2, statistics="running", update_rate=0.01)
    mean, deviation = torch.tensor([0.0, 5, -3, 40]), torch.tensor([1.0, 0.2, 7, 2])
    size = (1, 4, 1, 1)
    tail = []
    with torch.no_grad():
        for step in range(1500):
            layer(mean.view(size) + deviation.view(size) * torch.randn(2, 4, 3, 3))
            if step >= 1000:
                tail.append(torch.stack([layer.running_mean, layer.running_var]))
    found = torch.stack(tail).mean(0)
    assert ((found[0] - mean).abs() < 0.05 * deviation).all()
    torch.testing.assert_close(found[1], deviation.square(), rtol=0.05, atol=0)


# ---- parts of a batch


def batch_buffers(layer, parts, momentum=0.1):
    """Running statistics after a batch whose parts count alike."""
    rows = [channel(p) for p in parts]
    mean = torch.stack([r.mean(1) for r in rows]).mean(0)
    var = torch.stack([r.var(1) for r in rows]).mean(0)
    return layer.running_mean.lerp(mean, momentum), layer.running_var.lerp(var, momentum)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("affine", ["group", "channel"])
def test_parts_have_statistics_of_their_own(size, affine):
    layer = made(normalization_batch=size, affine=affine)
    whole = copy.deepcopy(layer)
    whole.normalization_batch = None
    x = torch.randn(6, 8, 5, dtype=torch.float64, requires_grad=True)
    expected_mean, expected_var = batch_buffers(layer, x.detach().split(size))
    dy = torch.randn_like(x)
    found = gradients(layer, layer, x, dy)
    torch.testing.assert_close(layer.running_mean, expected_mean)
    torch.testing.assert_close(layer.running_var, expected_var)
    assert layer.num_batches_tracked == 1
    expected = gradients(lambda t: torch.cat([whole(p) for p in t.split(size)]), whole, x, dy)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize(("samples", "size"), [(7, 3), (5, 2), (4, 3), (3, 1), (2, 3)])
def test_what_is_left_over_is_a_part_too(statistics, samples, size):
    layer = made(statistics, normalization_batch=size)
    whole = copy.deepcopy(layer)
    whole.normalization_batch = None
    x = torch.randn(samples, 8, 5, dtype=torch.float64)
    expected = torch.cat([whole(p) for p in x.split(size)])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("samples", [2, 5, 6, 7])
def test_running_statistics_take_the_parts_in_sequence(samples):
    layer = made("running", normalization_batch=2)
    one_by_one = copy.deepcopy(layer)
    one_by_one.normalization_batch = None
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(samples, 8, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    expected = gradients(
        lambda t: torch.cat([one_by_one(p) for p in t.split(2)]), one_by_one, x, dy
    )
    torch.testing.assert_close(gradients(layer, layer, x, dy), expected)
    for part in x.split(2):
        mean, var = estimate(mean, var, part, 0.1)
    for one in (layer, one_by_one):
        torch.testing.assert_close(one.running_mean, mean)
        torch.testing.assert_close(one.running_var, var)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_parts_are_for_training_only(statistics):
    layer = made(statistics, normalization_batch=2).eval()
    whole = copy.deepcopy(layer)
    whole.normalization_batch = None
    before = buffers(layer)
    x = torch.randn(5, 8, 5, dtype=torch.float64)
    assert torch.equal(layer(x), whole(x))
    same_buffers(layer, before, rtol=0, atol=0)


# ---- options that do not go together, inputs that do not fit


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"statistics": "runing"}, "Did you mean 'running'"),
        ({"affine": True}, "affine must be 'group' or 'channel'; got True"),
        ({"normalization_batch": 0}, "normalization_batch must be 1 or more"),
        ({"normalization_batch": 2, "synchronize": True}, "Choose one of synchronize"),
        ({"num_groups": 3}, "got 3 groups of 8 channels. The nearest that fits is num_groups=2"),
        ({"num_groups": 32}, "got 32 groups of 8 channels. The nearest that fits is num_groups=4"),
        ({"num_groups": 0}, "The nearest that fits is num_groups=1"),
    ],
)
def test_options_that_do_not_fit(options, says):
    with pytest.raises(ConfigError, match=says):
        BatchChannelNorm(8, **{"num_groups": 4} | options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "says"),
    [
        (BatchChannelNorm1d, (2, 8, 4, 4), "2 or 3 dimensions"),
        (BatchChannelNorm2d, (2, 8, 4), "4 dimensions"),
        (BatchChannelNorm3d, (2, 8, 4, 4), "5 dimensions"),
        (BatchChannelNorm2d, (2, 6, 4, 4), r"\(N, 8, \*spatial\); got \(2, 6, 4, 4\)"),
        (BatchChannelNorm2d, (8, 4, 4), "Channels are axis 1"),
        (BatchChannelNorm, (8,), "Channels are axis 1"),
    ],
)
def test_inputs_that_do_not_fit(kind, shape, says, training):
    layer = kind(8, 4).train(training)
    before = buffers(layer)
    with pytest.raises(ShapeError, match=says):
        layer(torch.zeros(shape))
    same_buffers(layer, before, rtol=0, atol=0)


def functional(x, channels=8, **options):
    one, none = torch.ones(channels), torch.zeros(channels)
    given = {"weight": one, "bias": none, "group_weight": one, "group_bias": none}
    return batch_channel_norm(x, **given | {"num_groups": 4} | options)


def test_what_the_function_refuses():
    x = torch.randn(2, 8, 3)
    with pytest.raises(ConfigError, match="both mean and var"):
        functional(x, mean=torch.zeros(8))
    with pytest.raises(ConfigError, match="both mean and var"):
        functional(x, var=torch.ones(8))
    with pytest.raises(ConfigError, match="The nearest that fits is num_groups=4"):
        functional(x, num_groups=5)
    with pytest.raises(ShapeError, match=r"batch_channel_norm needs input of shape \(N, 8"):
        functional(torch.randn(2, 4, 3))
    with pytest.raises(ShapeError, match=r"int64"):
        functional(torch.zeros(2, 8, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "size"),
    [("bias", 3), ("bias", 4), ("group_weight", 3), ("group_weight", 16), ("group_bias", 3)],
)
def test_the_function_refuses_parameters_of_another_size(name, size):
    with pytest.raises((EvenkeelError, RuntimeError)):
        functional(torch.randn(2, 8, 3), **{name: torch.ones(size)})


def test_the_function_is_the_layer():
    layer = made("running")
    x = torch.randn(3, 8, 5, dtype=torch.float64)
    given = dict(layer.named_parameters())
    y = batch_channel_norm(x, **given, num_groups=4)
    assert torch.equal(y, made_batch(layer)(x))
    mean, var = layer.running_mean, layer.running_var
    y = batch_channel_norm(x, **given, num_groups=4, mean=mean, var=var, relu=True)
    assert torch.equal(y, layer.eval()(x).relu())


def made_batch(layer):
    other = BatchChannelNorm(8, 4, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    return other


def test_the_function_takes_an_empty_batch():
    assert functional(torch.zeros(0, 8, 3)).shape == (0, 8, 3)


# ---- state


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("affine", ["group", "channel"])
def test_a_checkpoint_of_batch_norm_loads(statistics, affine):
    theirs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    for _ in range(3):
        theirs(torch.randn(4, 3, 8, 8))
    layer = BatchChannelNorm2d(8, 4, statistics=statistics, affine=affine)
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), layer)
    with torch.no_grad():
        layer.group_weight.uniform_(0.5, 2)
    kept = layer.group_weight.clone()
    state = theirs.state_dict()
    names = set(state)
    assert not any(ours.load_state_dict(state, strict=True))
    assert set(state) == names
    assert torch.equal(layer.group_weight, kept)
    assert layer.num_batches_tracked == 3
    x = torch.randn(4, 3, 8, 8)
    expected = two_norms(layer, theirs.eval()(x))
    torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-5, atol=1e-5)


def test_other_gaps_in_a_checkpoint_are_noticed():
    layer = made()
    state = layer.state_dict()
    state.pop("running_var")
    with pytest.raises(RuntimeError, match="running_var"):
        layer.load_state_dict(state)
    state = {"weight": layer.weight}
    with pytest.raises(RuntimeError, match="bias"):
        layer.load_state_dict(state)


def twin_by_state(layer):
    other = BatchChannelNorm(8, 4, statistics=layer.statistics, dtype=torch.float64)
    other.load_state_dict(layer.state_dict(), strict=True)
    return other


def twin_by_file(layer, tmp_path):
    ek.save(layer, tmp_path / "layer.safetensors")
    other = BatchChannelNorm(8, 4, statistics=layer.statistics, dtype=torch.float64)
    return ek.load(tmp_path / "layer.safetensors", model=other)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle", "file"])
@pytest.mark.parametrize("trained", [False, True])
def test_copies_are_the_same_layer(statistics, way, trained, tmp_path):
    layer = made(statistics)
    x = torch.randn(4, 8, 5, dtype=torch.float64, requires_grad=True)
    if trained:
        layer(x).sum().backward()
    other = {
        "state_dict": twin_by_state,
        "deepcopy": copy.deepcopy,
        "pickle": lambda one: pickle.loads(pickle.dumps(one)),
        "file": lambda one: twin_by_file(one, tmp_path),
    }[way](layer)
    assert not {t.data_ptr() for t in other.state_dict().values()} & {
        t.data_ptr() for t in layer.state_dict().values()
    }
    assert torch.equal(other(x), layer(x))
    same_buffers(other, buffers(layer), rtol=0, atol=0)
    assert torch.equal(other.eval()(x), layer.eval()(x))


def test_only_parameters_and_buffers_are_in_the_state():
    layer = made("running")
    layer(torch.randn(4, 8, 5, dtype=torch.float64))
    names = {"weight", "bias", "group_weight", "group_bias", *BUFFERS}
    assert set(layer.state_dict()) == names


@pytest.mark.parametrize("affine", ["group", "channel"])
def test_reset_parameters_starts_anew(affine):
    layer = made(affine=affine, dtype=torch.float32)
    layer.num_batches_tracked.fill_(9)
    layer.reset_parameters()
    fresh = BatchChannelNorm(8, 4, affine=affine)
    for name, value in fresh.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "BatchChannelNorm2d(8, 4, statistics='batch')"),
        (
            {"statistics": "running", "update_rate": 0.05, "normalization_batch": 2},
            "BatchChannelNorm2d(8, 4, statistics='running', update_rate=0.05, "
            "normalization_batch=2)",
        ),
        ({"synchronize": True}, "BatchChannelNorm2d(8, 4, statistics='batch', synchronize=True)"),
    ],
)
def test_it_says_what_it_was_made_with(options, text):
    assert repr(BatchChannelNorm2d(8, 4, **options)) == text


def test_on_the_meta_device_and_off_it():
    layer = BatchChannelNorm2d(8, 4, device="meta")
    x = torch.zeros(2, 8, 4, 4, device="meta")
    assert layer(x).is_meta
    assert layer.eval()(x).shape == x.shape
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    y = torch.randn(2, 8, 4, 4)
    assert torch.equal(layer.train()(y), BatchChannelNorm2d(8, 4)(y))


# ---- activation checkpointing


def trained(layer, x, dy, wrap, *, calls=1):
    leaf = x.clone().requires_grad_()
    y = sum(wrap(layer, k * leaf) for k in range(1, calls + 1))
    found = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
    return y, found


def called(layer, x):
    return layer(x)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("size", [None, 2, 3], ids=["whole", "parts", "parts and a rest"])
def test_recomputation_updates_nothing_and_gives_the_same(statistics, use_reentrant, size):
    layer = made(statistics, normalization_batch=size, update_rate=0.5)
    other = copy.deepcopy(layer)
    for step in range(2):
        x = 1 + step + torch.randn(4, 8, 6, dtype=torch.float64)
        dy = torch.randn_like(x)
        leaf = x.clone().requires_grad_()
        y = checkpoint(other, leaf, use_reentrant=use_reentrant)
        y.backward(dy)
        expected, grads = trained(layer, x, dy, called)
        assert torch.equal(y, expected)
        found = [leaf.grad, *(p.grad for p in other.parameters())]
        torch.testing.assert_close(found, list(grads), rtol=1e-12, atol=1e-12)
        same_buffers(other, buffers(layer), rtol=0, atol=0)
        other.zero_grad()


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_of_two_batches_after_both_were_seen(statistics, use_reentrant):
    layer = made(statistics, update_rate=0.5)
    other = copy.deepcopy(layer)
    x = torch.randn(4, 8, 6, dtype=torch.float64)
    dy = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    y = sum(checkpoint(other, k * leaf, use_reentrant=use_reentrant) for k in (1, 2))
    y.backward(dy)
    expected, grads = trained(layer, x, dy, called, calls=2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(leaf.grad, grads[0])
    same_buffers(other, buffers(layer), rtol=0, atol=0)


SECOND = pytest.mark.xfail(
    reason="a compiled graph cannot tell that it recomputes, nor does torch's batch norm",
    strict=True,
)


@pytest.mark.parametrize(
    ("outside", "statistics"),
    [
        ("compile", "batch"),
        pytest.param("compile", "running", marks=SECOND),
        pytest.param("checkpoint", "batch", marks=SECOND),
        pytest.param("checkpoint", "running", marks=SECOND),
    ],
)
def test_recomputation_where_the_layer_is_compiled(outside, statistics):
    layer = made(statistics, update_rate=0.5)
    other = copy.deepcopy(layer)
    torch.compiler.reset()
    if outside == "compile":
        fast = torch.compile(
            lambda t: checkpoint(other, t, use_reentrant=False), backend="aot_eager", fullgraph=True
        )
    else:
        inner = torch.compile(other, backend="aot_eager", fullgraph=True)

        def fast(t):
            return checkpoint(inner, t, use_reentrant=False)

    x = torch.randn(4, 8, 6, dtype=torch.float64)
    dy = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    fast(leaf).backward(dy)
    _, grads = trained(layer, x, dy, called)
    torch.testing.assert_close(leaf.grad, grads[0])
    same_buffers(other, buffers(layer))


# ---- frozen


@pytest.mark.parametrize("statistics", STATISTICS)
def test_frozen_in_a_network_that_trains(statistics):
    net = nn.Sequential(nn.Conv1d(3, 8, 1, dtype=torch.float64), made(statistics)).train()
    net[1].eval()
    before = buffers(net[1])
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    y = net(x)
    exact = by_constants(net[1], net[0](x), before["running_mean"], before["running_var"])
    torch.testing.assert_close(y, exact)
    found, expected = (
        torch.autograd.grad(t.square().sum(), list(net[0].parameters())) for t in (y, exact)
    )
    torch.testing.assert_close(found, expected)
    same_buffers(net[1], before, rtol=0, atol=0)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("training", [True, False])
def test_parameters_that_are_not_trained(statistics, training):
    layer = made(statistics).train(training)
    other = copy.deepcopy(layer).requires_grad_(False)
    x = torch.randn(4, 8, 6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    (found,) = torch.autograd.grad(other(x), x, dy)
    torch.testing.assert_close(found, gradients(layer, layer, x, dy)[0])
    assert not other(x.detach()).requires_grad
    only = copy.deepcopy(layer)
    only.weight.requires_grad_(False)
    only(x.detach()).backward(dy)
    assert only.weight.grad is None
    assert only.bias.grad is not None


@pytest.mark.parametrize("statistics", STATISTICS)
def test_second_derivatives_are_by_the_statistics_of_their_forward(statistics):
    layer = made(statistics, update_rate=0.5).eval()
    x = torch.randn(4, 8, 6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    (expected,) = torch.autograd.grad(layer(x), x, dy)
    y = layer(x)
    layer.train()(3 + 2 * x.detach())
    (found,) = torch.autograd.grad(y, x, dy, create_graph=True)
    torch.testing.assert_close(found, expected)


# ---- hostile input


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(BatchChannelNorm1d, (1, 8)), (BatchChannelNorm2d, (1, 8, 1, 1)), (BatchChannelNorm, (1, 8))],
)
def test_one_value_per_channel(kind, shape):
    x = torch.randn(shape)
    layer = kind(8, 4)
    before = buffers(layer)
    with pytest.raises(ShapeError, match=r"more than one value .*Use statistics='running'"):
        layer(x)
    same_buffers(layer, before, rtol=0, atol=0)
    assert layer.eval()(x).isfinite().all()
    layer = random_(kind(8, 4, statistics="running"))
    leaf = x.requires_grad_()
    layer(leaf).square().sum().backward()
    assert leaf.grad.isfinite().all()
    assert layer(x).isfinite().all()
    assert layer.num_batches_tracked == 2


def test_one_value_per_channel_of_a_part():
    layer = BatchChannelNorm1d(8, 4, normalization_batch=1)
    with pytest.raises(ShapeError, match=r"as a part of the batch. Use statistics='running'"):
        layer(torch.randn(4, 8))


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 4, 4), (3, 8, 0, 4)])
@pytest.mark.parametrize("size", [None, 2])
def test_an_empty_batch_changes_nothing(statistics, training, shape, size):
    layer = made(statistics, dtype=torch.float32, normalization_batch=size).train(training)
    before = buffers(layer)
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())
    same_buffers(layer, before, rtol=0, atol=0)


@layouts()
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_group(layout, statistics, value):
    layer = made(statistics, dtype=torch.float32)
    other = copy.deepcopy(layer)
    before = buffers(layer)
    x = torch.randn(4, 8, 5, 5)
    clean = other(layout(x))
    x[2, 5, 1, 3] = value
    y = layer(layout(x))
    finite = y.isfinite().flatten(2).all(2)
    expected = torch.ones(4, 8, dtype=torch.bool)
    expected[slice(None) if statistics == "batch" else 2, 4:6] = False
    assert torch.equal(finite, expected)
    others = torch.tensor([0, 1, 2, 3, 6, 7])  # in the group the estimates differ now
    torch.testing.assert_close(y[:, others], clean[:, others], rtol=1e-6, atol=1e-6)
    healthy = torch.arange(8) != 5
    for name in ("running_mean", "running_var"):
        now, usual = getattr(layer, name), getattr(other, name)
        assert now[5] == before[name][5]
        torch.testing.assert_close(now[healthy], usual[healthy])
        assert (now[healthy] != before[name][healthy]).all()


def test_a_batch_that_is_not_finite_anywhere_changes_no_statistics():
    layer = made("running", dtype=torch.float32)
    before = buffers(layer)
    layer(torch.full((2, 8, 4), math.nan))
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(layer, name), before[name])


@layouts()
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_a_mean_far_larger_than_the_deviation(layout, statistics, ratio):
    layer = made(statistics, dtype=torch.float32, update_rate=1)
    x = layout(ratio + torch.randn(4, 8, 12, 12))
    layer(x)  # from here on the estimates are about right
    exact = copy.deepcopy(layer).double()
    y, expected = layer(x), exact(x.double())
    assert (y - expected).norm() < 3e-7 * ratio * expected.norm()
    torch.testing.assert_close(layer.running_mean.double(), exact.running_mean, rtol=3e-7, atol=0)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-3, atol=0)


def test_constant_channels_give_what_biases_say():
    layer = made()
    x = torch.full((4, 8, 5), 7.0, dtype=torch.float64)
    z = layer.bias[None, :, None].expand(4, 8, 5)
    torch.testing.assert_close(layer(x), two_norms(layer, z))


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("module", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_any_precision_of_module_and_input(statistics, momentum, module, dtype, training):
    layer = made(statistics, dtype=torch.float32, momentum=momentum).to(module).train(training)
    exact = copy.deepcopy(layer).double()
    x = (1 + torch.randn(4, 8, 5, 5)).to(dtype).requires_grad_()
    y, expected = layer(x), exact(x.double())
    assert y.dtype == dtype
    coarse = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
    rtol = max(coarse[module], coarse[dtype])
    assert (y - expected).norm() < rtol * expected.norm()
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == module for p in layer.parameters())
    for name in ("running_mean", "running_var"):
        now = getattr(layer, name)
        assert now.dtype == torch.promote_types(module, torch.float32)  # never below
        rough = coarse[dtype]  # of the input alone
        torch.testing.assert_close(now.double(), getattr(exact, name), rtol=rough, atol=rough)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_half_precision_buffers_do_not_become_infinite(statistics):
    layer = BatchChannelNorm1d(8, 4, statistics=statistics, update_rate=0.5).half()
    x = 600 * torch.randn(4, 8, 16)
    layer(x.half())
    assert layer.running_mean.isfinite().all()
    assert layer.running_var.isfinite().all()


# ---- what else torch does with layers


def compiled(layer, backend):
    torch.compiler.reset()
    return torch.compile(layer, backend=backend, fullgraph=True)


def assert_compiled(layer, backend, layout=plain, shape=(5, 8, 4, 4), steps=3):
    other = copy.deepcopy(layer)
    fast = compiled(other, backend)
    for step in range(steps):
        x = layout(step + (1 + step) * torch.randn(shape)).to(layer.weight.dtype)
        x.requires_grad_()
        dy = layout(torch.randn(shape).to(x.dtype))
        y = fast(x)
        assert y.stride() == x.stride()
        found = torch.autograd.grad(y, [x, *other.parameters()], dy)
        expected = layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        exact = torch.autograd.grad(expected, [x, *layer.parameters()], dy)
        for ours, theirs in zip(found, exact, strict=True):
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        same_buffers(other, buffers(layer))


@layouts()
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("options", [{}, {"normalization_batch": 2}, {"momentum": None}], ids=str)
def test_compiled_in_train_mode(layout, statistics, options):
    assert_compiled(made(statistics, update_rate=0.5, **options), "aot_eager", layout)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_compiled_once_for_batches_of_any_size(statistics):
    layer = made(statistics)
    other = copy.deepcopy(layer)
    counter = CompileCounter()
    fast = compiled(other, counter)
    for n in (2, 3, 5, 7):
        x = torch.randn(n, 8, 4, dtype=torch.float64)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(fast(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiled_to_machine_code_the_estimates_are_those_of_the_forward():
    # Of this size the compiler would rather make small tensors again than keep them.
    layer = random_(BatchChannelNorm2d(32, 4, statistics="running", update_rate=0.5))
    assert_compiled(layer, "inductor", shape=(4, 32, 16, 16))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_compiled_in_eval_mode(backend, statistics):
    layer = made(statistics).eval()
    x = torch.randn(5, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(compiled(layer, backend)(x), layer(x))


@layouts()
@pytest.mark.parametrize("statistics", STATISTICS)
def test_exported_in_eval_mode_for_any_batch(layout, statistics):
    layer = made(statistics, kind=BatchChannelNorm2d).eval()
    x = layout(torch.randn(4, 8, 5, 5, dtype=torch.float64))
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    targets = {n.target for n in exported.graph.nodes if n.op == "call_function"}
    assert "evenkeel" not in {getattr(t, "namespace", None) for t in targets}
    for n in (1, 4, 9):
        other = layout(torch.randn(n, 8, 5, 5, dtype=torch.float64))
        torch.testing.assert_close(exported.module()(other), layer(other))


@pytest.mark.parametrize("statistics", STATISTICS)
def test_exported_in_train_mode_for_any_batch(statistics):
    layer = made(statistics)
    other = copy.deepcopy(layer)
    batch = torch.export.Dim("batch", min=2, max=64)
    x = torch.randn(4, 8, 5, dtype=torch.float64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    same_buffers(exported, buffers(other), rtol=0, atol=0)
    for n in (2, 4, 9):
        x = torch.randn(n, 8, 5, dtype=torch.float64)
        torch.testing.assert_close(exported(x), other(x))
    same_buffers(exported, buffers(other))


@pytest.mark.parametrize("statistics", STATISTICS)
def test_vmap_in_eval_mode(statistics):
    layer = made(statistics).eval()
    x = torch.randn(3, 2, 8, 5, 5, dtype=torch.float64)
    expected = torch.stack([layer(t) for t in x])
    torch.testing.assert_close(torch.vmap(layer)(x), expected)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_functional_gradients_in_eval_mode(statistics):
    layer = made(statistics).eval()
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).pow(3).sum()

    found = torch.func.grad(loss)({k: p.detach() for k, p in parameters.items()}, x)
    exact = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    torch.testing.assert_close(list(found.values()), list(exact))


@pytest.mark.parametrize("statistics", STATISTICS)
def test_functional_call_updates_the_buffers_it_is_given(statistics):
    layer = made(statistics)
    before, given = buffers(layer), buffers(layer)
    x = torch.randn(4, 8, 5, dtype=torch.float64)
    y = torch.func.functional_call(layer, given, (x,))
    same_buffers(layer, before, rtol=0, atol=0)
    assert torch.equal(y, layer(x))
    same_buffers(layer, given, rtol=0, atol=0)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("training", [True, False])
def test_under_autocast(statistics, training):
    layer = made(statistics, kind=BatchChannelNorm2d, dtype=torch.float32)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), layer).train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(4, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inner = net[0](x)
        y = net(x)
    assert y.dtype == inner.dtype == torch.bfloat16
    assert torch.equal(y, other(inner))
    assert layer.running_var.dtype == torch.float32
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_stays_so(statistics, training):
    layer = made(statistics, kind=BatchChannelNorm2d).train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(4, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    last = channels_last(x.detach()).requires_grad_()
    y, expected = layer(last), other(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(expected)
    (found,) = torch.autograd.grad(y, last, dy)
    torch.testing.assert_close(found, torch.autograd.grad(expected, x, dy)[0])
    assert found.stride() == last.stride()
    same_buffers(layer, buffers(other))


def test_the_example():
    layer = ek.norm.BatchChannelNorm2d(8, 4, statistics="running", update_rate=0.5)
    x = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert torch.equal(y, layer.eval()(x))
    mean, var, _ = measure(x)
    torch.testing.assert_close(layer.running_mean, 0.5 * mean[0])
    torch.testing.assert_close(layer.running_var, 0.5 + 0.5 * (var + mean.square())[0])


# ---- several processes

WORLD = 2
STEPS = 2
SPLITS = [(3, 3), (4, 2), (1, 5), (4, 0), (0, 4)]


def for_processes(statistics, *, momentum=0.1, synchronize=False):
    torch.manual_seed(3)
    options = {"momentum": momentum, "synchronize": synchronize, "update_rate": 0.5}
    return made(statistics, kind=BatchChannelNorm2d, affine="channel", **options)


def batches_for_processes(split):
    generator = torch.Generator().manual_seed(sum(split))
    shape = (STEPS, sum(split), 8, 3, 4)
    x = 2 + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randn(shape, generator=generator, dtype=torch.float64)


def stepped(layer, pairs):
    """Outputs, gradients and buffers of some training steps."""
    result = []
    for x, dy in pairs:
        y, found = trained(layer, x, dy, called)
        result.append({"y": y.detach(), "dx": found[0], "dp": found[1:], "state": buffers(layer)})
    return result


def in_ddp(rank, *, synchronize):
    """Gradients and buffers of a network of which every process has a part of each batch."""
    net = network_for_processes(synchronize=synchronize)
    parallel = DistributedDataParallel(net)
    x, dy = inputs_for_network()
    for step in range(STEPS):
        net.zero_grad()
        own = slice(0, 4) if rank == 0 else slice(4, 6)
        (parallel(x[step, own]) * dy[step, own]).sum().backward()
    grads = [p.grad * WORLD for p in net.parameters()]
    return {"grads": grads, "state": buffers(net)}


def network_for_processes(*, synchronize):
    torch.manual_seed(4)
    layers = [for_processes(s, synchronize=synchronize) for s in STATISTICS]
    convs = [nn.Conv2d(8, 8, 1, dtype=torch.float64) for _ in layers]
    return nn.Sequential(*(m for pair in zip(convs, layers, strict=True) for m in pair))


def inputs_for_network():
    return batches_for_processes((4, 2))


def work(rank, folder):
    """What one of the processes does; every result goes to a file."""
    torch.set_num_threads(1)
    where = f"file://{folder}/store"
    wait = timedelta(seconds=15)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=WORLD, timeout=wait)
    results = {}
    for statistics in STATISTICS:
        for momentum in (0.1, None):
            for split in SPLITS:
                x, dy = (t.split(split, dim=1)[rank] for t in batches_for_processes(split))
                layer = for_processes(statistics, momentum=momentum, synchronize=True)
                results[statistics, momentum, split] = stepped(layer, zip(x, dy, strict=True))
        x, _ = batches_for_processes((3, 3))
        results["eval", statistics] = layer.eval()(x[0]).detach()
    layer = for_processes("batch", synchronize=True)
    x = torch.randn(2, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    try:
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    except ConfigError as error:
        results["second derivative"] = str(error)
    for synchronize in (True, False):
        results["ddp", synchronize] = in_ddp(rank, synchronize=synchronize)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # one that leaves early may take the other with it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_process(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    processes = mp.spawn(work, (str(folder),), nprocs=WORLD, join=False)
    for _ in range(12):
        if processes.join(timeout=5):
            break
    else:
        for process in processes.processes:
            process.kill()
        pytest.fail("The processes did not end.")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.timeout(90)
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_processes_together_are_one_with_all_of_the_batch(by_process, statistics, momentum, split):
    x, dy = batches_for_processes(split)
    whole = stepped(for_processes(statistics, momentum=momentum), zip(x, dy, strict=True))
    for step, expected in enumerate(whole):
        parts = [found[statistics, momentum, split][step] for found in by_process]
        for name in ("y", "dx"):
            torch.testing.assert_close(torch.cat([p[name] for p in parts]), expected[name])
        grads = [sum(pair) for pair in zip(*(p["dp"] for p in parts), strict=True)]
        torch.testing.assert_close(grads, list(expected["dp"]))


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_process_remembers_the_same(by_process, statistics, momentum, split):
    x, dy = batches_for_processes(split)
    whole = stepped(for_processes(statistics, momentum=momentum), zip(x, dy, strict=True))
    for step, expected in enumerate(whole):
        for rank, found in enumerate(by_process):
            state = found[statistics, momentum, split][step]["state"]
            for name, value in expected["state"].items():
                torch.testing.assert_close(
                    state[name], value, msg=lambda s, n=name, r=rank: f"{n} of process {r}: {s}"
                )


@pytest.mark.parametrize("statistics", STATISTICS)
def test_eval_mode_exchanges_nothing(by_process, statistics):
    first, second = (found["eval", statistics] for found in by_process)
    assert first.isfinite().all()
    assert second.isfinite().all()


def test_synchronized_statistics_say_that_they_have_first_derivatives_only(by_process):
    assert all("first derivatives only" in found["second derivative"] for found in by_process)


def test_inside_distributed_data_parallel(by_process):
    net = network_for_processes(synchronize=False)
    x, dy = inputs_for_network()
    for step in range(STEPS):
        net.zero_grad()
        (net(x[step]) * dy[step]).sum().backward()
    for found in by_process:
        together = found["ddp", True]
        torch.testing.assert_close(together["grads"], [p.grad for p in net.parameters()])
        torch.testing.assert_close(together["state"], buffers(net))


def test_distributed_data_parallel_gives_all_the_buffers_of_the_first(by_process):
    net = network_for_processes(synchronize=False)
    x, _ = inputs_for_network()
    alone = copy.deepcopy(net)
    for step in range(STEPS):
        before = buffers(net)
        net(x[step, :4])
    torch.testing.assert_close(by_process[0]["ddp", False]["state"], buffers(net))
    alone.load_state_dict(before, strict=False)
    alone(x[STEPS - 1, 4:])
    torch.testing.assert_close(by_process[1]["ddp", False]["state"], buffers(alone))


def test_synchronizing_needs_a_process_group():
    with pytest.raises(ConfigError, match="needs a process group"):
        BatchChannelNorm(8, 4, synchronize=True)(torch.randn(2, 8, 3))
    layer = BatchChannelNorm(8, 4, synchronize=True).eval()
    assert layer(torch.randn(2, 8, 3)).isfinite().all()


def test_one_channel_to_a_group_is_refused():
    with pytest.raises(ConfigError, match="of a channel alone, the group's statistics undo"):
        BatchChannelNorm2d(8, 8)
    assert BatchChannelNorm2d(1, 1)(torch.randn(2, 1, 3, 3)).shape == (2, 1, 3, 3)


def test_what_was_forgotten_is_not_guessed():
    layer = made("running", update_rate=0.5)
    x = torch.randn(4, 8, 5, dtype=torch.float64, requires_grad=True)
    first = checkpoint(layer, x, use_reentrant=False)
    with torch.no_grad():
        for k in range(RECENT):
            layer(torch.randn(4, 8, 5, dtype=torch.float64) + k)
    with pytest.raises(ConfigError, match="followed by more than 16 others"):
        first.sum().backward()


def test_what_is_kept_for_recomputation_stays_behind():
    layer = made("running", dtype=torch.float32)
    layer(torch.randn(4, 8, 5))
    assert len(layer._recent) == 1
    assert len(copy.deepcopy(layer)._recent) == len(pickle.loads(pickle.dumps(layer))._recent) == 0
    assert len(layer.to(torch.float64)._recent) == 0


def test_a_compiled_graph_breaks_where_processes_talk(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1
    )
    try:
        layer = BatchChannelNorm1d(8, 4, synchronize=True)
        other = pickle.loads(pickle.dumps(layer))
        x = torch.randn(4, 8, 5)
        compiled_ = torch.compile(torch.nn.Sequential(other, torch.nn.ReLU()), backend="eager")
        torch.testing.assert_close(compiled_(x), layer(x).relu())
        y = layer(x.requires_grad_())
        with pytest.raises(ConfigError, match="first derivatives only"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
    finally:
        torch.distributed.destroy_process_group()


def test_running_statistics_in_half_precision_do_not_stop_short():
    layer = BatchChannelNorm1d(4, 2, statistics="running", update_rate=0.01).bfloat16()
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    for _ in range(600):
        layer(4 + torch.randn(8, 4, 16).bfloat16())
    assert (layer.running_mean - 4).abs().max() < 0.1
    assert layer.double().running_mean.dtype == torch.float64
