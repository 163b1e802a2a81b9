"""Chips: the same one whatever happens around it, for life, on disk, compiled, in any precision."""

import copy
import hashlib
import io
import os
import pickle
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from evenkeel.analog import (
    PCM,
    AnalogLayer,
    Chip,
    Device,
    DeviceModel,
    Gain,
    Gaussian,
    StuckAt,
    clip_weights_,
    compensate_drift_,
    program,
)
from evenkeel.errors import ConfigError
from evenkeel.layers import register_weight_layer, weights

HOUR, DAY = 3600.0, 86_400.0
MANY = 301  # outputs of a layer so large that threads share its elements
FAULTY_PCM = Device(PCM(), StuckAt(0.02, 0.01))
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Net(nn.Module):
    """A plain, a depthwise and a linear layer; defined in any order, always the same weights."""

    LAYERS = ("stem", "depthwise", "head")

    def __init__(self, order: tuple[str, ...] = LAYERS, outputs: int = 10):
        super().__init__()
        made = {
            "stem": nn.Conv2d(3, 8, 3, padding=1),
            "depthwise": nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False),
            "head": nn.Linear(8 * 16, outputs),
        }
        for name in order:
            self.add_module(name, made[name])
        self.norm = nn.BatchNorm2d(8)
        with torch.no_grad():
            for name in self.LAYERS:
                for i, p in enumerate(made[name].parameters()):
                    p.copy_(torch.linspace(-1, 1.1, p.numel()).mul(12.9 + i).sin().view_as(p) / 4)
            self.norm.running_mean.fill_(0.1)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head(F.adaptive_avg_pool2d(self.depthwise(x), 4).flatten(1))


@dataclass(frozen=True)
class CommonDrift(DeviceModel):
    """Fades all devices of an output alike; ``spread``: outputs differ in their exponents."""

    spread: float = 0.0
    ages = True

    def drift(self, g, state, age_s):
        nu = 0.1 + self.spread * torch.linspace(0, 1, g.shape[1]).view(-1, 1)
        return g * (1 + age_s / 20) ** -nu


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(4, 3, 8, 8)


@pytest.fixture(params=[1, 2])
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    a_state, b_state = a.state_dict(), b.state_dict()
    assert sorted(a_state) == sorted(b_state)
    differ = [
        k for k, v in a_state.items() if v.dtype != b_state[k].dtype or (v != b_state[k]).any()
    ]
    assert not differ


def fingerprint() -> str:
    """A hash of an aged chip and of one read of its arrays."""
    chip = program(Net(outputs=MANY), FAULTY_PCM, seed=11).age_(HOUR)
    tensors = [*chip.state_dict().values(), *(array.read() for _, array in chip.arrays())]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def global_states() -> tuple:
    numpy_state = np.random.get_state()  # noqa: NPY002 - the legacy generator is what is watched
    return torch.get_rng_state().tolist(), str(numpy_state), random.getstate()


# ---- the same seed is the same chip


@pytest.mark.usefixtures("_threads")
def test_same_seed_same_chip_on_any_number_of_threads():
    net = Net(outputs=MANY)
    chip = program(net, FAULTY_PCM, seed=3).age_(DAY)
    torch.randn(100)
    program(net, FAULTY_PCM, seed=4)
    torch.set_num_threads(1)
    other = program(net, FAULTY_PCM, seed=3).age_(DAY)
    assert_same_state(other, chip)
    for (_, array), (_, same) in zip(chip.arrays(), other.arrays(), strict=True):
        assert torch.equal(array.read(), same.read())


