"""Output matching: nothing changes until calibration fits it, and then layers without norm mend."""

import contextlib
import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenkeel as ek
from evenkeel import models
from evenkeel.analog import PCM, Gain, Gaussian, program
from evenkeel.audit.remedy import FitBench, as_row
from evenkeel.calibrate import Matched, OutputMatch, collect, match_
from evenkeel.calibrate.match import matched_paths
from evenkeel.calibrate.remedies import Calibrate, Match
from evenkeel.errors import CalibrationError, ConfigError
from evenkeel.layers import Wrapper, unwrapped


def group_net() -> nn.Module:
    """Group norm, which keeps no statistics, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).eval()


def bare_net() -> nn.Module:
    """No normalizer at all."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, 5),
    ).eval()  # fmt: skip


def mixed_net() -> nn.Module:
    """Batch norm behind the convolution, nothing behind the classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).eval()


def batches(count: int = 4, size: int = 32) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.rand(size, 3, 8, 8, generator=draws) for _ in range(count)]


def hooks(model: nn.Module) -> int:
    """Besides those that wrappers have of their own."""
    modules = [m for m in model.modules() if not isinstance(m, Wrapper)]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def set_present_(model: nn.Module, gain: float = 0.5, shift: float = 0.25) -> None:
    """As if calibration had found other moments on the hardware."""
    for module in model.modules():
        if isinstance(module, OutputMatch):
            module.running_var.mul_(gain**2)
            module.running_mean.mul_(gain).add_(shift)


# ---- on the digital network it does nothing


@pytest.mark.parametrize("make", [group_net, bare_net, mixed_net])
def test_the_digital_network_is_the_same_bit_for_bit(make):
    net, x = make(), batches()[0]
    before = net(x)
    match_(net, batches())
    assert torch.equal(net(x), before)
    assert torch.equal(net(-30 * x), copy.deepcopy(net)(-30 * x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_digital_network_is_the_same_in_every_dtype(dtype):
    for make in (group_net, bare_net):
        net = make().to(dtype)
        x = batches()[0].to(dtype)
        before = net(x)
        match_(net, [b.to(dtype) for b in batches()])
        assert before.dtype == net(x).dtype == dtype
        assert torch.equal(net(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_matched_network_may_be_moved_to_another_dtype(dtype):
    net, plain = bare_net(), bare_net()
    plain.load_state_dict(net.state_dict())
    match_(net, batches())
    x = batches()[0].to(dtype)
    recorded = net[0].match.mean.clone()
    assert torch.equal(net.to(dtype)(x), plain.to(dtype)(x))
    assert net[0].match.mean.dtype == torch.float32  # what was recorded keeps its digits
    assert torch.equal(net[0].match.mean, recorded)


def test_a_layer_with_the_moments_given_gets_those_recorded():
    match = OutputMatch(torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.25]), channel_dim=1)
    match.running_mean.copy_(torch.tensor([10.0, 3.0]))
    match.running_var.copy_(torch.tensor([1.0, 9.0]))
    x = torch.randn(50_000, 2, 2) * torch.tensor([1.0, 3.0])[:, None] + torch.tensor(
        [10.0, 3.0]
    ).view(2, 1)
    flat = match(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), match.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(flat.var(1), match.var, atol=0, rtol=0.03)


def test_the_formula_is_that_of_the_docstring():
    m, v, mu, s2 = (torch.rand(3) + 0.5 for _ in range(4))
    match = OutputMatch(m, v, channel_dim=-1)
    match.running_mean.copy_(mu)
    match.running_var.copy_(s2)
    eps = 1e-5 * v.mean()
    x = torch.randn(4, 7, 3)
    expected = ((v + eps) / (s2 + eps)).sqrt() * (x - mu) + m
    torch.testing.assert_close(match(x), expected)
    assert match.eps == pytest.approx(float(eps))


def test_gradients_are_right():
    match = OutputMatch(torch.randn(3).double(), torch.rand(3).double() + 0.5, channel_dim=1)
    match.running_mean.normal_()
    match.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(match, x)
    assert torch.autograd.gradgradcheck(match, x)


# ---- on hardware it mends


@pytest.mark.parametrize("make", [group_net, bare_net])
def test_a_gain_error_of_a_network_without_batch_norm_is_undone(make):
    net, x = make(), batches()[0]
    before = net(x)
    match_(net, batches())
    chip = program(net, Gain(0.5), seed=0)
    off = (chip(x) - before).abs().max()
    done = ek.calibrate_(chip, batches())
    assert done.kept
    assert set(done.methods.values()) == {"output matching"}
    assert (chip(x) - before).abs().max() < 0.1 * off
    ek.calibrate_(chip, batches(), shrinkage=None, gate=False)  # by the very samples recorded
    assert (chip(x) - before).abs().max() < 0.02 * off


def test_a_network_without_batch_norm_cannot_be_mended_unmatched():
    chip = program(bare_net(), Gain(0.5), seed=0)
    with pytest.raises(CalibrationError, match="match_"):
        ek.calibrate_(chip, batches())


def test_real_digits_without_any_norm(data):
    net = models.build("resnet8_digits", norm="none").eval()
    images = [b[0] for b in data.calibration]
    x = data.test[0][0]
    with torch.no_grad():
        before = net(x)
        match_(net, images)
        chip = program(net, Gain(0.5), seed=0)
        raw = (chip(x) - before).norm()
        assert ek.calibrate_(chip, images).kept
        assert (chip(x) - before).norm() < 0.05 * raw


def test_the_certificate_tells_the_methods_apart():
    net = mixed_net()
    match_(net, batches())
    chip = program(net, Gain(0.5), seed=0)
    done = ek.calibrate_(chip, batches())
    assert done.methods == {"model.1": "statistics", "model.4.match": "output matching"}
    assert done.to_dict()["methods"] == done.methods
    rows = done.table().splitlines()
    assert rows[0].split() == ["normalizer", "before", "after", "method"]
    assert rows[1].endswith("statistics")
    assert rows[2].endswith("output matching")
    assert done.shift_after["model.4.match"] < done.shift_before["model.4.match"]
    done.undo()
    match = chip.model[4].match
    assert torch.equal(match.running_mean, match.mean)
    assert torch.equal(match.running_var, match.var)


def test_calibration_changes_the_present_moments_and_never_those_recorded():
    net = group_net()
    match_(net, batches())
    chip = program(net, Gaussian(0.2), seed=0)
    before = {k: v.clone() for k, v in chip.state_dict().items()}
    ek.calibrate_(chip, batches(), gate=False)
    changed = {k for k, v in chip.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {
        f"model.{path}.match.running_{kind}" for path in ("0", "4") for kind in ("mean", "var")
    }


def test_calibrate_fits_only_the_normalizers_named():
    net = mixed_net()
    match_(net, batches())
    chip = program(net, Gain(0.5), seed=0)
    before = {k: v.clone() for k, v in chip.state_dict().items()}
    done = ek.calibrate_(chip, batches(), layers=["*.match"], gate=False)
    assert list(done.methods) == ["model.4.match"]
    changed = {k for k, v in chip.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"model.4.match.running_mean", "model.4.match.running_var"}
    assert list(collect(chip, batches(), layers=["model.1"])) == ["model.1"]
    with pytest.raises(ConfigError, match=r"Did you mean 'model\.4\.match'"):
        ek.calibrate_(chip, batches(), layers=["model.4.mtch"])
    with pytest.raises(ConfigError, match="list of paths"):
        ek.calibrate_(chip, batches(), layers="*.match")


# ---- the same chip


@pytest.mark.parametrize("device", [Gaussian(0.1), PCM()], ids=lambda d: d.name)
def test_a_matched_network_is_on_the_same_chip(device):
    net, x = mixed_net(), batches()[0]
    plain = program(net, device, seed=7).age_(86_400)
    match_(net, batches())
    matched = program(net, device, seed=7).age_(86_400)
    (one, two), (other, another) = (dict(c.arrays()).values() for c in (plain, matched))
    for a, b in ((one, other), (two, another)):
        assert a.path == b.path
        assert torch.equal(a.programmed, b.programmed)
        assert torch.equal(a.read_key, b.read_key)
    for chip in (plain, matched):
        chip.rewind_("use")
    assert torch.equal(plain(x), matched(x))  # read noise too
    other_chip = program(net, device, seed=8).age_(86_400)
    assert not torch.equal(other_chip(x), matched(x))


def test_a_path_through_wrappers_is_the_plain_one():
    net = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ModuleDict({"layer": Plain()})
    )
    paths = [path for path, _ in net.named_modules()]
    assert [unwrapped(net, path) for path in paths] == paths  # nothing is wrapped
    net[0][0] = Wrapper(Wrapper(net[0][0]))
    net[0] = Wrapper(net[0])
    net[1]["layer"] = Wrapper(net[1]["layer"])
    assert unwrapped(net, "0.layer.0.layer.layer") == "0.0"
    assert unwrapped(net, "0.layer.1") == "0.1"
    assert unwrapped(net, "1.layer.layer.layer") == "1.layer.layer"  # the last is Plain's own
    assert unwrapped(net, "") == ""
    assert unwrapped(Wrapper(net), "layer.1") == "1"


class Plain(nn.Module):
    """Has an attribute called ``layer`` and is no wrapper."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


