"""Which layers cost the accuracy."""

import copy
import json

import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel.analog import Gaussian, program
from evenkeel.audit import sensitivity as module
from evenkeel.audit.run import evaluate
from evenkeel.audit.sensitivity import sensitivity
from evenkeel.audit.tasks import Classify
from evenkeel.calibrate import match_
from evenkeel.data import as_data
from evenkeel.errors import ConfigError
from evenkeel.saving import save
from test_cli import command


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))
    with torch.no_grad():  # one layer with an outlier, so that its noise is many times larger
        net[2].weight[0, 0] = 12.0
    return net.eval()


@pytest.fixture(scope="module")
def data(net):
    x = torch.randn(400, 6)
    with torch.no_grad():
        return as_data((x, net(x).argmax(1)))


def by_hand(net, data, layers, chips=3):
    task = Classify()
    values = []
    for seed in range(chips):
        chip = program(net, Gaussian(0.05), seed=seed, layers=layers).age_(0.0)
        with torch.no_grad():
            values.append(task.value(evaluate(chip.rewind_("evaluate"), data, task)))
    return sum(values) / chips


def test_one_at_a_time_on_the_same_chips(net, data):
    found = sensitivity(net, data, device="gaussian:0.05", age=0, chips=3)
    assert found.digital == 100
    assert found.analog == pytest.approx(by_hand(net, data, ["0", "2", "4"]))
    assert [cost.layer for cost in found.layers] == ["0", "2", "4"]
    assert found.layers[1].alone == pytest.approx(by_hand(net, data, ["2"]))
    assert found.layers[1].without == pytest.approx(by_hand(net, data, ["0", "4"]))
    worst = min(found.layers, key=lambda cost: cost.alone)
    assert worst.layer == "2" == max(found.layers, key=lambda cost: cost.without).layer
    assert (found.kept, found.smallest) == ([], [])


def test_the_layer_that_costs_most_is_kept_first(net, data):
    raw = by_hand(net, data, ["0", "2", "4"])
    few = sensitivity(net, data, device="gaussian:0.05", age=0, chips=3, target=raw + 1)
    assert few.smallest == ["2"]
    assert few.kept == [("2", pytest.approx(by_hand(net, data, ["0", "4"])))]
    every = sensitivity(net, data, device="gaussian:0.05", age=0, chips=3, target=100)
    assert len(every.smallest) == len(every.kept) == 3  # all but nothing is digital
    assert every.kept[-1][1] == 100
    none = sensitivity(net, data, device="gaussian:0.05", age=0, chips=3, target=raw - 1)
    assert none.smallest == []
    assert (
        sensitivity(net, data, device="gaussian:0.05", age=0, chips=1, target=101).smallest is None
    )


def test_the_model_and_the_progress(net, data):
    before, seen = {k: v.clone() for k, v in net.state_dict().items()}, []
    sensitivity(net, data, chips=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 14) for k in range(1, 15)]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_bad_input(net, data):
    class Fixed:
        name = "Fixed"

        def program(self, model, *, seed):
            return program(model, Gaussian(0.1), seed=seed)

    with pytest.raises(ConfigError, match="must be able to leave layers out"):
        sensitivity(net, data, device=Fixed())
    with pytest.raises(ConfigError, match="chips must be 1"):
        sensitivity(net, data, chips=0)
    with pytest.raises(ConfigError, match="Did you mean 'pcm'"):
        sensitivity(net, data, device="pmc")
    assert module.sensitivity is sensitivity


def test_the_command(tmp_path, monkeypatch, capsys):
    from evenkeel.models import build

    torch.manual_seed(0)
    save(build("resnet8_digits"), tmp_path / "net.safetensors")
    code, out, _ = command(
        monkeypatch, capsys, "sensitivity", tmp_path / "net.safetensors", "--test-samples", 40,
        "--device", "gaussian:0.1", "--chips", 1, "--target", 101, "--json", tmp_path / "s.json",
    )  # fmt: skip
    assert code == 0
    assert "blocks.0.conv1" in out
    assert "is not reached" in out
    facts = json.loads((tmp_path / "s.json").read_text())
    assert len(facts["layers"]) == len(facts["kept"])
    assert facts["smallest"] is None