def test_same_chip_in_another_process():
    # Other hash seed, other number of threads: nothing but the key may count.
    done = subprocess.run(
        [sys.executable, "-c", "import test_chip; print(test_chip.fingerprint())"],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == fingerprint()


@pytest.mark.parametrize("seed", [4, -3, 3 + 2**32, 3 + 2**64])
def test_another_seed_is_another_chip(net, seed):
    chip, other = (program(net, FAULTY_PCM, seed=s).state_dict() for s in (3, seed))
    drawn = ("programmed", "state_0_nu", "state_1_stuck", "read_key")
    for name, value in chip.items():
        assert torch.equal(value, other[name]) != name.endswith(drawn), name


def test_equal_layers_at_two_places_have_devices_of_their_own():
    layer = nn.Linear(50, 50)
    chip = program(nn.Sequential(layer, copy.deepcopy(layer)), Gaussian(0.1), seed=0)
    noise = torch.stack([(a.read() - layer.weight).detach().flatten() for _, a in chip.arrays()])
    assert abs(torch.corrcoef(noise)[0, 1]) < 0.08  # four deviations
    keys = [array.read_key for _, array in chip.arrays()]
    assert not torch.equal(*keys)


@pytest.mark.parametrize(
    "layers", [["head"], ["head", "stem"], ["*e*"], lambda path, module: "h" in path], ids=str
)
def test_a_layer_draws_the_same_whichever_others_are_programmed(net, layers):
    whole, part = (
        dict(program(net, FAULTY_PCM, seed=3, layers=c).arrays()) for c in (None, layers)
    )
    for path, array in part.items():
        assert_same_state(array, whole[path])
    assert "head" in part


def test_a_layer_draws_the_same_in_whatever_order_layers_were_defined(net):
    turned = Net(("head", "depthwise", "stem"))
    assert [n for n, _ in turned.named_children()] != [n for n, _ in net.named_children()]
    assert_same_state(program(net, FAULTY_PCM, seed=3), program(turned, FAULTY_PCM, seed=3))


@pytest.mark.parametrize("seed", [0, -1, 2**70, np.int64(3)], ids=repr)
def test_any_integer_is_a_seed(net, seed):
    chip = program(net, PCM(), seed=seed)
    assert_same_state(chip, program(net, PCM(), seed=int(seed)))
    assert type(chip.seed) is int  # which can be saved


# ---- age


@pytest.mark.parametrize("device", [PCM(), FAULTY_PCM, PCM(reading=0)], ids=lambda d: d.name)
def test_each_device_has_one_trajectory(net, x, device):
    chip = program(net, device, seed=3)
    start = chip(x)
    straight = program(net, device, seed=3).age_(DAY)
    expected = straight(x)
    assert not torch.equal(expected, start)
    chip.age_(HOUR).age_(DAY).rewind_()
    assert chip.age_s == DAY
    assert torch.equal(chip(x), expected)
    assert_same_state(chip, straight)
    chip.age_(0).rewind_()
    assert chip.age_s == 0
    assert torch.equal(chip(x), start)


@pytest.mark.parametrize("age_s", [-1.0, float("nan"), float("inf")])
def test_an_age_that_cannot_be_is_refused_and_changes_nothing(net, age_s):
    chip = program(net, PCM(), seed=3).age_(HOUR)
    before = copy.deepcopy(chip)
    with pytest.raises(ConfigError, match="finite and 0 s or more"):
        chip.age_(age_s)
    assert_same_state(chip, before)


@pytest.mark.parametrize("device", [PCM(), CommonDrift()], ids=lambda d: d.name)
def test_a_chip_aged_in_inference_mode_serves_outside_of_it(net, x, device):
    chip = program(net, device, seed=3)
    with torch.inference_mode():
        expected = chip.age_(DAY)(x)
    chip.rewind_()
    inputs = x.clone().requires_grad_()
    got = chip(inputs)
    got.sum().backward()
    torch.testing.assert_close(got, expected.clone())
    assert inputs.grad.abs().sum() > 0


# ---- what programming leaves alone


@pytest.mark.parametrize("training", [True, False])
def test_the_users_network_and_the_global_generators_are_left_alone(x, training):
    net = Net().train(training)
    net.head.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tensors = {k: v.data_ptr() for k, v in net.state_dict().items()}
    modes = [(m, m.training) for m in net.modules()]
    generators = global_states()
    chip = program(net, FAULTY_PCM, seed=3).age_(HOUR)
    compensate_drift_(chip)
    chip(x)
    chip.model.norm.running_mean.add_(1)
    assert global_states() == generators
    assert {k: v.data_ptr() for k, v in net.state_dict().items()} == tensors
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [(m, m.training) for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == [True] * 3 + [False] * 2 + [True] * 2


def test_the_whole_chip_is_in_eval_mode(net):
    # Who saves `chip.training` and puts it back with train() must not start batch norm's updates.
    chip = program(net.train(), PCM(), seed=3)
    assert [name for name, module in chip.named_modules() if module.training] == []


def test_no_digital_weight_is_left_behind(net):
    chip = program(net, PCM(), seed=3)
    assert sorted(name for name, _ in chip.named_parameters()) == [
        "model.head.layer.bias",
        "model.norm.bias",
        "model.norm.weight",
        "model.stem.layer.bias",
    ]


# ---- read noise


def test_each_forward_is_a_read_of_its_own_and_rewinding_brings_it_back(net, x):
    chip = program(net, PCM(), seed=3)
    reads = [chip(x) for _ in range(3)]
    assert not torch.equal(reads[0], reads[1])
    assert not torch.equal(reads[1], reads[2])
    chip.rewind_()
    assert all(torch.equal(chip(x), read) for read in reads)
    chip.rewind_("test")
    other = chip(x)
    assert not any(torch.equal(other, read) for read in reads)
    chip(x)
    chip.rewind_("test")
    assert torch.equal(chip(x), other)


def test_reads_without_noise_are_exact(net, x):
    chip = program(net, Gaussian(0.1), seed=3)
    assert torch.equal(chip(x), chip(x))


def test_gradients_reach_the_inputs(net, x):
    chip = program(net, PCM(0, 0, 0), seed=3)
    grads = []
    for model in (net, chip):
        inputs = x.clone().requires_grad_()
        model(inputs).square().sum().backward()
        grads.append(inputs.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


# ---- chips on disk and in memory


def used(chip: Chip, x: torch.Tensor) -> Chip:
    """Aged, mended and read: nothing at its initial value."""
    compensate_drift_(chip.age_(HOUR), per="column").rewind_("use")
    chip(x)
    chip.model.norm.running_var.mul_(1.5)
    return chip


def by_torch(chip: Chip, blank: Chip, path: Path) -> Chip:
    torch.save(chip.state_dict(), path)
    blank.load_state_dict(torch.load(path, weights_only=True))
    return blank


def by_assignment(chip: Chip, blank: Chip, path: Path) -> Chip:
    torch.save(chip.state_dict(), path)
    blank.load_state_dict(torch.load(path, weights_only=True), assign=True)
    return blank


def by_pickle(chip: Chip, blank: Chip, path: Path) -> Chip:
    return pickle.loads(pickle.dumps(chip))


def by_torch_whole(chip: Chip, blank: Chip, path: Path) -> Chip:
    file = io.BytesIO()
    torch.save(chip, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_deepcopy(chip: Chip, blank: Chip, path: Path) -> Chip:
    return copy.deepcopy(chip)


@pytest.mark.parametrize("device", [FAULTY_PCM, PCM(reading=0)], ids=lambda d: d.name)
@pytest.mark.parametrize("way", [by_torch, by_assignment, by_pickle, by_torch_whole, by_deepcopy])
def test_a_chip_comes_back_bit_for_bit(net, x, device, way, tmp_path):
    chip = used(program(net, device, seed=3), x)
    blank = program(Net(), device, seed=3)
    nn.init.zeros_(blank.model.norm.weight)
    back = way(chip, blank, tmp_path / "chip.pt")
    assert_same_state(back, chip)
    assert back.age_s == HOUR
    for _ in range(2):  # the read noise goes on where it was
        assert torch.equal(back(x), chip(x))
    for both in (chip, back):
        both.age_(DAY).rewind_("later")
    assert torch.equal(back(x), chip(x))


def test_a_state_that_lacks_something_is_refused(net):
    chip = program(net, PCM(), seed=3)
    state = {k: v for k, v in chip.state_dict().items() if "nu" not in k}
    with pytest.raises(RuntimeError, match=r"model\.stem\.state_0_nu"):
        chip.load_state_dict(state)


def test_copies_age_on_their_own(net, x):
    chip = program(net, PCM(), seed=3)
    twin = copy.deepcopy(chip)
    twin.age_(DAY)
    twin(x)
    assert chip.age_s == 0
    assert_same_state(chip, program(net, PCM(), seed=3))


# ---- precision, layout, compilation


PHYSICS = ("programmed", "unit", "compensation", "age", "read_key", "reads", "nu", "stuck")


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)]
)
@pytest.mark.parametrize("device", [FAULTY_PCM, Gaussian(0.1)], ids=lambda d: d.name)
def test_a_chip_in_another_precision_keeps_its_physics(net, x, dtype, atol, device):
    chip = program(net, device, seed=3).age_(HOUR)
    other = copy.deepcopy(chip).to(dtype)
    for name, value in chip.state_dict().items():
        converted = other.state_dict()[name]
        if name.endswith(PHYSICS):
            assert converted.dtype == value.dtype, name
            assert torch.equal(converted, value), name
        elif value.is_floating_point():
            assert converted.dtype == dtype, name
    got = other(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), chip(x), rtol=0, atol=atol)
    for both in (chip.rewind_(), other.rewind_()):
        both.age_(DAY)
    torch.testing.assert_close(other(x.to(dtype)).float(), chip(x), rtol=0, atol=atol)
    back = other.float().rewind_()
    assert all(torch.equal(a.read(), b.read()) for (_, a), (_, b) in
               zip(back.arrays(), chip.rewind_().arrays(), strict=True))  # fmt: skip