# ---- which layers


def test_layers_before_batch_norm_are_left_alone_and_said_so():
    done = match_(mixed_net(), batches())
    assert done.matched == ["4"]
    assert done.skipped == {"0": "'1' follows"}
    assert done.samples == 128
    assert done.to_dict() == {"matched": ["4"], "skipped": {"0": "'1' follows"}, "samples": 128}
    assert done.table().splitlines() == ["4  matched", "0  '1' follows"]


def test_only_what_enters_the_normalizer_itself_counts_as_followed():
    net = nn.Sequential(
        nn.Linear(4, 4), nn.Sigmoid(), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.LayerNorm(3)
    ).eval()
    assert match_(net, [torch.randn(16, 4)]).matched == ["0", "3"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)
        self.unused, self.aside = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.shared(self.shared(self.first(x)).relu())
        return F.linear(x, self.aside.weight)


def test_layers_used_twice_or_never_are_left_alone_and_said_so():
    net, x = Twice().eval(), torch.randn(8, 4)
    before = net(x)
    done = match_(net, [x, x])
    assert done.matched == ["first"]
    assert set(done.skipped) == {"shared", "unused", "aside"}
    assert "called 2 times" in done.skipped["shared"]
    assert done.skipped["unused"] == done.skipped["aside"] == "it was not called"
    assert torch.equal(net(x), before)
    with pytest.raises(CalibrationError, match=r"'shared' cannot be matched: .* 2 times"):
        match_(Twice(), [x], layers=["shared"])
    with pytest.raises(CalibrationError, match="'unused' cannot be matched: it was not called"):
        match_(Twice(), [x], layers=["first", "unused"])