def test_a_matched_network(net, data):
    matched = copy.deepcopy(net)
    match_(matched, [batch[0] for batch in data.calibration])
    found = sensitivity(matched, data, device="gaussian:0.05", age=0, chips=1)
    assert [cost.layer for cost in found.layers] == ["0", "2", "4"]


def test_it_is_a_part_of_an_audit(net, data, tmp_path):
    seen = []
    audit = ek.audit(
        net, data, devices=["gaussian:0.3"], chips=2, remedies=["none"], floor=90.0,
        store=":memory:", workers=0,
    )  # fmt: skip
    assert audit.to_dict()["sensitivity"] is None
    assert "Which layers cost it" not in audit.report(tmp_path / "before.html").read_text()
    found = audit.find_sensitivity(chips=2, progress=lambda done, total: seen.append((done, total)))
    alone = sensitivity(net, data, device="gaussian:0.3", age=0.0, chips=2, target=90.0)
    assert found == alone
    assert seen[-1][0] == seen[-1][1]
    assert audit.to_dict()["sensitivity"] == found.to_dict()
    page = audit.report(tmp_path / "after.html").read_text()
    assert "Which layers cost it" in page
    assert found.said in page


def test_an_audit_by_command_tells_it_too(tmp_path, monkeypatch, capsys):
    from evenkeel.models import build

    save(build("resnet8_digits"), tmp_path / "net.safetensors")
    code, out, _ = command(
        monkeypatch, capsys, "audit", tmp_path / "net.safetensors", "--out", tmp_path / "audit",
        "--device", "gaussian:0.3", "--remedy", "none", "--chips", 1, "--test-samples", 40,
        "--sensitivity", "--workers", 0,
    )  # fmt: skip
    assert code == 0
    assert "with all layers on the chip" in " ".join(out.split())
    facts = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert "blocks.0.conv1" in [cost["layer"] for cost in facts["sensitivity"]["layers"]]


class Foreign:
    """A device as the protocol has it, that cannot leave layers out."""

    name, family, ages = "Foreign", "Foreign", False

    def program(self, model, *, seed):
        return ForeignChip(model)

    def to_dict(self):
        return {"type": "Foreign"}


class ForeignChip:
    def __init__(self, model):
        self.model, self.digital = copy.deepcopy(model), {}

    def __call__(self, x):
        return self.model(x)

    def age_(self, seconds):
        return self

    def rewind_(self, stream):
        return self


def test_a_device_that_cannot_leave_layers_out(net, data):
    with pytest.raises(ConfigError, match="Foreign must be able to leave layers out"):
        sensitivity(net, data, device=Foreign())


def test_an_audit_is_written_all_the_same(tmp_path, monkeypatch, capsys):
    from evenkeel.models import build

    save(build("resnet8_digits"), tmp_path / "net.safetensors")
    code, out, _ = command(
        monkeypatch, capsys, "audit", tmp_path / "net.safetensors", "--out", tmp_path / "audit",
        "--device", "test_sensitivity:Foreign", "--remedy", "none", "--chips", 1,
        "--test-samples", 40, "--sensitivity", "--workers", 0,
    )  # fmt: skip
    assert code == 0
    assert "leave layers out" in " ".join(out.split())
    assert (tmp_path / "audit" / "report.html").exists()


def test_a_network_of_one_layer_has_a_name_in_the_outcome(net, data):
    whole = nn.Linear(6, 4).eval()
    with torch.no_grad():
        samples = as_data((data.test[0][0], whole(data.test[0][0]).argmax(1)))
    found = sensitivity(whole, samples, device="gaussian:0.3", target=100.0, chips=1)
    assert found.smallest == [""]
    assert found.said.endswith(": the network itself.")