def test_a_chip_does_not_depend_on_the_default_dtype(net):
    expected = program(net, FAULTY_PCM, seed=3)
    torch.set_default_dtype(torch.float64)
    try:
        chip = program(net, FAULTY_PCM, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_state(chip, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_in_another_precision_is_programmed_in_float32(x, dtype):
    net = Net().to(dtype).eval()
    chip = program(net, PCM(0, 0, 0), seed=3)
    assert all(array.programmed.dtype == torch.float32 for _, array in chip.arrays())
    torch.testing.assert_close(chip(x.to(dtype)), net(x.to(dtype)), rtol=1e-2, atol=1e-2)


def test_autocast(net, x):
    chip = program(net, PCM(), seed=3)
    expected = chip(x)
    chip.rewind_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = chip(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.2)
    chip.rewind_()
    assert torch.equal(chip(x), expected)


def test_channels_last(net, x):
    chip = program(net, PCM(), seed=3)
    expected = chip(x)
    chip.to(memory_format=torch.channels_last).rewind_()
    inputs = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(chip(inputs), expected, rtol=1e-5, atol=1e-5)
    assert chip.model.stem(inputs).is_contiguous(memory_format=torch.channels_last)


def compiled(chip: Chip, x: torch.Tensor):
    torch._dynamo.reset()
    return torch.compile(chip, fullgraph=True, backend="eager")


def exported(chip: Chip, x: torch.Tensor):
    return torch.export.export(chip, (x,)).module()


@pytest.mark.parametrize("device", [FAULTY_PCM, Gaussian(0.1)], ids=lambda d: d.name)
@pytest.mark.parametrize("capture", [compiled, exported])
def test_captured_chips_give_the_numbers_of_the_eager_one(net, x, device, capture):
    chip = program(net, device, seed=3).age_(HOUR)
    expected = [chip(x) for _ in range(3)]
    chip.rewind_()
    captured = capture(chip, x)
    for read in expected:
        torch.testing.assert_close(captured(x), read, rtol=1e-6, atol=1e-6)


def test_a_compiled_chip_ages(net, x):
    chip = program(net, PCM(), seed=3)
    fast = compiled(chip, x)
    young = fast(x)
    chip.age_(DAY).rewind_()
    old = fast(x)
    chip.rewind_()
    torch.testing.assert_close(old, chip(x), rtol=1e-6, atol=1e-6)
    assert (old - young).abs().max() > 1e-2


def test_vmap_over_samples_is_one_read(net, x):
    chip = program(net, PCM(), seed=3)
    expected = chip(x)
    chip.rewind_()
    got = torch.func.vmap(lambda one: chip(one[None])[0])(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@on_gpu
def test_a_chip_on_a_gpu_is_the_same_chip(net, x):
    chip = program(net, FAULTY_PCM, seed=3).age_(HOUR)
    expected = chip(x)
    moved = copy.deepcopy(chip).rewind_().cuda()
    torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    made = program(net.cuda(), FAULTY_PCM, seed=3).age_(HOUR)
    torch.testing.assert_close(made(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    stuck = [c.model.head.states[1]["stuck"].cpu() for c in (chip, made)]
    assert torch.equal(*stuck)


# ---- networks of all kinds


def test_a_layer_used_in_two_places_is_one_array():
    layer = nn.Linear(6, 6)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    chip = program(net, PCM(reading=0), seed=3)
    assert [path for path, _ in chip.arrays()] == ["0"]
    assert chip.model[0] is chip.model[2]
    x = torch.randn(2, 6)
    array = chip.model[0]
    assert torch.equal(chip(x), array(array(x).relu()))
    chip.age_(DAY)
    assert torch.equal(chip(x), array(array(x).relu()))


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 1)], ids=str)
def test_the_root_may_be_the_layer(layer):
    chip = program(layer, PCM(0, 0, 0), seed=3)
    assert isinstance(chip.model, AnalogLayer)
    assert [path for path, _ in chip.arrays()] == [""]
    x = torch.randn(2, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(chip(x), layer(x))


def test_arguments_go_through():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, *, scale):
            return {"y": self.layer(x) * scale}

    net, x = Scaled(), torch.randn(2, 3)
    got = program(net, Gain(1.0), seed=3)(x, scale=2.0)
    torch.testing.assert_close(got["y"], net(x, scale=2.0)["y"])


class Doubling(nn.Linear):
    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


def test_what_stays_digital_is_told_with_the_reason():
    net = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 2),
            "out": nn.Linear(2, 2),
            "two": nn.Bilinear(2, 2, 2),
            "lstm": nn.LSTM(2, 2),
            "attention": nn.MultiheadAttention(4, 2),
            "tokens": nn.Embedding(3, 2),
            "own": Doubling(2, 2),
            "norm": nn.BatchNorm2d(2),
            "activation": nn.PReLU(2),
        }
    )
    chip = program(net, PCM(), seed=3, layers=["linear", "attention.*"])
    cannot = "is not a kind of layer that can be programmed"
    assert chip.digital == {
        "out": "left out by `layers`",
        "two": f"Bilinear {cannot}",
        "lstm.ih_l0": "left out by `layers`",
        "lstm.hh_l0": "left out by `layers`",
        "tokens": f"Embedding {cannot}",
        "own": f"Doubling {cannot}",
    }
    parts = [f"attention.{part}_proj" for part in ("q", "k", "v", "out")]
    assert [path for path, _ in chip.arrays()] == ["linear", *parts]