def test_a_layer_that_is_the_whole_network_has_no_place():
    with pytest.raises(CalibrationError, match="whole network"):
        match_(nn.Linear(4, 3), [torch.randn(8, 4)])


def test_layers_may_be_named():
    net = mixed_net()
    done = match_(net, batches(), layers=["0"])  # though batch norm follows it
    assert done.matched == ["0"]
    assert done.skipped == {"4": "left out by `layers`"}
    net = bare_net()
    assert match_(net, batches(), layers=["[02]"]).matched == ["0", "2"]
    assert matched_paths(net) == {"0": 8, "2": 6}


def test_unknown_names_offer_the_nearest():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(4, 3)

        def forward(self, x):
            return self.classifier(x)

    with pytest.raises(ConfigError, match="Did you mean 'classifier'"):
        match_(Named(), [torch.randn(8, 4)], layers=["clasifier"])
    with pytest.raises(ConfigError, match="list of paths"):
        match_(Named(), [torch.randn(8, 4)], layers="classifier")


def test_a_second_time_finds_nothing_more():
    net = group_net()
    match_(net, batches())
    state = [p for p, _ in net.named_modules()]
    with pytest.raises(CalibrationError, match=r"'0\.match' follows"):
        match_(net, batches())
    assert [p for p, _ in net.named_modules()] == state


