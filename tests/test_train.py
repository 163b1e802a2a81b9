import json
import pickle
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel.errors import ConfigError
from evenkeel.models import build
from evenkeel.train import RECIPES, crop_and_flip, fit, recipe


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.2),
                         nn.ReLU(), nn.Linear(16, 10))  # fmt: skip


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in one.state_dict().items())


class KillError(Exception):
    pass


@pytest.fixture
def xy(data):
    return data.train[0][:320], data.train[1][:320]


@pytest.mark.parametrize("step", [1, 5, 7, 14])
def test_a_run_that_was_killed_ends_as_one_that_was_not(xy, tmp_path, step):
    options = {"epochs": 3, "augment": crop_and_flip}
    undisturbed = fit(small, *xy, **options)

    def kill(done, total):
        if done == step:
            raise KillError

    with pytest.raises(KillError):
        fit(small, *xy, **options, checkpoint=tmp_path / "c", on_step=kill)
    epochs, steps = [], []
    resumed = fit(
        small,
        *xy,
        **options,
        checkpoint=tmp_path / "c",
        on_step=lambda done, total: steps.append(done),
        on_epoch=epochs.append,
    )
    assert same(resumed, undisturbed)
    assert [e["epoch"] for e in epochs] == [1, 2, 3]  # those behind it are told of again
    assert steps[0] == 1 + (step - 1) // 5 * 5  # 5 steps an epoch


def test_the_checkpoint_of_another_run_is_refused(xy, tmp_path):
    fit(small, *xy, epochs=1, checkpoint=tmp_path / "c")
    with pytest.raises(ConfigError, match="checkpoint of another run"):
        fit(small, *xy, epochs=2, checkpoint=tmp_path / "c")


class Bomb:
    def __reduce__(self):
        return Path.mkdir, (Path("exploded"),)


def test_a_checkpoint_with_code_in_it_is_refused(xy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"identity": Bomb()}, tmp_path / "c")
    with pytest.raises(pickle.UnpicklingError):
        fit(small, *xy, epochs=1, checkpoint=tmp_path / "c")
    assert not Path("exploded").exists()