@pytest.mark.parametrize("grad", [True, False], ids=["slow path", "fast path"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_attention_and_transformer_layers_run_on_the_chip(grad, norm_first):
    # Their fast path asks the layers for their weights instead of calling them.
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first).eval()
    x = torch.randn(2, 5, 8)
    halved = copy.deepcopy(layer)
    with torch.no_grad():
        for part in (halved.linear1, halved.linear2, halved.self_attn.out_proj):
            part.weight.mul_(0.5)
        halved.self_attn.in_proj_weight.mul_(0.5)
    with torch.set_grad_enabled(grad):
        chip = program(layer, Gain(0.5), seed=3)
        torch.testing.assert_close(chip(x), halved(x), rtol=1e-5, atol=1e-5)
        noisy = program(layer, PCM(), seed=3)
        reads = [noisy(x), noisy(x)]
        assert not torch.equal(*reads)
        noisy.rewind_()
        assert all(torch.equal(noisy(x), read) for read in reads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_transformer_layers_in_another_precision(dtype):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    chip = program(layer, Gain(1.0), seed=3).to(dtype)
    got = chip(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), layer(x), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_parametrized_layers_are_programmed(name):
    net = nn.Sequential(getattr(parametrizations, name)(nn.Linear(4, 6)), nn.ReLU()).eval()
    x = torch.randn(3, 4)
    expected = net(x)
    chip = program(net, Gain(1.0), seed=3)
    torch.testing.assert_close(chip(x), expected)
    assert chip.digital == {}
    assert [path for path, _ in chip.named_parameters()] == ["model.0.layer.bias"]
    assert torch.equal(net(x), expected)
    assert_same_state(program(net, PCM(), seed=3), program(net, PCM(), seed=3))


def test_parametrized_layers_that_stay_digital_are_told_by_their_own_name():
    kinds = {"two": nn.Bilinear(2, 2, 2), "out": nn.Linear(2, 2), "in": nn.Linear(2, 2)}
    net = nn.ModuleDict({k: parametrizations.weight_norm(layer) for k, layer in kinds.items()})
    chip = program(net, PCM(), seed=3, layers=["in"])
    assert sorted(chip.digital) == ["out", "two"]
    assert chip.digital["out"] == "left out by `layers`"
    assert "Bilinear is not a kind of layer" in chip.digital["two"]


def pruned(layer: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("hooked", [pruned, torch.nn.utils.spectral_norm])
@pytest.mark.parametrize("verb", [lambda net: program(net, PCM(), seed=3), clip_weights_])
def test_layers_whose_weight_a_hook_makes_anew_are_refused(hooked, verb):
    # Such a weight may be stale, and what is written to it is gone at the next forward.
    net = nn.Sequential(nn.Linear(4, 4), hooked(nn.Linear(4, 4))).eval()
    with torch.no_grad():
        net(torch.ones(1, 4))
    with pytest.raises(ConfigError, match="'1'"):
        verb(net)


@pytest.mark.parametrize("verb", [lambda net: program(net, PCM(), seed=3), clip_weights_])
def test_what_is_on_a_chip_already_is_refused(net, verb):
    chip = program(net, PCM(), seed=3)
    with pytest.raises(ConfigError, match="program"):
        verb(chip)
    assert_same_state(chip, program(net, PCM(), seed=3))


def test_a_spectral_norm_in_training_is_left_alone():
    # Reading its weight in training mode moves its power iteration, and with it the weight.
    net, x = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 6))), torch.randn(3, 4)
    nn.init.normal_(net[0].parametrizations.weight.original)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    chip = program(net, Gain(1.0), seed=3)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    torch.testing.assert_close(chip(x), net.eval()(x))