def test_on_a_chip_it_is_too_late():
    chip = program(bare_net(), Gain(0.5), seed=0)
    with pytest.raises(CalibrationError, match="match first, then program"):
        match_(chip, batches())


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_dimensions(dims):
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    net, x = nn.Sequential(kind(2, 4, 3), nn.ReLU()).eval(), torch.randn(16, 2, *(5,) * dims)
    before = net(x)
    assert match_(net, [x]).matched == ["0"]
    assert torch.equal(net(x), before)
    ek.calibrate_(chip := program(net, Gain(0.5), seed=0), [x], gate=False, shrinkage=None)
    torch.testing.assert_close(chip(x), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(40, 6), (40, 7, 6), (10, 3, 7, 6)], ids=len)
def test_the_channels_of_a_linear_layer_are_its_last_axis(shape):
    net, x = nn.Sequential(nn.Linear(6, 4)).eval(), 1 + torch.randn(shape)
    before = net(x)
    assert match_(net, [x]).samples == shape[0]
    match = net[0].match
    flat = before.reshape(-1, 4)
    torch.testing.assert_close(match.mean, flat.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(match.var, flat.var(0), rtol=1e-5, atol=1e-5)
    chip = program(net, Gain(0.5), seed=0)
    ek.calibrate_(chip, [x], gate=False, shrinkage=None)
    torch.testing.assert_close(chip(x), before, rtol=1e-3, atol=1e-3)
    if len(shape) > 2:
        assert net(x[:, :1]).shape == (shape[0], 1, *shape[2:-1], 4)  # another length


# ---- it may be taken out, copied, saved, compiled


def test_undo_takes_everything_out():
    net, x = mixed_net(), batches()[0]
    layer, before = net[4], net(x)
    names = [path for path, _ in net.named_modules()]
    done = match_(net, batches())
    set_present_(net)
    assert not torch.equal(net(x), before)
    done.undo()
    assert net[4] is layer
    assert [path for path, _ in net.named_modules()] == names
    assert torch.equal(net(x), before)


def test_a_deep_copy_has_moments_of_its_own():
    net, x = group_net(), batches()[0]
    match_(net, batches())
    twin = copy.deepcopy(net)
    before = net(x)
    set_present_(twin)
    assert torch.equal(net(x), before)
    assert not torch.equal(twin(x), before)


def test_a_state_dict_round_trip():
    net, other, x = group_net(), group_net(), batches()[0]
    for each, seen in ((net, batches()), (other, [3 * b for b in batches()])):
        match_(each, seen)
    set_present_(net)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    assert {k.split(".")[-1] for k in net.state_dict() if "match" in k} == {
        "mean", "var", "running_mean", "running_var",
    }  # fmt: skip


def test_a_matched_network_and_its_chip_come_back_from_a_file(tmp_path):
    net = group_net()
    match_(net, batches())
    chip = program(net, PCM(), seed=3)
    ek.calibrate_(chip, batches(), gate=False)
    x = batches()[0]
    for item in (net, chip):
        ek.save(item, tmp_path / "a.safetensors")
        back = ek.load(tmp_path / "a.safetensors", model=group_net())
        if item is chip:
            chip.rewind_("use")
            back.rewind_("use")
        assert torch.equal(back(x), item(x))


def test_a_dead_channel_stays_finite_and_still():
    net = nn.Sequential(nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[0].weight[1] = 0
    x = torch.randn(200, 6)
    before = net(x)
    match_(net, [x])
    assert net[0].match.var[1] == 0
    assert torch.equal(net(x), before)
    chip = program(net, Gain(0.5), seed=0)
    ek.calibrate_(chip, [x], gate=False)
    mended = chip(x)
    assert torch.isfinite(mended).all()
    torch.testing.assert_close(mended[:, 1], before[:, 1])
    chip = program(net, Gaussian(0.05), seed=0)  # the dead one comes to life: still, not magnified
    ek.calibrate_(chip, [x], gate=False)
    mended = chip(x)
    assert mended[:, 1].std() < 0.05 * before[:, 0].std()
    torch.testing.assert_close(mended[:, 1].mean(), before[:, 1].mean(), atol=0.01, rtol=0)


def test_a_channel_that_dies_on_the_chip_stays_finite():
    match = OutputMatch(torch.ones(2), torch.ones(2), channel_dim=1)
    match.running_var[0] = 0
    match.running_mean[0] = 3
    y = match(torch.full((5, 2), 3.0))
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[:, 0], torch.ones(5))  # constant at its digital mean


def test_outputs_keep_the_dtype_of_the_input():
    match = OutputMatch(torch.zeros(3), torch.ones(3), channel_dim=1)
    match.running_var.mul_(4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert match(torch.ones(2, 3, 4, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        net = nn.Sequential(nn.Linear(3, 3))
        assert Matched(net[0], match)(torch.ones(2, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [group_net, mixed_net])
def test_export_and_full_graph_compilation(make):
    net, x = make(), batches()[0]
    match_(net, batches())
    set_present_(net)
    expected = net(x)
    samples = torch.export.Dim("samples", min=2)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: samples},)).module()
    torch.testing.assert_close(exported(x), expected)
    torch.testing.assert_close(exported(x[:7]), net(x[:7]))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x[:7]), net(x[:7]))


