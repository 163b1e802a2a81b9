"""save and load: whole, exact, refused with a reason, and never a pickle."""

import json
import os
import pickle
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import evenkeel as ek
from evenkeel import files, models, saving
from evenkeel.analog import PCM, Device, DeviceModel, Gain, Gaussian, LogNormal, StuckAt, program
from evenkeel.errors import ConfigError, StoreError


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    ).eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "item.safetensors"


@pytest.fixture
def x():
    return torch.randn(3, 1, 8, 8)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    a_state, b_state = a.state_dict(), b.state_dict()
    assert list(a_state) == list(b_state)
    assert [k for k, v in a_state.items() if not torch.equal(v, b_state[k])] == []


# ---- there and back


def test_a_network_of_the_users_is_loaded_in_place(path):
    net, other = network(), network()
    net[1].running_mean.normal_()
    ek.save(net, str(path))
    assert ek.load(str(path), model=other) is other
    assert_same_state(other, net)


def test_an_architecture_of_evenkeels_needs_no_model(path, x):
    net = models.build("resnet8_digits", num_classes=7).eval()
    ek.save(net, path, note="mine", accuracy=98.5)
    back = ek.load(path)
    assert_same_state(back, net)
    assert not back.training
    assert torch.equal(back(x), net(x))
    assert saving.describe(path) == {
        "format": 1,
        "type": "Network",
        "about": {"note": "mine", "accuracy": 98.5},
        "model": {"name": "resnet8_digits", "options": {"num_classes": 7}},
    }


DEVICES = [
    PCM(),
    Device(PCM(0.5, reading=0, g_max=10.0), StuckAt(0.1, 0.05), scale_per="column", g_max=8.0),
    Device(Gaussian(0.1), LogNormal(0.2), Gain(0.9)),
]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_a_chip_comes_back_bit_for_bit(path, x, device):
    net = network()
    chip = ek.analog.compensate_drift_(program(net, device, seed=2**40).age_(3600), "column")
    chip.model[1].running_mean.normal_()
    chip.rewind_("use")(x)
    ek.save(chip, path)
    back = ek.load(path, model=network())  # whatever weights its network has
    assert_same_state(back, chip)
    assert (back.seed, back.age_s) == (2**40, 3600.0)
    assert back.device.to_dict() == chip.device.to_dict()
    assert [p for p, _ in back.arrays()] == ["0", "4"]
    for _ in range(2):  # the read noise goes on where it was
        assert torch.equal(back(x), chip(x))
    for both in (chip, back):
        both.age_(86_400).rewind_("later")
    assert torch.equal(back(x), chip(x))


@pytest.mark.parametrize("layers", [["4"], lambda path, module: path == "4"], ids=["path", "call"])
def test_a_chip_with_some_layers_left_digital(path, x, layers):
    chip = program(network(), PCM(), seed=3, layers=layers)
    ek.save(chip, path)
    back = ek.load(path, model=network())
    assert_same_state(back, chip)
    assert back.digital == chip.digital


def test_a_chip_of_evenkeels_own_network_needs_no_model(path, x):
    chip = program(models.build("resnet8_digits"), PCM(), seed=3).age_(60)
    ek.save(chip, path)
    assert torch.equal(ek.load(path)(x), chip(x))


def test_a_chip_whose_network_is_one_layer(path):
    chip = program(nn.Linear(4, 3), PCM(), seed=3)
    ek.save(chip, path)
    assert_same_state(ek.load(path, model=nn.Linear(4, 3)), chip)


def test_a_chip_whose_layers_have_names_that_are_patterns(path):
    net = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "b*": nn.Linear(2, 2), "bc": nn.Linear(2, 2)})
    chip = program(net, PCM(), seed=3, layers=lambda path, module: path != "bc")
    ek.save(chip, path)
    back = ek.load(path, model=net)
    assert [p for p, _ in back.arrays()] == ["a[0]", "b*"]
    assert_same_state(back, chip)


def test_shared_tensors_are_saved(path):
    layer = nn.Linear(4, 4)
    chip = program(nn.Sequential(layer, nn.ReLU(), layer), PCM(), seed=3)
    ek.save(chip, path)
    other = nn.Linear(4, 4)
    assert_same_state(ek.load(path, model=nn.Sequential(other, nn.ReLU(), other)), chip)


