"""The online layer: batch norm in train mode, and in eval mode one that follows the hardware."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel import models
from evenkeel.analog import Gain, program
from evenkeel.audit.remedy import as_row
from evenkeel.calibrate import calibrate_, match_
from evenkeel.errors import ConfigError
from evenkeel.norm import (
    NoiseAwareBatchNorm,
    NoiseAwareBatchNorm1d,
    NoiseAwareBatchNorm2d,
    NoiseAwareBatchNorm3d,
    convert_,
    noise_aware,
)
from evenkeel.norm.remedies import Online

CASES = [
    (NoiseAwareBatchNorm1d, nn.BatchNorm1d, (8, 3)),
    (NoiseAwareBatchNorm1d, nn.BatchNorm1d, (8, 3, 5)),
    (NoiseAwareBatchNorm2d, nn.BatchNorm2d, (8, 3, 4, 5)),
    (NoiseAwareBatchNorm3d, nn.BatchNorm3d, (4, 3, 2, 3, 4)),
    (NoiseAwareBatchNorm, nn.BatchNorm1d, (8, 3)),
    (NoiseAwareBatchNorm, nn.BatchNorm2d, (8, 3, 4, 5)),
    (NoiseAwareBatchNorm, nn.BatchNorm3d, (4, 3, 2, 3, 4)),
]
STATISTICS = ("running_mean", "running_var")


def settled(features: int = 3, *shape: int, **options) -> NoiseAwareBatchNorm:
    """In eval mode, warmed up on standard normal activations."""
    options = {"window": 64, "update_rate": 0.1} | options
    layer = NoiseAwareBatchNorm(features, **options).eval()
    serve(layer, torch.randn(1100, features, *shape), 100)
    return layer


@torch.no_grad()
def serve(layer: nn.Module, x: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.cat([layer(part) for part in x.split(batch)])


def buffers(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.named_buffers()}


def changed(layer: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {k for k, v in layer.named_buffers() if not torch.equal(v, before[k])}


def offline(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = x.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, correction=0)


def random_(layer: nn.Module) -> nn.Module:
    """Parameters and statistics that are not the ones it starts with."""
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            if tensor is not None:
                tensor.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


# ---- batch norm where it should be


@pytest.mark.parametrize(("kind", "reference", "shape"), CASES)
@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
def test_in_train_mode_it_is_batch_norm(kind, reference, shape, momentum):
    own = random_(kind(3, eps=1e-3, momentum=momentum))
    theirs = reference(3, eps=1e-3, momentum=momentum)
    theirs.load_state_dict({k: v for k, v in own.state_dict().items() if k in theirs.state_dict()})
    for _ in range(3):
        x = 2 + 3 * torch.randn(shape)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        assert torch.equal(own(mine), theirs(other))
        weights = torch.randn(shape)
        (own(mine) * weights).sum().backward()
        (theirs(other) * weights).sum().backward()
        assert torch.equal(mine.grad, other.grad)
    state = own.state_dict()
    assert all(torch.equal(state[k], v) for k, v in theirs.state_dict().items())
    assert state["samples_tracked"] == state["windows_tracked"] == 0


@pytest.mark.parametrize(("kind", "reference", "shape"), CASES)
def test_without_tracking_it_is_batch_norm_in_eval_mode(kind, reference, shape):
    own, theirs = random_(kind(3)).eval(), reference(3).eval()
    theirs.load_state_dict({k: v for k, v in own.state_dict().items() if k in theirs.state_dict()})
    own.tracking = False
    before = buffers(own)
    for _ in range(3):
        x = 2 + 3 * torch.randn(shape)
        assert torch.equal(own(x), theirs(x))
    assert not changed(own, before)


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_are_right_without_tracking(affine):
    layer = NoiseAwareBatchNorm2d(2, affine=affine, dtype=torch.float64).eval()
    layer.tracking = False
    layer.running_mean.normal_()
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (NoiseAwareBatchNorm1d, (2, 3, 4, 4)),
        (NoiseAwareBatchNorm2d, (2, 3, 4)),
        (NoiseAwareBatchNorm3d, (2, 3, 4, 4)),
        (NoiseAwareBatchNorm, (3,)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_inputs_of_wrong_dimensions(kind, shape, training):
    layer = kind(3).train(training)
    before = buffers(layer)
    with pytest.raises(ValueError, match="expected"):
        layer(torch.zeros(shape))
    assert not changed(layer, before)


# ---- following the hardware


@pytest.mark.parametrize("batch", [1, 7, 100])
@pytest.mark.parametrize(("stretch", "shift"), [(0.4, 0.0), (0.5, -1.5), (3.0, 2.0)])
def test_it_follows_a_shifted_and_stretched_stream(batch, stretch, shift):
    layer = NoiseAwareBatchNorm2d(3).eval()
    x = shift + stretch * torch.randn(1300, 3, 4, 4)
    y = serve(layer, x, batch)
    mean, var = offline(x)
    # to 3 % of a deviation and 5 % of the variance of statistics taken of all of it at once
    torch.testing.assert_close(layer.running_mean, mean, rtol=0, atol=0.03 * stretch)
    torch.testing.assert_close(layer.running_var, var, rtol=0.05, atol=0)
    after = y[600:].transpose(0, 1).flatten(1)
    assert after.mean(1).abs().max() < 0.1
    assert (after.std(1) - 1).abs().max() < 0.1


def test_deviations_between_channels_and_positions_are_told_apart():
    layer = NoiseAwareBatchNorm1d(2).eval()
    level = torch.tensor([1.0, 5.0])
    x = level[:, None] * (torch.randn(1200, 2, 6) + torch.randn(1200, 2, 1))  # equal within samples
    serve(layer, x, 64)
    torch.testing.assert_close(layer.running_var, 2 * level.square(), rtol=0.1, atol=0)


def test_single_samples_tell_the_variance_by_their_differences():
    layer = NoiseAwareBatchNorm1d(3).eval()
    x = 1 + 2 * torch.randn(400, 3)
    serve(layer, x, 1)
    torch.testing.assert_close(layer.running_mean, x.mean(0), rtol=0, atol=0.2)
    torch.testing.assert_close(layer.running_var, x.var(0), rtol=0.25, atol=0)


def test_the_first_batch_is_taken_in_before_it_is_normalized():
    layer = NoiseAwareBatchNorm1d(3).eval()
    x = 4 + 2 * torch.randn(400, 3)
    y = layer(x).detach()
    assert y.mean(0).abs().max() < 0.1
    assert (y.std(0) - 1).abs().max() < 0.1
    assert layer.samples_tracked == 400


def test_a_few_samples_do_not_throw_away_what_it_started_with():
    layer = random_(NoiseAwareBatchNorm1d(64)).eval()
    before = buffers(layer)
    layer(before["running_mean"] + torch.randn(1, 64))  # one sample has no variance at all
    assert (layer.running_var > 0.5 * before["running_var"]).all()


def test_all_layers_of_a_deep_network_come_right_together():
    def block():
        return [nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16, momentum=None), nn.ReLU()]

    net = nn.Sequential(*(layer for _ in range(6) for layer in block()))
    x = torch.randn(1500, 16)
    net.train()(x)
    net.eval()
    expected = net(x).detach()
    chip = program(net, Gain(0.5), seed=0)
    raw = (chip(x)[1100:] - expected[1100:]).norm()
    convert_(chip, NoiseAwareBatchNorm)
    y = serve(chip, x, 50)
    assert (y[1100:] - expected[1100:]).norm() < 0.3 * raw


def test_while_warming_up_every_sample_counts_and_later_only_whole_windows():
    layer = NoiseAwareBatchNorm1d(2, window=64).eval()
    for n, tracked in ((100, 100), (900, 1000), (300, 1300)):  # whole batches are taken in
        layer(torch.randn(n, 2))
        assert layer.samples_tracked == tracked
    assert layer.window_samples == 0
    before = buffers(layer)
    for _ in range(7):  # 8 batches at the least
        layer(torch.randn(64, 2))
    assert changed(layer, before) == {"window_samples", "window_calls", "window_sums"}
    layer(torch.randn(64, 2))
    assert layer.windows_tracked == 1
    assert layer.window_samples == layer.window_calls == 0
    assert layer.window_sums.abs().sum() == 0
    for name in STATISTICS:
        assert not torch.equal(getattr(layer, name), before[name])
    for _ in range(9):  # and 64 samples
        layer(torch.randn(7, 2))
    assert layer.windows_tracked == 1
    layer(torch.randn(1, 2))
    assert layer.windows_tracked == 2


def test_a_window_moves_the_statistics_by_the_update_rate():
    layer = settled(2, update_rate=0.25)
    layer.windows_tracked.fill_(1000)
    layer.unrest.fill_(1e6)  # no doubt of anything
    before = buffers(layer)
    x = 0.5 + 1.5 * torch.randn(80, 2)
    serve(layer, x, 10)
    mean, var = offline(x)
    old = before["running_mean"], before["running_var"]
    torch.testing.assert_close(layer.running_mean, old[0] + 0.25 * (mean - old[0]))
    torch.testing.assert_close(layer.running_var, old[1] + 0.25 * (var - old[1]))


def test_the_first_windows_weigh_more_than_the_update_rate():
    layer = settled(2, update_rate=0.01)
    layer.unrest.fill_(1e6)
    for k in range(4):
        before = layer.running_mean.clone()
        x = 0.5 + torch.randn(80, 2)
        serve(layer, x, 10)
        rate = (layer.running_mean - before) / (x.mean(0) - before)
        torch.testing.assert_close(rate, torch.full((2,), 1 / (2 + k)), rtol=1e-3, atol=0)


def test_after_warming_up_a_sample_does_not_depend_on_its_batch():
    layer = settled(3, 4)
    x = torch.randn(16, 3, 4)
    alone = copy.deepcopy(layer)(x[:1])
    among = copy.deepcopy(layer)(x)[:1]
    others = x.clone()
    others[1:] = 1e3
    strange = copy.deepcopy(layer)(others)[:1]
    for y in (among, strange):
        torch.testing.assert_close(y, alone, rtol=1e-6, atol=1e-6)


# ---- the guard


def clusters(count: int, only: int | None = None) -> torch.Tensor:
    """Ten well separated classes of activations in eight channels."""
    centers = 2 * torch.randn(10, 8, generator=torch.Generator().manual_seed(9))
    classes = torch.randint(10, (count,)) if only is None else torch.full((count,), only)
    return centers[classes] + 0.3 * torch.randn(count, 8)


def warmed_up_on_clusters() -> NoiseAwareBatchNorm:
    layer = NoiseAwareBatchNorm1d(8).eval()
    serve(layer, clusters(1100), 50)
    return layer


@pytest.mark.parametrize("batch", [10, 50])
def test_a_long_run_of_one_class_hardly_moves_the_statistics(monkeypatch, batch):
    torch.manual_seed(0)
    x = clusters(2000, only=3)
    shares = []
    for surprise in (noise_aware.SURPRISE, 1e9):
        monkeypatch.setattr(noise_aware, "SURPRISE", surprise)
        torch.manual_seed(0)
        layer = warmed_up_on_clusters()
        before = layer.running_mean.clone()
        serve(layer, x, batch)
        way = (x.mean(0) - before).norm()
        shares.append(float((layer.running_mean - before).norm() / way))
        if surprise < 1e9:
            mixed = serve(layer, clusters(500), batch)
            assert mixed.mean(0).abs().max() < 0.3
    guarded, unguarded = shares
    assert guarded < 0.05
    assert unguarded > 0.4


def test_a_mixed_stream_is_believed():
    layer = warmed_up_on_clusters()
    x = clusters(6000)
    before = layer.running_mean.clone()
    layer.running_mean += 0.05 * layer.running_var.sqrt()
    serve(layer, x, 50)
    error = (layer.running_mean - x.mean(0)) / layer.running_var.sqrt()
    assert error.square().mean().sqrt() < 0.05
    assert not torch.equal(layer.running_mean, before)


def test_a_change_that_stays_is_followed(monkeypatch):
    monkeypatch.setattr(noise_aware, "CALLS", 1)  # so that few calls are many windows
    layer = settled(8)
    shift = 0.3
    for _ in range(500):
        layer(torch.randn(64, 8) + shift)
    assert (layer.running_mean - shift).abs().mean() < 0.3 * shift
    torch.testing.assert_close(layer.running_var, torch.ones(8), rtol=0.2, atol=0)


def window_off_by(layer: NoiseAwareBatchNorm, errors: float) -> torch.Tensor:
    """A window of 80 samples whose means are so many standard errors from the running ones."""
    x = torch.randn(80, layer.num_features)
    x = (x - x.mean(0)) / x.std(0)  # a standard error of exactly 1 / sqrt(80)
    return layer.running_mean + layer.running_var.sqrt() * (x + errors / 80**0.5)


@pytest.mark.parametrize(("share", "believed"), [(0, 1), (0.97, 1), (1.03, 0), (3, 0)])
def test_windows_too_many_standard_errors_off_are_left_out(share, believed):
    layer = settled(8)
    layer.unrest.zero_()
    before = buffers(layer)
    x = window_off_by(layer, share * noise_aware.SURPRISE**0.5)
    serve(layer, x, 10)
    assert layer.windows_tracked == believed
    assert layer.doubted == (0 if believed else 80)
    assert layer.window_samples == layer.window_calls == 0
    if believed:
        mean = before["running_mean"]
        torch.testing.assert_close(layer.running_mean, (mean + x.mean(0)) / 2)  # the first window
    else:
        assert not changed(layer, before) & set(STATISTICS)


@pytest.mark.parametrize(("unrest", "believed"), [(0.27, 0), (0.33, 1)])
def test_what_batches_differed_by_while_warming_up_is_allowed_for(unrest, believed):
    # Twice as far off as allowed: four times 1 / 80 is 1 / 80 and an eighth of 0.3.
    layer = settled(8)
    layer.unrest.fill_(unrest)
    serve(layer, window_off_by(layer, 2 * noise_aware.SURPRISE**0.5), 10)
    assert layer.windows_tracked == believed


def test_a_run_that_outlasts_patience_is_a_change_and_warms_the_layer_up_anew():
    layer = settled(8, patience=200)
    layer.windows_tracked.fill_(50)
    for k in range(1, 3):
        serve(layer, 5 + torch.randn(80, 8), 10)
        assert layer.doubted == 80 * k
    serve(layer, torch.randn(80, 8), 10)  # a window as before: nothing has changed after all
    assert layer.doubted == 0
    assert layer.windows_tracked == 51
    for _ in range(3):
        serve(layer, 5 + torch.randn(80, 8), 10)
    assert layer.samples_tracked == layer.windows_tracked == layer.doubted == 0  # 240 in a row
    y = serve(layer, 5 + torch.randn(500, 8), 50)
    assert (layer.running_mean - 5).abs().max() < 0.3
    assert y[100:].mean(0).abs().max() < 0.3


@pytest.mark.parametrize("shift", [0.3, 1.0, 5.0])
def test_a_sudden_change_is_followed_after_a_while_by_default(shift):
    layer = NoiseAwareBatchNorm1d(8).eval()
    serve(layer, torch.randn(1100, 8), 50)
    serve(layer, shift + torch.randn(6000, 8), 50)
    assert (layer.running_mean - shift).abs().mean() < 0.1
    torch.testing.assert_close(layer.running_var, torch.ones(8), rtol=0.3, atol=0)


def test_noise_that_is_new_at_each_batch_is_learned_while_warming_up():
    """Offsets of whole batches, as a read of an array gives, are no surprise later on."""

    def offset(n):
        return torch.randn(n, 8) + 0.5 * torch.randn(8)

    def served(calm):
        layer = NoiseAwareBatchNorm1d(8, window=160).eval()
        for _ in range(55):
            layer(torch.randn(20, 8) if calm else offset(20))
        learned = float(layer.unrest)
        for _ in range(80):
            layer(offset(20))
        return learned, int(layer.windows_tracked)

    (calm, few), (restless, most) = served(True), served(False)
    assert restless == pytest.approx(0.25, rel=0.5)
    assert calm < 0.02
    assert few < 3
    assert most >= 9  # of 10


# ---- hostile input


def test_a_bad_batch_does_not_poison_the_statistics():
    for warm in (False, True):
        layer = settled(3) if warm else NoiseAwareBatchNorm(3).eval()
        before = buffers(layer)
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(8, 3)
            x[3, 1] = bad
            y = layer(x)
            assert torch.isfinite(y[:, 0]).all()
        assert not changed(layer, before) & {*STATISTICS, "unrest", "samples_tracked"}
        serve(layer, torch.randn(3000, 3), 50)
        assert all(torch.isfinite(b).all() for b in layer.buffers())
        torch.testing.assert_close(layer.running_var, torch.ones(3), rtol=0.2, atol=0)
        assert layer.windows_tracked > 1  # windows without it count again


def test_an_empty_batch_changes_no_statistics():
    for layer in (NoiseAwareBatchNorm2d(3).eval(), settled(3, 2, 2)):
        before = buffers(layer)
        assert layer(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)
        assert not changed(layer, before) & {*STATISTICS, "unrest", "samples_tracked"}


def test_one_element():
    layer = NoiseAwareBatchNorm(2).eval()
    y = layer(torch.tensor([[5.0, -1e4]]))
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(b).all() for b in layer.buffers())
    for _ in range(300):
        layer(torch.tensor([[5.0, -1e4]]))
    assert all(torch.isfinite(b).all() for b in layer.buffers())
    torch.testing.assert_close(layer.running_mean[0], torch.tensor(5.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("batch", [10, 100])
def test_a_mean_far_larger_than_the_deviation(batch):
    layer = NoiseAwareBatchNorm1d(3).eval()
    layer.running_mean.fill_(1e4 + 1)
    layer.running_var.fill_(4)
    x = 1e4 + torch.randn(1500, 3, 4)
    y = serve(layer, x, batch)
    mean, var = offline(x.double())
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=0.1, atol=0)
    assert (y[1100:].std((0, 2)) - 1).abs().max() < 0.1


def test_a_mean_far_from_the_one_it_starts_with_is_found_all_the_same():
    layer = NoiseAwareBatchNorm1d(3, window=64).eval()
    serve(layer, 1e4 + torch.randn(7000, 3, 4), 7)
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 1e4), rtol=0, atol=0.1)
    torch.testing.assert_close(layer.running_var, torch.ones(3), rtol=0.2, atol=0)


def test_channels_of_any_scale_keep_a_variance_above_zero():
    layer = NoiseAwareBatchNorm1d(3).eval()
    serve(layer, torch.randn(1500, 3) * torch.tensor([1e-6, 1.0, 1e6]), 50)
    assert (layer.running_var > 0).all()
    ratio = layer.running_var / torch.tensor([1e-12, 1.0, 1e12])
    torch.testing.assert_close(ratio[1:], torch.ones(2), rtol=0.2, atol=0)


# ---- state


@pytest.mark.parametrize(("kind", "reference", "shape"), CASES[:4])
def test_the_state_of_batch_norm_loads_strictly(kind, reference, shape):
    theirs = random_(reference(3))
    theirs(torch.randn(shape))
    own = kind(3).eval()
    serve(own, torch.randn(1100, *shape[1:]), 100)
    own.load_state_dict(theirs.state_dict())
    assert own.samples_tracked == own.windows_tracked == own.unrest == 0  # cold again
    own.tracking = False
    x = torch.randn(shape)
    assert torch.equal(own(x), theirs.eval()(x))
    nested = nn.Sequential(nn.Sequential(kind(3)))
    nested.load_state_dict(nn.Sequential(nn.Sequential(theirs)).state_dict())
    assert torch.equal(nested[0][0].weight, theirs.weight)


def test_its_own_state_comes_back_and_windows_do_not():
    layer = settled(3)
    serve(layer, torch.randn(1000, 3), 50)
    assert layer.window_samples > 0
    other = NoiseAwareBatchNorm(3).eval()
    other.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
        "samples_tracked", "windows_tracked", "doubted", "unrest",
    }  # fmt: skip
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in other.state_dict().items())
    assert other.window_samples == 0
    x = torch.randn(5, 3)
    assert torch.equal(other(x), layer(x))


def test_the_dict_that_is_loaded_is_not_changed():
    state = dict(nn.BatchNorm1d(3).state_dict())
    names = set(state)
    NoiseAwareBatchNorm1d(3).load_state_dict(state)
    assert set(state) == names


def test_resetting_the_statistics_forgets_all():
    layer = settled(3)
    serve(layer, torch.randn(700, 3), 10)
    layer.reset_running_stats()
    fresh = NoiseAwareBatchNorm(3, window=64, update_rate=0.1)
    assert not changed(layer, buffers(fresh))


def test_a_state_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        NoiseAwareBatchNorm(3).load_state_dict(nn.BatchNorm1d(4).state_dict())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_on_alike_and_apart(way):
    layer = settled(3)
    serve(layer, torch.randn(130, 3), 10)
    twin = way(layer)
    assert not changed(twin, buffers(layer))
    assert (twin.window, twin.update_rate, twin.tracking) == (64, 0.1, True)
    assert twin.patience == layer.patience
    x = torch.randn(300, 3)
    assert torch.equal(serve(twin, x, 10), serve(layer, x, 10))
    before = buffers(layer)
    serve(twin, torch.randn(300, 3), 10)
    assert not changed(layer, before)


# ---- dtypes, layouts, devices


def test_a_layer_in_lower_precision_keeps_its_sums_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        layer = settled(3)
        serve(layer, torch.randn(60, 3), 10)
        before = buffers(layer)
        layer.to(dtype)
        assert layer.running_mean.dtype == layer.weight.dtype == dtype
        for name in ("unrest", "window_sums"):
            assert getattr(layer, name).dtype == torch.float32
            assert torch.equal(getattr(layer, name), before[name])
        assert layer.samples_tracked.dtype == torch.int64
        y = serve(layer, torch.randn(300, 3, dtype=dtype), 10)
        assert y.dtype == dtype
        assert torch.isfinite(y).all()
        torch.testing.assert_close(layer.running_var.float(), torch.ones(3), rtol=0.3, atol=0)


def test_a_layer_made_in_lower_precision():
    layer = NoiseAwareBatchNorm2d(3, dtype=torch.bfloat16).eval()
    x = (2 + 3 * torch.randn(1200, 3, 2, 2)).bfloat16()
    serve(layer, x, 50)
    assert layer.window_sums.dtype == layer.unrest.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean.float(), torch.full((3,), 2.0), rtol=0.1, atol=0)
    torch.testing.assert_close(layer.running_var.float(), torch.full((3,), 9.0), rtol=0.15, atol=0)


def test_inputs_of_lower_precision_under_autocast():
    layer = NoiseAwareBatchNorm2d(3).eval()
    x = 2 + 3 * torch.randn(1200, 3, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = serve(layer, x.bfloat16(), 50)
    assert y.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    mean, var = offline(x)
    torch.testing.assert_close(layer.running_mean, mean, rtol=0, atol=0.1)
    torch.testing.assert_close(layer.running_var, var, rtol=0.05, atol=0)


def test_channels_last():
    layer, plain = NoiseAwareBatchNorm2d(3).eval(), NoiseAwareBatchNorm2d(3).eval()
    x = 1 + 2 * torch.randn(64, 3, 4, 5)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_the_meta_device():
    layer = NoiseAwareBatchNorm2d(3, device="meta")
    assert {t.device.type for t in [*layer.parameters(), *layer.buffers()]} == {"meta"}
    assert layer.eval()(torch.zeros(2, 3, 4, 4, device="meta")).shape == (2, 3, 4, 4)
    with torch.device("meta"):
        assert NoiseAwareBatchNorm(3).window_sums.is_meta
    real = layer.to_empty(device="cpu")
    real.load_state_dict(NoiseAwareBatchNorm2d(3).state_dict())
    assert {b.device.type for b in real.buffers()} == {"cpu"}


def test_full_graph_compilation_over_the_whole_life():
    layer = NoiseAwareBatchNorm1d(3).eval()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for n in (4, 4, 1, 700, 400, *[30] * 20):
        x = 1 + torch.randn(n, 3)
        assert torch.equal(compiled(x), twin(x))
    assert not changed(layer, buffers(twin))
    assert layer.windows_tracked > 1


def test_export_of_the_eval_mode():
    layer = NoiseAwareBatchNorm2d(3).eval()
    twin = copy.deepcopy(layer)
    exported = torch.export.export(layer, (torch.randn(50, 3, 2, 2),)).module()
    for _ in range(40):
        x = 1 + torch.randn(50, 3, 2, 2)
        torch.testing.assert_close(exported(x), twin(x))
    left = dict(exported.named_buffers())
    for name in (*STATISTICS, "samples_tracked", "windows_tracked"):
        torch.testing.assert_close(left[name], getattr(twin, name))
    assert twin.windows_tracked > 1


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_many_chips_at_once_under_vmap():
    layers = [random_(NoiseAwareBatchNorm1d(3)).eval() for _ in range(4)]
    parameters, stacked = torch.func.stack_module_state(layers)

    def run(parameters, buffers, x):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    for n in (300, 800, *[40] * 12):
        x = torch.randn(4, n, 3)
        y = torch.vmap(run)(parameters, stacked, x)
        expected = torch.stack([layer(part) for layer, part in zip(layers, x, strict=True)])
        torch.testing.assert_close(y, expected)
    for name, values in stacked.items():
        for value, layer in zip(values, layers, strict=True):
            torch.testing.assert_close(value, getattr(layer, name), msg=name)
    assert layers[0].windows_tracked > 0


def test_serving_in_inference_mode_and_outside_of_it():
    layer = NoiseAwareBatchNorm1d(3).eval()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            serve(layer, torch.randn(700, 3), 50)
    assert layer.windows_tracked > 0


# ---- convert_


def net_of(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU()).eval()


def freeze_(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, NoiseAwareBatchNorm):
            module.tracking = False


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, eps=0.1, momentum=0.3),
        nn.BatchNorm2d(8, affine=False),
        nn.SyncBatchNorm(8),
    ],
    ids=str,
)
def test_converted_networks_are_the_same_until_they_track(norm):
    torch.manual_seed(0)
    net, x = net_of(random_(copy.deepcopy(norm))), torch.randn(8, 3, 6, 6)
    freeze_(net)
    before = net(x)
    done = convert_(net, NoiseAwareBatchNorm)
    assert done.converted == ["1"]
    assert type(net[1]) is NoiseAwareBatchNorm
    assert (net[1].eps, net[1].momentum) == (norm.eps, norm.momentum)
    assert not net[1].training
    freeze_(net)
    assert torch.equal(net(x), before)


def test_conversion_keeps_dtype_device_and_mode():
    net = nn.Sequential(nn.BatchNorm1d(3).bfloat16(), nn.BatchNorm1d(3).double()).train()
    net[1].eval()
    convert_(net, NoiseAwareBatchNorm)
    assert [m.weight.dtype for m in net] == [torch.bfloat16, torch.float64]
    assert [m.running_mean.dtype for m in net] == [torch.bfloat16, torch.float64]
    assert [m.training for m in net] == [True, False]
    assert net[0].window_sums.dtype == torch.float32
    net = nn.Sequential(nn.BatchNorm1d(3, device="meta"))
    convert_(net, NoiseAwareBatchNorm)
    assert {t.device.type for t in net.state_dict().values()} == {"meta"}


def test_a_normalizer_in_two_places_stays_one():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.BatchNorm1d(3)
            self.two = nn.ModuleList([self.one, nn.BatchNorm1d(3)])

        def forward(self, x):
            return self.two[0](self.one(x)) + self.two[1](x)

    net = Shared()
    old = net.one
    done = convert_(net, NoiseAwareBatchNorm)
    assert done.converted == ["one", "two.0", "two.1"]
    assert net.one is net.two[0]
    assert isinstance(net.one, NoiseAwareBatchNorm)
    assert net.two[1] is not net.one
    done.undo()
    assert net.one is net.two[0] is old


def test_undo_puts_the_old_modules_back():
    net, x = net_of(random_(nn.BatchNorm2d(8))), torch.randn(64, 3, 6, 6)
    old, before = net[1], net(x)
    done = convert_(net, NoiseAwareBatchNorm)
    assert not torch.equal(net(3 * x + 1), before)
    done.undo()
    done.undo()
    assert net[1] is old
    assert torch.equal(net(x), before)


def test_other_normalizers_are_listed_with_the_reason():
    net = nn.Sequential(
        nn.GroupNorm(1, 3), nn.BatchNorm1d(3), nn.Sequential(nn.LayerNorm(3)), nn.LazyBatchNorm1d()
    )
    done = convert_(net, NoiseAwareBatchNorm)
    assert done.converted == ["1"]
    assert done.skipped == {
        "0": "GroupNorm is not a batch norm",
        "2.0": "LayerNorm is not a batch norm",
        "3": "it has not seen its first batch, and has no channels yet",
    }


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (nn.Sequential(nn.Linear(2, 2)), r"Sequential has none\.$"),
        (nn.Sequential(nn.GroupNorm(1, 2)), "'0': GroupNorm is not"),
        (nn.BatchNorm1d(2), "whole network"),
        (nn.Sequential(nn.LazyBatchNorm1d()), "first batch"),
        (nn.Sequential(NoiseAwareBatchNorm1d(3)), "'0': NoiseAwareBatchNorm1d"),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), "no running statistics"),
    ],
)
def test_nothing_to_convert_is_an_error(net, says):
    with pytest.raises(ConfigError, match=says):
        convert_(net, NoiseAwareBatchNorm)


def test_any_factory_will_do():
    net = net_of(random_(nn.BatchNorm2d(8)))
    weight = net[1].weight.clone()
    convert_(net, lambda channels: nn.GroupNorm(2, channels))
    assert isinstance(net[1], nn.GroupNorm)
    assert torch.equal(net[1].weight, weight)
    own = net_of(nn.BatchNorm2d(8))
    convert_(own, lambda channels: NoiseAwareBatchNorm2d(channels, window=16, update_rate=0.2))
    assert (own[1].window, own[1].update_rate) == (16, 0.2)


# ---- with calibration


def test_calibration_meanwhile_tracks_nothing_and_switches_tracking_back():
    net = nn.Sequential(nn.Linear(4, 3), NoiseAwareBatchNorm1d(3), NoiseAwareBatchNorm1d(3)).eval()
    net[2].tracking = False
    x = torch.randn(300, 4)
    net(x)
    before = buffers(net)
    calibrate_(net, x.split(50), gate=False, shrinkage=None)
    found = changed(net, before)
    assert found >= {f"{k}.{name}" for k in (1, 2) for name in STATISTICS}
    assert found <= {f"{k}.{n}" for k in (1, 2) for n in (*STATISTICS, "samples_tracked")}
    assert [net[1].tracking, net[2].tracking] == [True, False]
    torch.testing.assert_close(net[1].running_mean, net[0](x).mean(0), rtol=1e-4, atol=1e-5)
    assert net[1].samples_tracked >= 1024  # these statistics are to be trusted
    before = buffers(net)
    match_(net, [x], layers=["0"])
    after = buffers(net)
    assert all(torch.equal(after[k], v) for k, v in before.items())


# ---- in an audit


def test_the_online_row_of_an_audit(network, data):
    few = data.limited(test=400, calibration=128)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    options = {"devices": ["gain:0.5"], "chips": 1, "workers": 0, "store": ":memory:"}
    result = ek.audit(network, few, remedies=["none", "online", "online:16"], **options)
    none, online, _ = result.cells
    assert online.mean > none.mean + 20
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    own = copy.deepcopy(network)
    convert_(own, NoiseAwareBatchNorm)
    chip = program(own, Gain(0.5), seed=0)
    right = [(chip(x).argmax(1) == y).float() for x, y in few.test]
    assert online.chips[0] == pytest.approx(100 * float(torch.cat(right).mean()))
    if result.best_remedy.startswith("online"):
        assert any(isinstance(m, NoiseAwareBatchNorm) for m in result.best.modules())


def test_the_online_row_is_refused_without_batch_norm(data):
    net = models.build("resnet8_digits", norm="group").eval()
    assert "has none" in as_row("online").why_not(net)
    assert as_row("online").why_not(models.build("resnet8_digits")) is None
    with pytest.raises(ConfigError, match=r"'online' cannot be used .* takes the place of batch"):
        ek.audit(net, data, remedies=["none", "online"], store=":memory:")


def test_the_remedy_passes_its_settings_on():
    net = net_of(nn.BatchNorm2d(8))
    Online(16, 0.2).prepare_(net, None)
    assert type(net[1]) is NoiseAwareBatchNorm
    assert (net[1].window, net[1].update_rate) == (16, 0.2)


def test_names_and_settings_of_the_remedy():
    assert Online().name == "online"
    assert as_row("online:16:update_rate=0.5").name == "online:window=16:update_rate=0.5"
    assert as_row(as_row("online:16:update_rate=0.5").name).parts[0] == Online(16, 0.5)
    facts = Online(16.0).to_dict()
    assert (facts["type"], facts["window"]) == ("Online", 16)
    with pytest.raises(ConfigError, match="window"):
        Online(0)


# ---- what a reviewer broke


@pytest.mark.parametrize("made", ["dtype", "double", "default"])
def test_it_follows_in_float64_too(made):
    if made == "default":
        torch.set_default_dtype(torch.float64)
    try:
        layer = NoiseAwareBatchNorm1d(3, dtype=torch.float64 if made == "dtype" else None).eval()
        layer = layer.double() if made == "double" else layer
        x = 2 + torch.randn(1200, 3, dtype=torch.float64)
        serve(layer, x, 50)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.running_mean.dtype == torch.float64
    torch.testing.assert_close(layer.running_mean, x.mean(0), rtol=0, atol=0.1)


def test_an_empty_batch_is_not_counted_as_a_batch_of_a_window():
    layer = settled(3, 2, 2)
    before = buffers(layer)
    layer(torch.zeros(0, 3, 2, 2))
    assert not changed(layer, before)


def test_samples_without_positions_change_nothing():
    layer = settled(3, 2, 2)
    before = buffers(layer)
    layer(torch.zeros(2, 3, 0, 2))
    assert not changed(layer, before)


def test_loading_a_state_that_has_nothing_of_the_layer_changes_nothing():
    layer = settled(3)
    before = buffers(layer)
    layer.load_state_dict({}, strict=False)
    assert not changed(layer, before)


def test_loading_forgets_what_was_served_since_the_last_update():
    layer = settled(3)
    state = layer.state_dict()
    layer(torch.randn(9, 3))
    layer.load_state_dict(state)
    assert layer.window_samples == layer.window_calls == 0
    assert layer.window_sums.abs().sum() == 0


def test_gradients_reach_the_input_while_it_tracks():
    layer = NoiseAwareBatchNorm1d(3).eval()
    x = torch.randn(8, 3, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape


def test_export_for_batches_of_any_size():
    layer = NoiseAwareBatchNorm2d(3).eval()
    twin = copy.deepcopy(layer)
    shapes = ({0: torch.export.Dim("samples", min=2)},)
    x = torch.randn(8, 3, 2, 2)
    exported = torch.export.export(layer, (x,), dynamic_shapes=shapes).module()
    for n in (8, 3, 700):
        x = torch.randn(n, 3, 2, 2)
        torch.testing.assert_close(exported(x), twin(x))


def test_vmap_runs_without_a_warning_of_slowness():
    layers = [NoiseAwareBatchNorm1d(3).eval() for _ in range(2)]
    parameters, stacked = torch.func.stack_module_state(layers)

    def run(parameters, buffers, x):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    assert torch.vmap(run)(parameters, stacked, torch.randn(2, 5, 3)).shape == (2, 5, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"window": 1},
        {"patience": -1},
        {"update_rate": 0},
        {"update_rate": 1.5},
        {"update_rate": -1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        NoiseAwareBatchNorm(3, **options)


def test_batch_norm_that_keeps_no_statistics_is_not_given_ones_silently():
    net, x = net_of(nn.BatchNorm2d(8, track_running_stats=False)), 5 + torch.randn(8, 3, 6, 6)
    before = net(x)
    with contextlib.suppress(ConfigError):  # refused, kept as it was, or converted rightly
        convert_(net, NoiseAwareBatchNorm)
    freeze_(net)
    assert torch.equal(net(x), before)


def test_parameters_that_were_frozen_stay_frozen():
    net = nn.Sequential(nn.BatchNorm1d(3)).requires_grad_(False)
    convert_(net, NoiseAwareBatchNorm)
    assert not any(p.requires_grad for p in net.parameters())


def test_a_block_that_has_norm_in_its_name_is_no_normalizer():
    class ConvNormAct(nn.Sequential):
        pass

    net = nn.Sequential(ConvNormAct(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    done = convert_(net, NoiseAwareBatchNorm)
    assert done.converted == ["0.1"]
    assert not done.skipped


def test_an_audit_does_not_change_a_network_that_has_the_layer_already(network, data):
    convert_(network, NoiseAwareBatchNorm)
    before = buffers(network)
    few = data.limited(test=100, calibration=64)
    options = {"devices": ["gain:0.9"], "chips": 1, "workers": 0, "store": ":memory:"}
    prints = [
        ek.audit(network, few, remedies=["none"], **options).provenance["model_fingerprint"]
        for _ in range(2)
    ]
    assert not changed(network, before)
    assert prints[0] == prints[1]