def test_a_network_already_compiled_is_matched_inside_its_wrapper():
    net, x = group_net(), batches()[0]
    compiled = torch.compile(net, backend="eager")
    before = compiled(x)
    done = match_(compiled, batches())
    assert done.matched == ["0", "4"]
    assert torch.equal(compiled(x), before)
    set_present_(net)
    assert not torch.equal(compiled(x), before)
    assert torch.equal(compiled(x), net(x))


# ---- what is left behind


def test_no_hook_is_left_and_modes_are_as_they_were():
    net = mixed_net().train()
    net[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net]
    match_(net, batches())
    assert hooks(net) == 0
    assert [m.training for m in net][:4] == modes[:4]
    assert net[4].layer.training
    after = net.state_dict()
    assert torch.equal(after["1.running_mean"], before["1.running_mean"])  # eval meanwhile
    assert torch.equal(after["1.num_batches_tracked"], before["1.num_batches_tracked"])


def test_outputs_of_one_forward_at_a_time_are_held():
    net, held = bare_net(), []

    def forward(model, batch):
        assert not any(ref() is not None for ref in held)
        held.append(weakref.ref(model(batch)))

    match_(net, batches(), forward=forward)
    assert len(held) == 4


def test_a_failing_forward_leaves_the_model_as_it_was():
    net = mixed_net().train()
    names, modes = zip(*((p, m.training) for p, m in net.named_modules()), strict=True)

    def forward(model, batch):
        model(batch)
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        match_(net, batches(), forward=forward)
    assert hooks(net) == 0
    assert tuple(p for p, _ in net.named_modules()) == names
    assert tuple(m.training for m in net.modules()) == modes


def test_activations_that_are_not_finite_leave_the_model_as_it_was():
    net = group_net()
    bad = batches()
    bad[-1][3, 1, 2, 2] = torch.nan
    with pytest.raises(CalibrationError, match="'0' holds NaN"):
        match_(net, bad)
    assert hooks(net) == 0
    assert not matched_paths(net)