def test_a_calibration_changes_its_statistics_alone(path):
    net = network()
    batches = [2 + torch.randn(16, 1, 8, 8) for _ in range(4)]
    calibration = ek.calibrate_(net, batches, key={"chip": 7})
    assert calibration.kept
    ek.save(calibration, path)
    other = network()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    assert ek.load(path, model=other) is other
    for name, value in other.state_dict().items():
        if name in ("1.running_mean", "1.running_var"):
            assert torch.equal(value, net.state_dict()[name])
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name])
    description = saving.describe(path)
    assert description["type"] == "Calibration"
    assert description["certificate"] == calibration.to_dict()


def test_anyones_safetensors_are_weights(path):
    net, other = network(), network()
    save_file(net.state_dict(), path)
    assert_same_state(ek.load(path, model=other), net)
    assert saving.describe(path) == {}


def test_files_of_any_header_length_are_read(path):
    # The file begins with the length of its header, whose low bytes may be those of a pickle.
    for length in range(0, 260, 4):
        save_file({"weight": torch.ones(1)}, path, {"note": "x" * length})
        assert saving.read(path)[0]["weight"] == 1


# ---- refusals


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5, "torch", "torch legacy"])
@pytest.mark.parametrize("opening", [saving.read, saving.describe, ek.load])
def test_a_pickle_is_refused_and_not_executed(tmp_path, path, protocol, opening):
    bomb = Bomb(tmp_path / "exploded")
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(bomb, protocol=protocol))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=protocol == "torch")
    kind = "damaged or no safetensors" if protocol in (0, 1) else "is a pickle.*Write the weights"
    with pytest.raises(ConfigError, match=kind):
        opening(path)
    assert not bomb.witness.exists()
    with path.open("rb") as file:  # the bomb is live
        torch.load(file, weights_only=False) if isinstance(protocol, str) else pickle.load(file)
    assert bomb.witness.exists()


def test_a_missing_file(path):
    with pytest.raises(ConfigError, match=r"No file .*item\.safetensors"):
        ek.load(path, model=network())
    path.mkdir()
    with pytest.raises(ConfigError, match="No file"):
        ek.load(path, model=network())


@pytest.mark.parametrize("size", [0, 1, 7, 8, 60, 0.5, -1])
def test_a_truncated_file(path, size):
    net = network()
    ek.save(net, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
    with pytest.raises(ConfigError, match="damaged or no safetensors file"):
        ek.load(path, model=net)


@pytest.mark.parametrize(
    "content", [b"not a model", b"\xff" * 100, b"{}", b"\x02" + b"\0" * 7 + b"{}" + b"\0" * 9]
)
def test_a_file_of_something_else(path, content):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="damaged or no safetensors file"):
        ek.load(path, model=network())


@pytest.mark.parametrize("header", ["{", "[]", "3", "null", '"Chip"'])
def test_a_description_that_is_none(path, header):
    save_file(network().state_dict(), path, {"evenkeel": header})
    with pytest.raises(ConfigError, match="damaged"):
        ek.load(path, model=network())


def test_a_newer_format(path):
    save_file(network().state_dict(), path, {"evenkeel": json.dumps({"format": 2})})
    with pytest.raises(ConfigError, match="newer evenkeel; update"):
        ek.load(path, model=network())


def test_weights_that_do_not_fit_are_listed_and_none_is_loaded(path):
    tensors = network().state_dict()
    tensors["0.weight"] = torch.zeros(4, 1, 5, 5)
    del tensors["4.bias"]
    tensors["5.weight"] = torch.zeros(2)
    save_file(tensors, path)
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ConfigError, match="do not fit Sequential") as caught:
        ek.load(path, model=net)
    message = str(caught.value)
    assert "'0.weight' is (4, 1, 5, 5) in the file and (4, 1, 3, 3) in the network" in message
    assert "'4.bias' is missing" in message
    assert "'5.weight' is not in the network" in message
    assert "more" not in message
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_long_list_of_misfits_is_cut(path):
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=f"and {len(network().state_dict()) + 1 - 3} more"):
        ek.load(path, model=network())