def test_the_global_generator_is_put_back(xy):
    before = torch.get_rng_state()
    first = fit(small, *xy, epochs=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert same(first, fit(small, *xy, epochs=1))  # and does not matter
    assert not same(first, fit(small, *xy, epochs=1, seed=1))


@pytest.mark.filterwarnings("ignore::UserWarning")  # fabric's own, of the number of workers
def test_fabric_in_full_precision_changes_nothing(xy):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.launch()
    assert same(fit(small, *xy, epochs=2, fabric=fabric), fit(small, *xy, epochs=2))


def test_crops_and_mirror_images():
    x = torch.arange(1.0, 1 + 3 * 6 * 6).view(1, 3, 6, 6).expand(400, -1, -1, -1)
    out = crop_and_flip(x)
    assert out.shape == x.shape
    padded = nn.functional.pad(x[:1], [4] * 4)
    crops = {
        tuple(view.flatten().tolist()): (top, left, flip)
        for top in range(9)
        for left in range(9)
        for flip in (False, True)
        for view in [padded[0, :, top : top + 6, left : left + 6].flip(-1 if flip else ())]
    }
    met = [crops[tuple(image.flatten().tolist())] for image in out]  # each is one of these, whole
    assert len({place[:2] for place in met}) > 70  # of 81
    assert 150 < sum(flip for *_, flip in met) < 250


def test_recipes_are_known_by_name():
    for name in RECIPES:
        assert build(recipe(name).architecture)
    with pytest.raises(ConfigError, match="Did you mean 'cifar10'"):
        recipe("cifar")
    net = build("resnet14_cifar10")
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert 80_000 < sum(p.numel() for p in net.parameters()) < 300_000


@pytest.mark.parametrize("name", ["resnet8_digits", "resnet14_cifar10"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_networks_with_every_norm(name, norm):
    net, batch = build(name, norm=norm), build(name)
    counts = [sum(p.numel() for p in n.parameters()) for n in (net, batch)]
    assert counts[0] == counts[1]
    names = [{k for k, _ in n.named_parameters()} for n in (net, batch)]
    assert names[0] == names[1]
    kinds = {type(m) for m in net.modules()}
    assert (nn.BatchNorm2d in kinds) == (norm == "batch")
    assert (nn.GroupNorm in kinds) == (norm == "group")
    groups = {m.num_channels // m.num_groups for m in net.modules() if type(m) is nn.GroupNorm}
    assert groups == ({8} if norm == "group" else set())
    size = 8 if name == "resnet8_digits" else 32
    x = torch.randn(16, net.stem[0].in_channels, size, size)
    outputs = net(x)
    assert torch.isfinite(outputs).all()
    assert outputs.std(0).mean() > 0.02  # they still tell inputs apart
    nn.functional.cross_entropy(outputs, torch.arange(16) % 10).backward()
    assert torch.isfinite(net.stem[0].weight.grad).all()
    assert net.stem[0].weight.grad.abs().max() > 0


def test_without_a_norm_branches_start_at_zero_and_layers_keep_the_variance():
    net = build("resnet14_cifar10", norm="none")
    for block in net.blocks:
        assert not block.norm2.weight.any()
        assert (block.norm1.weight == 1).all()
        fan_in = block.conv1.weight[0].numel()
        assert float(block.conv1.weight.detach().std()) == pytest.approx(
            (2 / fan_in) ** 0.5, rel=0.15
        )
    x = torch.randn(8, 3, 32, 32)
    assert 0.2 < float(net.blocks(net.stem(x)).detach().square().mean()) < 5


@pytest.mark.parametrize("norm", ["group", "none"])
def test_networks_without_batch_norm_learn(data, norm):
    x, y = data.train
    rate = {"group": 0.2, "none": 0.1}[norm]  # as in the recipes
    net = fit(lambda: build("resnet8_digits", norm=norm), x, y, epochs=6, learning_rate=rate)
    with torch.no_grad():
        right = (net(x).argmax(1) == y).float().mean()
    assert right > 0.8


def test_an_unknown_norm_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"Unknown norm 'grup'\. Did you mean 'group'"):
        build("resnet8_digits", norm="grup")


def test_recipes_for_the_other_norms_differ_in_norm_and_rate_alone():
    plain = asdict(recipe("cifar10"))
    assert plain["norm"] == "batch"
    for norm in ("group", "none"):
        other = asdict(recipe(f"cifar10_{norm}"))
        differ = {k for k in plain if plain[k] != other[k]}
        assert differ == {"norm", "learning_rate"}
        assert other["norm"] == norm
        assert other["learning_rate"] < plain["learning_rate"]
        assert build(other["architecture"], norm=other["norm"])


def test_a_network_without_batch_norm_comes_back_from_a_file(tmp_path):
    for norm in ("group", "none"):
        net = build("resnet8_digits", norm=norm).eval()
        ek.save(net, tmp_path / "n.safetensors")
        back = ek.load(tmp_path / "n.safetensors")
        x = torch.randn(2, 1, 8, 8)
        assert torch.equal(back(x), net(x))


def command(folder, *more):
    program = Path(sys.executable).with_name("evenkeel")
    return [program, "train", "digits", "--epochs", "4", "--out", folder / "net.safetensors", *more]


def test_the_command_killed_goes_on(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    with subprocess.Popen(
        command(a), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        while "epoch 2" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(signal.SIGKILL)
    assert not (a / "net.safetensors").exists()
    for folder in (a, b):
        done = subprocess.run(command(folder), capture_output=True, text=True, check=True)
        assert "test accuracy" in done.stdout
        assert {p.name for p in folder.iterdir()} == {"net.safetensors", "net.json"}
    logs = [json.loads((f / "net.json").read_text()) for f in (a, b)]
    assert [e["epoch"] for e in logs[0]["epochs"]] == [1, 2, 3, 4]
    assert [e["loss"] for e in logs[0]["epochs"]] == [e["loss"] for e in logs[1]["epochs"]]
    assert logs[0]["test_accuracy"] == logs[1]["test_accuracy"] > 90
    networks = [ek.load(folder / "net.safetensors") for folder in (a, b)]
    assert same(*networks)