@pytest.mark.parametrize("given", [[], iter([]), [torch.zeros(0, 3, 8, 8)]])
def test_no_samples_are_an_error(given):
    net = group_net()
    with pytest.raises(CalibrationError):
        match_(net, given)
    assert not matched_paths(net)
    assert hooks(net) == 0


def test_batches_may_come_from_a_generator_once():
    net = group_net()
    stream = (b for b in batches())
    assert match_(net, stream).samples == 128
    with pytest.raises(CalibrationError, match="not called"):
        match_(group_net(), stream)


def test_batches_may_be_tuples_and_any_forward_may_be_given():
    labelled = [(b, torch.zeros(len(b))) for b in batches()]
    assert match_(group_net(), labelled).samples == 128
    odd = [{"image": b} for b in batches()]
    done = match_(group_net(), odd, forward=lambda model, batch: model(batch["image"]))
    assert done.samples == 128


# ---- reads


class Offset(nn.Module):
    """Adds to every channel an offset that is new at each forward, as at each read of an array."""

    def __init__(self, channels: int, size: float):
        super().__init__()
        self.channels, self.size = channels, size
        self.draws = torch.Generator().manual_seed(3)
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        offset = self.size * torch.randn(self.channels, generator=self.draws)
        return x + offset.view(-1, *[1] * (x.dim() - 2))


def noisy_net(channels: int = 64) -> nn.Sequential:
    return nn.Sequential(Offset(channels, 3.0), nn.BatchNorm1d(channels)).eval()


def test_many_reads_see_what_differs_from_read_to_read():
    x = torch.randn(400, 64)
    once = collect(noisy_net(), [x])["1"]
    eight = collect(noisy_net(), [x], reads=8)["1"]
    many = collect(noisy_net(), [x], reads=100)["1"]
    for (moments,), count in ((once, 400), (eight, 3200), (many, 40_000)):
        assert (moments.samples, moments.count) == (400, count)
    own = x.var(0).double()
    torch.testing.assert_close(once[0].unbiased_var, own, rtol=1e-5, atol=0)
    between = (eight[0].var - own).mean()
    assert float(between) == pytest.approx(9 * 7 / 8, rel=0.1)  # of 8 reads, about their own mean
    assert float((many[0].var - own).mean()) == pytest.approx(9 * 99 / 100, rel=0.05)
    # and the mean comes closer to that of all reads
    assert many[0].mean.square().mean() < 0.05 * once[0].mean.square().mean()
    # between samples nothing differs more than before
    torch.testing.assert_close(eight[0].mean_spread, once[0].mean_spread, rtol=0.05, atol=0)


def test_calibration_with_reads_fits_the_noise_that_will_be_met():
    x = torch.randn(400, 64)
    net = noisy_net()
    done = ek.calibrate_(net, [x], reads=8, gate=False, shrinkage=None)
    assert done.samples == 400
    assert net[0].forwards == 24  # the fit, and each judgement
    assert float(net[1].running_var.mean()) == pytest.approx(1 + 9 * 7 / 8, rel=0.1)
    net = noisy_net()
    ek.calibrate_(net, [x], gate=False, shrinkage=None)
    assert float(net[1].running_var.mean()) == pytest.approx(1, rel=0.02)


def test_one_read_is_what_it_was_without_the_option():
    x = batches()
    plain, once = mixed_net(), mixed_net()
    once.load_state_dict(plain.state_dict())
    ek.calibrate_(plain, x, gate=False)
    ek.calibrate_(once, x, gate=False, reads=1)
    assert torch.equal(plain[1].running_mean, once[1].running_mean)
    assert torch.equal(plain[1].running_var, once[1].running_var)