@pytest.mark.parametrize("item", ["network", "chip", "calibration"])
def test_what_needs_its_network_says_so(path, item):
    net = network()
    if item == "network":
        ek.save(net, path)
    elif item == "chip":
        ek.save(program(net, PCM(), seed=3), path)
    else:
        ek.save(ek.calibrate_(net, [torch.randn(8, 1, 8, 8)]), path)
    with pytest.raises(ConfigError, match=rf"tensors of a {item} but not .* load\(path, model="):
        ek.load(path)


def test_a_chip_for_another_network(path):
    ek.save(program(network(), PCM(), seed=3), path)
    with pytest.raises(ConfigError, match=r"No layer matches '4'|do not fit Chip"):
        ek.load(path, model=nn.Sequential(nn.Conv2d(1, 4, 3)))
    wider = network()
    wider[4] = nn.Linear(4 * 36, 5)
    with pytest.raises(ConfigError, match=r"'model\.4\.programmed' is \(2, 3, 144\) in the file"):
        ek.load(path, model=wider)


@dataclass(frozen=True)
class Lossy(DeviceModel):
    """The user's own effect; it keeps a state."""

    loss: float = 0.1

    def write(self, g, draws, g_max):
        kept = 1 - self.loss * draws.uniform("loss", tuple(g.shape))
        return g * kept, {"kept": kept}


def test_effects_of_the_users_own_must_be_given(path, x):
    device = Device(PCM(), Lossy(0.3))
    chip = program(network(), device, seed=3)
    ek.save(chip, path)
    with pytest.raises(ConfigError, match=r"effect '.*:Lossy'.*device=Device\(Lossy\(") as caught:
        ek.load(path, model=network())
    assert f"'{__name__}:Lossy'" in str(caught.value)
    back = ek.load(path, model=network(), device=device)
    assert_same_state(back, chip)
    assert torch.equal(back(x), chip(x))


def test_an_effect_of_the_users_may_be_given_alone(path):
    chip = program(network(), Lossy(), seed=3)
    ek.save(chip, path)
    assert_same_state(ek.load(path, model=network(), device=Lossy()), chip)


# ---- whole or not at all


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_failing_write_leaves_the_old_file(path, monkeypatch, error, step):
    net = network()
    ek.save(net, path)
    old = path.read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(step, fail)
    expected = StoreError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is StoreError else None):
        ek.save(network(), path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]  # and nothing half-written beside it
    assert_same_state(ek.load(path, model=network()), net)


def test_the_file_is_not_open_to_readers_before_it_is_whole(path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(path.exists()))
    ek.save(network(), path)
    assert seen == [False]
    assert path.exists()


def test_facts_that_are_not_json_leave_the_old_file(path):
    ek.save(network(), path)
    old = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        ek.save(network(), path, when=object())
    assert path.read_bytes() == old


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StoreError, match=r"Cannot write .*No such file or directory"):
        ek.save(network(), tmp_path / "none" / "item.safetensors")


def test_a_saved_file_has_the_mode_of_any_other(path):
    mask = os.umask(0o027)
    try:
        files.write_atomically(path, b"content")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("own_code", [False, True])
def test_what_was_put_into_a_network_is_there_again(tmp_path, own_code):
    x = torch.randn(64, 1, 8, 8)
    network = models.build("resnet8_digits").eval()
    ek.calibrate.match_(network, x.split(16))
    ek.norm.convert_(network, lambda c: ek.norm.NoiseAwareBatchNorm2d(c, window=32))
    network(x)  # the layers track it
    ek.save(network, tmp_path / "network.safetensors")
    again = ek.load(
        tmp_path / "network.safetensors",
        model=models.build("resnet8_digits").eval() if own_code else None,
    )
    assert torch.equal(again(x), network(x))
    assert again.stem[1].window == 32
    chip = ek.analog.program(network, ek.analog.PCM(), seed=0).age_(3600)
    ek.save(chip, tmp_path / "chip.safetensors")
    assert torch.equal(ek.load(tmp_path / "chip.safetensors").rewind_()(x), chip.rewind_()(x))


# ---- normalizers and weights that evenkeel has put into a network


def changes():
    return {
        "batch_channel": lambda net: ek.norm.convert_(
            net, lambda c: ek.norm.BatchChannelNorm2d(c, 8, affine="channel")
        ),
        "running": lambda net: ek.norm.convert_(
            net, lambda c: ek.norm.BatchChannelNorm2d(c, 4, statistics="running", update_rate=0.3)
        ),
        "ghost": lambda net: ek.norm.convert_(
            net, lambda c: ek.norm.GhostBatchNorm2d(c, normalization_batch=4)
        ),
        "standardized": ek.norm.standardize_weights_,
    }