class InFirst(nn.Module):
    """A linear layer whose weight is (inputs, outputs), as in GPT-2."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class InFirstWeights:
    def matrix(self, layer):
        return layer.weight.T

    def weight(self, layer, matrix):
        return matrix.T

    def forward(self, layer, x, matrix):
        return F.linear(x, matrix, layer.bias)


@pytest.fixture
def _in_first_is_known(monkeypatch):
    monkeypatch.setattr(weights, "_KINDS", dict(weights._KINDS))
    register_weight_layer(InFirst, InFirstWeights())


@pytest.mark.usefixtures("_in_first_is_known")
def test_a_kind_of_ones_own_is_programmed():
    net, x = nn.Sequential(InFirst(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
    chip = program(net, Gain(1.0), seed=3)
    assert [path for path, _ in chip.arrays()] == ["0", "2"]
    torch.testing.assert_close(chip(x), net(x))


@pytest.mark.usefixtures("_in_first_is_known")
def test_the_weight_of_a_kind_of_ones_own_has_the_layers_layout():
    layer = InFirst(4, 6)
    torch.testing.assert_close(program(layer, Gain(1.0), seed=3).model.weight, layer.weight.data)


def test_hooks_on_a_layer_are_kept():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    net[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(program(net, Gain(1.0), seed=3)(x), net(x))


# ---- choosing layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["stem", "depthwise", "head"]),
        (["head"], ["head"]),
        (("head", "stem"), ["stem", "head"]),
        (["*h*e*"], ["depthwise", "head"]),
        (["?tem"], ["stem"]),
        (lambda path, module: isinstance(module, nn.Conv2d), ["stem", "depthwise"]),
    ],
)
def test_layers_by_path_pattern_or_function(net, layers, expected):
    chip = program(net, PCM(), seed=3, layers=layers)
    assert [path for path, _ in chip.arrays()] == expected
    assert chip.digital == dict.fromkeys(
        [name for name in Net.LAYERS if name not in expected], "left out by `layers`"
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("stem", "list of paths or patterns; got the string 'stem'"),
        (["head", "hed"], "No layer matches 'hed'. Did you mean 'head'"),
        (["norm"], "No layer matches 'norm'"),
        (["conv*"], r"No layer matches 'conv\*'. Known: depthwise, head, stem"),
        ([], "at least one layer to program"),
        (lambda path, module: False, "at least one layer.*'stem': left out by `layers`"),
    ],
)
def test_layers_that_cannot_be_meant(net, layers, message):
    with pytest.raises(ConfigError, match=message):
        program(net, PCM(), seed=3, layers=layers)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "Sequential has none .no layer has weights"),
        (nn.Bilinear(2, 2, 2), "Bilinear has none .*Bilinear is not a kind of layer"),
    ],
    ids=["nothing", "bilinear"],
)
def test_a_network_without_a_layer_to_program(net, message):
    with pytest.raises(ConfigError, match=message):
        program(net, PCM(), seed=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", ["head", "depthwise"])
def test_weights_that_are_not_finite_name_their_layer(net, layer, value):
    with torch.no_grad():
        getattr(net, layer).weight.view(-1)[7] = value
    with pytest.raises(ConfigError, match=f"weights of '{layer}' must be finite"):
        program(net, PCM(), seed=3)
    others = [name for name in Net.LAYERS if name != layer]
    assert len(list(program(net, PCM(), seed=3, layers=others).arrays())) == 2


# ---- drift compensation


@pytest.mark.parametrize(
    ("per", "spread", "recovered"),
    [("layer", 0.0, True), ("column", 0.0, True), ("column", 0.2, True), ("layer", 0.2, False)],
)
def test_compensation_undoes_a_common_drift(net, x, per, spread, recovered):
    chip = program(net, CommonDrift(spread), seed=3)
    start = chip(x)
    chip.age_(DAY)
    assert (chip(x) - start).abs().max() > 0.1
    assert compensate_drift_(chip, per) is chip
    assert chip.age_s == DAY
    assert torch.allclose(chip(x), start, rtol=1e-4, atol=1e-4) == recovered
    compensate_drift_(chip.age_(30 * DAY), per)  # anew, not on top of the one before
    assert torch.allclose(chip(x), start, rtol=1e-4, atol=1e-4) == recovered


def test_compensation_is_measured_through_read_noise_by_the_rule_of_the_mean(net):
    chip = program(net, PCM(), seed=3)
    exact = program(net, PCM(reading=0), seed=3)  # the same devices, read without noise
    for c in (chip, exact):
        compensate_drift_(c.age_(DAY))
    for (_, array), (_, quiet) in zip(chip.arrays(), exact.arrays(), strict=True):
        assert array.compensation.unique().numel() == 1
        measured, factor = float(array.compensation[0]), float(quiet.compensation[0])
        young, old = (quiet.age_(t) or (quiet.read() / factor).abs().mean() for t in (0, DAY))
        assert factor == pytest.approx(float(young / old), rel=1e-5)
        assert measured == pytest.approx(factor, rel=0.05)
        assert measured != factor
        assert factor > 1.3


def test_compensation_depends_on_nothing_before_and_rewinds(net, x):
    chip, other = (program(net, PCM(), seed=3).age_(DAY) for _ in range(2))
    compensate_drift_(other, "column").rewind_("use")(x)
    for both in (chip, other):
        compensate_drift_(both, "layer")
    assert_same_state(chip, other)
    assert torch.equal(chip(x), other.rewind_()(x))


def test_compensating_an_array_of_zeros(x):
    net = Net()
    nn.init.zeros_(net.depthwise.weight)
    chip = compensate_drift_(program(net, Gain(0.5), seed=3))
    assert (chip.model.depthwise.compensation == 1).all()
    assert chip(x).isfinite().all()


def test_compensation_refuses_another_granularity(net):
    with pytest.raises(ConfigError, match="'layer' or 'column'; got 'row'"):
        compensate_drift_(program(net, PCM(), seed=3), "row")


# ---- clipping


def test_clipping_to_deviations(net):
    net.add_module("two", nn.Bilinear(2, 2, 2))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    clipped = clip_weights_(net, 1.2)
    assert sorted(clipped) == ["depthwise", "head", "stem"]
    for name, value in net.state_dict().items():
        if name.removesuffix(".weight") not in clipped:
            assert torch.equal(value, before[name]), name
            continue
        limit = 1.2 * before[name].std(correction=0)
        torch.testing.assert_close(value, before[name].clamp(-limit, limit))
        share = float((before[name].abs() > limit).float().mean())
        assert 0.05 < share < 0.5
        assert clipped[name.removesuffix(".weight")] == pytest.approx(share)
    assert net.head.weight.requires_grad


@pytest.mark.parametrize("deviations", [0, -1.0, float("nan")])
def test_clipping_needs_a_positive_number(net, deviations):
    with pytest.raises(ConfigError, match="deviations above 0"):
        clip_weights_(net, deviations)


def test_clipping_reaches_parametrized_layers():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(50, 50))).eval()
    limit = float(net[0].weight.detach().std(correction=0))
    assert list(clip_weights_(net, 1.0)) == ["0"]
    assert net[0].weight.abs().max() <= limit * 1.001