def test_reads_of_a_layer_used_twice_are_kept_apart():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.bn(x) + self.bn(x + 100)

    net, x = Both().eval(), torch.randn(50, 2)
    for reads in (1, 3):
        first, second = collect(net, [x], reads=reads)["bn"]
        torch.testing.assert_close(first.mean, x.double().mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second.mean, x.double().mean(0) + 100, rtol=1e-4, atol=1e-4)
        assert first.count == 50 * reads


@pytest.mark.parametrize("reads", [0, -1, 1.5])
def test_wrong_numbers_of_reads(reads):
    with pytest.raises(ConfigError, match="reads"):
        ek.calibrate_(mixed_net(), batches(), reads=reads)
    with pytest.raises(ConfigError, match="reads"):
        Calibrate(reads=reads)


# ---- in an audit


def test_rows_of_an_audit_from_end_to_end(network, data):
    few = data.limited(test=200, calibration=256)
    result = ek.audit(
        network, few, devices=["gaussian:0.15"], chips=2, workers=0, store=":memory:",
        remedies=["none", "calibrate", "match+calibrate", "match+clip+calibrate",
                  "match+calibrate:layers=*.match:reads=2"],
    )  # fmt: skip
    _, plain, matched, clipped, alone = result.cells
    assert matched.gain > 0
    assert clipped.gain > 0
    # by hand, the same chips
    own = copy.deepcopy(network)
    match_(own, [b[0] for b in few.calibration])
    for seed, value in matched.chips.items():
        chip = program(own, Gaussian(0.15), seed=seed)
        done = ek.calibrate_(chip, few.calibration)
        assert "output matching" in done.methods.values()
        right = [(chip(x).argmax(1) == y).float() for x, y in few.test]
        assert value == pytest.approx(100 * float(torch.cat(right).mean()))
    assert {m for s in result.shifts for m in s["before"]} >= {"classifier.match"}
    assert alone.chips != plain.chips
    assert not matched_paths(network)  # the user's own stays as it is


def test_calibration_alone_is_refused_where_matching_makes_it_possible(data):
    net = models.build("resnet8_digits", norm="group").eval()
    reason = as_row("calibrate").why_not(net)
    assert "GroupNorm" in reason
    assert "match_" in reason
    assert as_row("match+calibrate").why_not(net) is None
    assert as_row("match+calibrate:samples=32").why_not(net) is None  # settings do not matter
    assert as_row("match+clip+calibrate").why_not(net) is None
    assert as_row("calibrate+match").why_not(net) == reason  # too late
    assert as_row("match+pooled").why_not(net) is not None  # it enables calibration only
    few = data.limited(test=64, calibration=64)
    options = {"devices": ["gain:0.5"], "chips": 1, "workers": 0, "store": ":memory:"}
    with pytest.raises(ConfigError, match=r"'calibrate' cannot be used .* GroupNorm"):
        ek.audit(net, few, remedies=["none", "calibrate"], **options)
    result = ek.audit(net, few, remedies=["none", "match+calibrate"], **options)
    assert [c.remedy for c in result.cells] == ["none", "match+calibrate"]
    assert any("match" in step for step in result.recipe) == ("match" in result.best_remedy)


def test_names_and_settings_of_the_remedies():
    assert Match().name == "match"
    assert Match("fc").name == "match:fc"
    assert Match("fc").to_dict() == {"type": "Match", "version": 1, "layers": "fc"}
    assert as_row("match:fc+calibrate:reads=8:layers=*.match").name == (
        "match:fc+calibrate:reads=8:layers=*.match"
    )
    assert Calibrate(reads=8.0, samples=16.0).name == "calibrate:samples=16:reads=8"
    assert Calibrate(layers="*.match").to_dict()["layers"] == "*.match"