@pytest.mark.parametrize("how", list(changes()))
def test_what_was_put_into_a_network_is_saved_with_it(network, data, tmp_path, how):
    changes()[how](network)
    with torch.no_grad():
        network.train()(data.train[0][:32])
    network.eval()
    ek.save(network, tmp_path / "net.safetensors")
    again = ek.load(tmp_path / "net.safetensors")
    x = data.test[0][0][:50]
    assert torch.equal(again(x), network(x))
    again.train(), network.train()
    assert torch.equal(again(x), network(x))
    assert [repr(m) for m in again.modules()] == [repr(m) for m in network.modules()]


@pytest.mark.parametrize("how", list(changes()))
def test_a_network_that_the_file_does_not_fit_is_left_as_it_was(network, tmp_path, how):
    changes()[how](network)
    ek.save(network, tmp_path / "net.safetensors")
    other = models.build("resnet8_digits", num_classes=7)
    before = repr(other), {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ConfigError, match="do not fit"):
        ek.load(tmp_path / "net.safetensors", model=other)
    assert repr(other) == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("prototypes", [False, True])
@pytest.mark.parametrize("on_crossbar", [False, True])
@pytest.mark.parametrize("code", ["real", "bipolar", "binary", "complement"])
def test_a_memory_is_read_back_and_goes_on(code, on_crossbar, prototypes, tmp_path):
    memory = ek.memory.KeyValueMemory(64, code=code, read_out="nearest", prototypes=prototypes)
    memory.write(torch.randn(6, 64), ["a", "b", 3, "a", None, 2.5])
    if on_crossbar:
        device = ek.analog.Device(ek.analog.PCM(), ek.analog.StuckAt(0.01))
        memory = memory.program(device, seed=3, converter=ek.analog.Converter(8)).age_(100)
    ek.save(memory, tmp_path / "memory.safetensors")
    other, queries = ek.load(tmp_path / "memory.safetensors"), torch.randn(5, 64)
    assert type(other) is type(memory)
    for _ in range(2):  # after a further write, too
        one, two = memory.read(queries), other.read(queries)
        assert torch.equal(one.scores, two.scores)
        assert one.classes == two.classes
        further = torch.randn(2, 64)
        memory.write(further, ["new", "a"])
        other.write(further, ["new", "a"])


def test_labels_that_json_has_no_word_for_are_refused(tmp_path):
    memory = ek.memory.KeyValueMemory(8)
    memory.write(torch.randn(1, 8), [("Greek", 3)])
    with pytest.raises(ConfigError, match=r"Labels must be text, .* got \('Greek', 3\)"):
        ek.save(memory, tmp_path / "memory.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_memory_on_a_device_of_ones_own_needs_it_to_be_read(tmp_path):
    class Own(ek.analog.Spread):
        pass

    memory = ek.memory.KeyValueMemory(8, code="bipolar")
    memory.write(torch.randn(2, 8), "ab")
    path = tmp_path / "memory.safetensors"
    ek.save(memory.program(Own(0.1), seed=0), path)
    with pytest.raises(ConfigError, match="is not evenkeel's own"):
        ek.load(path)
    assert len(ek.load(path, device=Own(0.1))) == 2
    with pytest.raises(ConfigError, match="Pass the same"):
        ek.load(path, device=Own(0.2))


def test_a_network_with_a_memory_inside_is_refused(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 8), ek.memory.KeyValueMemory(8))
    with pytest.raises(ConfigError, match="A memory inside of a network is saved by itself"):
        ek.save(network, tmp_path / "network.safetensors")


def test_a_file_of_a_memory_that_lacks_a_tensor_is_refused(tmp_path, monkeypatch):
    memory = ek.memory.KeyValueMemory(8)
    memory.write(torch.randn(2, 8), "ab")
    path = tmp_path / "memory.safetensors"
    ek.save(memory, path)
    tensors, description = ek.saving.read(path)
    del tensors["owners"]
    monkeypatch.setattr(ek.saving, "read", lambda path: (tensors, description))
    with pytest.raises(ConfigError, match="needs 'owners'"):
        ek.load(path)
