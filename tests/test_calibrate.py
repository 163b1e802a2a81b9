import copy

import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel.calibrate import ESTIMATORS, Statistics, collect, pool_statistics_
from evenkeel.calibrate.estimate import shrink
from evenkeel.calibrate.gate import split, verdict
from evenkeel.errors import CalibrationError, ConfigError
from evenkeel.moments import BatchMoments


def plain_net(eps: float = 1e-5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6, eps=eps), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5, eps=eps), nn.ReLU(),
    ).eval()  # fmt: skip


def images(data, count: int, size: int = 64):
    x = torch.cat([batch[0] for batch in data.calibration])[:count]
    return list(x.split(size))


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


# Estimators


def test_pooled_is_the_whole_set_and_mean_is_not():
    x = torch.randn(300, 4, 3, 3, dtype=torch.float64) * 2 + torch.randn(300, 1, 1, 1).double()
    parts = [BatchMoments.of(part) for part in x.split([7, 200, 93])]
    old = Statistics(torch.zeros(4).double(), torch.ones(4).double())
    flat = x.transpose(0, 1).flatten(1)
    mean, var = ESTIMATORS["pooled"](old, parts)
    torch.testing.assert_close(mean, flat.mean(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(var, flat.var(1), rtol=1e-10, atol=1e-12)
    assert ((ESTIMATORS["mean"](old, parts)[1] - flat.var(1)).abs() > 1e-4).all()


@pytest.mark.parametrize("n", [1, 5, 13])
def test_adabs_leaves_the_published_share_of_the_old(n):
    old = Statistics(torch.full((2,), 3.0).double(), torch.full((2,), 7.0).double())
    parts = [BatchMoments.of(torch.zeros(4, 2, 2, 2)) for _ in range(n)]
    mean, var = ESTIMATORS["adabs"](old, parts)
    torch.testing.assert_close(mean, old.mean * 0.015)
    torch.testing.assert_close(var, old.var * 0.015)


def test_adabs_is_the_rule_step_by_step():
    old = Statistics(torch.randn(3).double(), torch.rand(3).double() + 1)
    parts = [BatchMoments.of(torch.randn(8, 3, 2, 2)) for _ in range(4)]
    bn = nn.BatchNorm2d(3, momentum=1 - 0.015 ** (1 / 4)).double()
    bn.running_mean.copy_(old.mean)
    bn.running_var.copy_(old.var)
    torch.manual_seed(0)
    _ = (
        torch.randn(3).double(),
        torch.rand(3).double(),
    )  # the same draws again, through torch's layer
    for _ in parts:
        bn(torch.randn(8, 3, 2, 2).double())
    mean, var = ESTIMATORS["adabs"](old, parts)
    torch.testing.assert_close(mean, bn.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var, bn.running_var, rtol=1e-6, atol=1e-7)


# What collecting measures, and what it leaves alone


def test_collect_measures_what_train_mode_would(data):
    net = plain_net()
    (batch,) = images(data, 64)
    found = collect(net, [batch])
    reference = copy.deepcopy(net).train()
    reference[3].eval()  # dropout stays off
    for bn in (reference[1], reference[5]):
        bn.momentum = 1.0
    reference(batch)
    for path, bn in (("1", reference[1]), ("5", reference[5])):
        (moments,) = found[path]
        torch.testing.assert_close(moments.mean.float(), bn.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            moments.unbiased_var.float(), bn.running_var, rtol=1e-4, atol=1e-6
        )


class Converter(nn.Module):
    """As in simulators of analog hardware: its range follows the data in train mode only."""

    def __init__(self):
        super().__init__()
        self.register_buffer("range", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.range.copy_(x.abs().max())
        return x.clamp(-self.range, self.range)


def test_nothing_but_statistics_changes(data):
    net = nn.Sequential(Converter(), *plain_net())
    net[1].train()  # a flag that is unlike its parent's must come back as it was
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    done = ek.calibrate_(net, images(data, 128), gate=False)
    after = net.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"2.running_mean", "2.running_var", "6.running_mean", "6.running_var"}
    assert [m.training for m in net.modules()] == modes
    done.undo()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_failing_forward_leaves_the_model_as_it_was(data):
    net = plain_net().train()
    before = statistics(net)
    calls = []

    def forward(model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the hardware went away")
        return model(batch)

    with pytest.raises(RuntimeError, match="went away"):
        ek.calibrate_(net, images(data, 256), forward=forward)
    assert same(before, statistics(net))
    assert all(m.training for m in net.modules())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_normalizer_used_twice_gets_the_moments_of_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.bn(x) + self.bn(10 * x + 5)

    net, x = Twice().eval(), torch.randn(512, 2)
    ek.calibrate_(net, [x], gate=False, shrinkage=None)
    both = torch.cat([x, 10 * x + 5])
    torch.testing.assert_close(net.bn.running_mean, both.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.bn.running_var, both.var(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_kinds_of_normalizers(kind):
    net, x = nn.Sequential(kind(3)).eval(), torch.randn(128, 3) * 4 + 2
    ek.calibrate_(net, [x], gate=False, shrinkage=None)
    torch.testing.assert_close(net[0].running_mean, x.mean(0), rtol=1e-4, atol=1e-5)


def test_half_precision_statistics_are_taken_in_float32():
    net = nn.Sequential(nn.BatchNorm1d(1)).eval()
    x = (torch.randn(4096, 1) * 0.5 + 100).bfloat16()
    (moments,) = collect(net, [x])["0"]
    exact = x.double()
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.var, exact.var(0, correction=0), rtol=1e-4, atol=0)


def test_a_compiled_wrapper_is_calibrated_through(data):
    net = plain_net()
    compiled = torch.compile(net, backend="eager")
    assert ek.calibrate_(compiled, images(data, 256), gate=False).samples == 256


def test_batches_may_be_mappings_and_tuples():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, pixels):
            return self.bn(pixels)

    x = torch.randn(32, 2)
    for batch in ({"pixels": x}, (x, torch.zeros(32)), [x]):
        assert ek.calibrate_(Named().eval(), [batch], gate=False).samples == 32


# Shrinkage


def moved(samples: int, shift: float, stretch: float, channels: int = 64):
    x = torch.randn(samples, channels, 4, 4).double() * stretch + shift
    return [BatchMoments.of(x)]


def test_automatic_shrinkage_ignores_sampling_error_and_believes_real_moves():
    old = Statistics(torch.zeros(64).double(), torch.ones(64).double())

    def error(samples, shift, truth):
        parts = moved(samples, shift, 1.0)
        raw = ESTIMATORS["pooled"](old, parts)
        kept = shrink(old, raw, parts, "auto")
        return [float((s.mean - truth).square().mean().sqrt()) for s in (raw, kept)]

    raw, kept = error(4, 0.0, 0.0)
    assert kept < 0.5 * raw  # nothing moved: what was measured is sampling error
    shifts = torch.randn(64, 1, 1).double()
    raw, kept = error(256, shifts, shifts.flatten())
    assert kept < 1.1 * raw  # moved, and well measured


def test_a_gain_common_to_a_layer_is_found_from_a_handful_of_samples():
    old = Statistics(torch.linspace(-1, 1, 64).double(), torch.linspace(0.5, 2, 64).double())
    x = 0.4 * (
        torch.randn(6, 64, 4, 4).double() * old.var.sqrt()[:, None, None] + old.mean[:, None, None]
    )
    parts = [BatchMoments.of(x)]
    raw = ESTIMATORS["pooled"](old, parts)
    kept = shrink(old, raw, parts, "auto")

    def off(var):
        return float((var / (0.16 * old.var)).log().square().mean().sqrt())

    assert off(kept.var) < 0.5 * off(raw.var)


def test_a_number_is_the_worth_of_the_old_statistics_in_samples():
    old = Statistics(torch.zeros(3).double(), torch.ones(3).double())
    parts = [BatchMoments.of(torch.full((16, 3, 1, 1), 2.0).double())]
    new = Statistics(torch.full((3,), 2.0).double(), torch.full((3,), 4.0).double())
    mean, var = shrink(old, new, parts, 16.0)
    torch.testing.assert_close(mean, torch.full((3,), 1.0).double())  # half-way
    torch.testing.assert_close(
        var, torch.full((3,), 2.0).double()
    )  # half-way on a scale of factors


def test_one_sample_changes_nothing_by_itself():
    old = Statistics(torch.zeros(3).double(), torch.ones(3).double())
    parts = [BatchMoments.of(torch.randn(1, 3, 8, 8))]
    assert shrink(old, ESTIMATORS["pooled"](old, parts), parts, "auto") is old


# The gate


def test_the_gate_keeps_what_helps_and_refuses_what_harms(network, data, accuracy):
    chip = ek.analog.program(network, ek.analog.Gain(0.5), seed=0)
    helped = ek.calibrate_(chip, images(data, 256))
    assert helped.kept
    assert "Kept" in helped.reason
    assert sum(helped.shift_after.values()) < 0.2 * sum(helped.shift_before.values())

    before = statistics(network)
    harmed = ek.calibrate_(network, images(data, 8), shrinkage=None)  # 6 images against thousands
    assert not harmed.kept
    assert same(before, statistics(network))
    assert sum(harmed.shift_after.values()) > sum(harmed.shift_before.values())
    assert accuracy(network) > 98


def test_without_the_gate_the_same_images_do_harm(network, data, accuracy):
    """What the gate is for; it also shows that the refusal above is not idle."""
    before = accuracy(network)
    ek.calibrate_(network, images(data, 8), shrinkage=None, gate=False)
    assert accuracy(network) < before - 0.5


def test_one_sample_cannot_be_judged(network, data):
    done = ek.calibrate_(network, images(data, 1))
    assert not done.kept
    assert "at least 2 samples" in done.reason


def test_the_margin_falls_with_the_number_of_held_out_samples():
    def kept(ratio, held_out):
        return verdict({"bn": 1.0}, {"bn": ratio}, held_out=held_out)[0]

    assert [kept(0.8, 1), kept(0.8, 2)] == [False, True]
    assert [kept(0.98, 8), kept(0.98, 32)] == [False, True]
    assert not kept(1.0, 10_000)


def test_split_holds_back_a_fourth_and_loses_none():
    batches = [torch.arange(10 * k, 10 * k + 10) for k in range(8)]
    fit, held = split(batches)
    assert [len(fit), len(held)] == [6, 2]
    assert sorted(torch.cat([*fit, *held]).tolist()) == list(range(80))
    fit, held = split([(torch.arange(32), torch.arange(32))])
    assert [len(fit[0][0]), len(held[0][1])] == [24, 8]


# Recovery on real data: the figures of the method card


@pytest.mark.parametrize("factor", [0.7, 0.4])
def test_a_gain_error_is_undone(network, data, accuracy, factor):
    digital = accuracy(network)
    chip = ek.analog.program(network, ek.analog.Gain(factor), seed=0)
    raw = accuracy(chip)
    assert raw < digital - 20
    assert ek.calibrate_(chip, data.calibration).kept
    mended = accuracy(chip)
    assert mended >= raw + 0.99 * (digital - raw) or mended >= digital - 0.3


@pytest.mark.parametrize("count", [4, 8, 32])
def test_a_handful_of_images_does_not_harm_a_clean_network(network, data, accuracy, count):
    before = accuracy(network)
    ek.calibrate_(network, images(data, count))
    assert accuracy(network) >= before - 0.35  # two of 600 images


def test_random_noise_is_undone_in_part_and_on_no_chip_made_worse(network, data, accuracy):
    digital, raw, mended = accuracy(network), [], []
    for seed in range(6):
        chip = ek.analog.program(network, ek.analog.Gaussian(0.15), seed=seed)
        raw.append(accuracy(chip))
        ek.calibrate_(chip, data.calibration)
        mended.append(accuracy(chip))
    assert all(after >= before for before, after in zip(raw, mended, strict=True))
    recovered = (sum(mended) - sum(raw)) / (6 * digital - sum(raw))
    assert recovered > 0.5


def test_pooled_statistics_mend_a_bias_that_all_chips_share(network, data, accuracy):
    device = ek.analog.LogNormal(0.5)
    chips = (device.program(network, seed=-k) for k in range(1, 9))
    pooled = pool_statistics_(copy.deepcopy(network), chips, data.calibration)
    seeds = range(6)
    raw = [accuracy(device.program(network, seed=s)) for s in seeds]
    mended = [accuracy(device.program(pooled, seed=s)) for s in seeds]
    assert sum(mended) / 6 > sum(raw) / 6 + 5


# The certificate


def test_the_certificate_tells_and_exports(network, data):
    chip = ek.analog.program(network, ek.analog.Gain(0.6), seed=7)
    done = ek.calibrate_(chip, images(data, 64), key={"chip": 7, "age_s": 3600})
    assert done.to_dict()["key"] == {"chip": 7, "age_s": 3600}
    assert "model.stem.1" in done.table()
    fresh = ek.analog.program(network, ek.analog.Gain(0.6), seed=7)
    fresh.load_state_dict(done.state_dict(), strict=False)
    assert same(statistics(fresh), statistics(chip))


# Errors


BATCH_ONLY = nn.BatchNorm1d(2, track_running_stats=False)


@pytest.mark.parametrize(
    ("model", "batches", "options", "says"),
    [
        (nn.Sequential(nn.GroupNorm(1, 2)), [torch.zeros(2, 2, 8, 8)], {}, "GroupNorm"),
        (nn.Sequential(BATCH_ONLY), [torch.zeros(4, 2)], {}, "none"),
        (nn.Sequential(nn.BatchNorm1d(2)), [], {}, "at least one batch"),
        (nn.Sequential(nn.BatchNorm1d(2)), iter([]), {"gate": False}, "at least one batch"),
        (nn.Sequential(nn.BatchNorm1d(2)), [torch.zeros(0, 2)], {}, "N of 1 or more"),
        (nn.Sequential(nn.BatchNorm1d(2)), [torch.full((8, 2), torch.nan)], {}, "'0' holds NaN"),
        (nn.Sequential(nn.BatchNorm1d(2)), ["text"], {}, "forward=lambda"),
    ],
)  # fmt: skip
def test_calibration_errors(model, batches, options, says):
    before = statistics(model)
    with pytest.raises(CalibrationError, match=says):
        ek.calibrate_(model.eval(), batches, **options)
    assert same(before, statistics(model))


def test_argument_errors(data):
    with pytest.raises(ConfigError, match="Did you mean 'pooled'"):
        ek.calibrate_(plain_net(), images(data, 8), estimator="poled")
    with pytest.raises(ConfigError, match="'auto', a number"):
        ek.calibrate_(plain_net(), images(data, 8), shrinkage="some")


def test_behind_a_relu_a_third_of_a_weight_errors_power_is_an_offset():
    """The share that the mean's update removes exactly, as the method card says: 1 / pi."""
    x, error = torch.randn(20_000, 64).relu(), torch.randn(256, 64)
    moments = BatchMoments.of(x @ error.T)  # what zero-mean weight errors add to 256 outputs
    power = moments.mean.square() + moments.var
    assert float(moments.mean.square().sum() / power.sum()) == pytest.approx(1 / torch.pi, abs=0.02)


def test_what_the_gate_refused_is_not_exported(network, data):
    before = statistics(network)
    refused = ek.calibrate_(network, images(data, 8), shrinkage=None)
    assert not refused.kept
    network.load_state_dict(refused.state_dict(), strict=False)
    assert same(before, statistics(network))


class Heads(nn.Module):
    """A detector in small: images in a list, and a head for what is found in them."""

    def __init__(self, found):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.found = found

    def forward(self, images):
        y = self.body(torch.stack(list(images))).flatten(2).transpose(1, 2).flatten(0, 1)
        return self.head(y[: self.found])


def collated(sizes):
    return [(tuple(torch.randn(n, 3, 8, 8)), ({},) * n) for n in sizes]


@pytest.mark.parametrize(("sizes", "held"), [((8, 8), 4), ((4, 4, 4, 5), 5)])
def test_images_in_a_list_are_samples(sizes, held):
    network = Heads(found=50).eval()
    done = ek.calibrate_(network, collated(sizes))
    assert f"on {held} held-out samples" in done.reason


def test_a_head_that_nothing_reaches_is_left_as_it_is():
    network = Heads(found=0).eval()
    before = network.head[1].running_mean.clone()
    done = ek.calibrate_(network, collated((8, 8)), gate=False)
    assert list(done.methods) == ["body.1"]
    assert torch.equal(network.head[1].running_mean, before)
    matching = ek.calibrate.match_(Heads(found=0).eval(), collated((8, 8)), layers=["body.0"])
    assert matching.matched == ["body.0"]


def test_a_constant_channel_before_a_normalizer_without_eps():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-30),
                            nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()  # fmt: skip
    network[1].eps = 0.0
    with torch.no_grad():
        network[0].weight[1] = 0.0
        network[3].weight *= 0.6
    assert ek.calibrate_(network, [torch.randn(8, 3, 8, 8) for _ in range(4)], gate=False).kept
    assert network(torch.randn(2, 3, 8, 8)).isfinite().all()