def test_the_remedy_passes_its_settings_on():
    net = mixed_net()
    match_(net, batches())
    forwards = []

    def forward(model, batch):
        forwards.append(len(batch))
        return model(batch)

    bench = FitBench(batches(), forward, None, [0.0])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    chip = program(net, Gain(0.5), seed=0)
    remedy = Calibrate(layers="*.match", reads=3, samples=64, gate=False)
    facts = remedy.mend_(chip, bench)["calibration"]
    assert facts["methods"] == {"model.4.match": "output matching"}
    assert facts["samples"] == 64
    assert forwards == [32] * 12  # two batches for the fit and one to judge each way, thrice
    assert torch.equal(chip.model[1].running_mean, before["1.running_mean"])


def test_a_layer_named_to_the_remedy_is_the_one_matched(network, data):
    row = as_row("match:stem.0+calibrate")
    bench = FitBench([(b[0],) for b in data.calibration], lambda m, b: m(b[0]), None, [0.0])
    prepared = row.prepared(network, bench)
    assert list(matched_paths(prepared)) == ["stem.0"]
    with pytest.raises(ConfigError, match=r"Did you mean 'stem\.0'"):
        as_row("match:stem.1").prepared(network, bench)


# ---- what a reviewer broke


@pytest.mark.parametrize("count", [1, 5])
def test_a_layer_that_was_constant_when_recorded_is_not_made_constant(count):
    # One sample, or a batch of equal ones, has no variance in any channel.
    net = nn.Sequential(nn.Linear(4, 3)).eval()
    x = torch.randn(8, 4)
    before = net(x)
    with contextlib.suppress(CalibrationError):
        match_(net, [x[:1].expand(count, 4)])
    assert torch.equal(net(x), before)


def test_undo_takes_out_only_what_this_call_put_in():
    net = bare_net()
    match_(net, batches(), layers=["0"])
    second = match_(net, batches(), layers=["2"])
    second.undo()
    assert list(matched_paths(net)) == ["0"]


def test_a_layer_with_two_names_is_matched_where_it_is_called_or_not_at_all():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 3)
            self.second = self.first

        def forward(self, x):
            return self.second(x)

    net, x = Alias().eval(), torch.randn(64, 4)
    before = net(x)
    try:
        match_(net, [x])
    except CalibrationError:
        return
    chip = program(net, Gain(0.5), seed=0)
    ek.calibrate_(chip, [x], gate=False, shrinkage=None)
    torch.testing.assert_close(chip(x), before, rtol=1e-3, atol=1e-3)


def test_a_transformer_layer_that_asks_its_layers_for_their_weights():
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(4, 5, 8)
    with torch.no_grad():
        before = net(x)
        assert match_(net, [x]).matched == ["linear1", "linear2"]
        torch.testing.assert_close(net(x), before)


def test_a_transformer_layers_fast_path_does_not_go_around_what_is_behind_its_layers():
    # Where nothing needs a gradient, it reads the weights of its layers and calls none of them.
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(16, 5, 8)
    with torch.no_grad():
        match_(net, [x])
        set_present_(net)
        matched = net(x)
    slow = net(x.clone().requires_grad_())
    torch.testing.assert_close(matched, slow)


def test_undo_twice_is_undo():
    net = group_net()
    done = match_(net, batches())
    done.undo()
    done.undo()
    assert not matched_paths(net)


def test_a_matched_layer_goes_by_its_own_path_when_programmed():
    net = mixed_net()
    match_(net, batches())
    chip = program(net, Gain(0.5), seed=0, layers=["4"])
    assert [array.path for _, array in chip.arrays()] == ["4"]


@pytest.mark.parametrize("reads", [float("nan"), float("inf"), "3", None])
def test_reads_that_are_no_number_at_all(reads):
    with pytest.raises(ConfigError, match="reads"):
        ek.calibrate_(mixed_net(), batches(), reads=reads)


@pytest.mark.parametrize("reads", [0, 1.5])
def test_collect_itself_refuses_wrong_numbers_of_reads(reads):
    with pytest.raises(ConfigError, match="reads"):
        collect(mixed_net(), batches(), reads=reads)
