import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import evenkeel as ek
from evenkeel.cli import main

FACTORY = """
import torch
from torch import nn
from evenkeel import models
from evenkeel.data import Data, digits

def network():
    return models.build("resnet8_digits")

def without_layers():
    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10), nn.BatchNorm1d(10))

def no_module():
    return 3

def twelve_classes():
    data = digits()
    return Data("twelve", data.test, data.calibration, classes=[str(k) for k in range(12)])

def small():
    data = digits()
    return data.limited(test=256, calibration=128)

def nothing():
    return Data("nothing", [], digits().calibration)
"""


@pytest.fixture
def here(tmp_path, monkeypatch, network):
    """A folder with a user's module and weights, as the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    Path("mine.py").write_text(FACTORY)
    save_file(network.state_dict(), "weights.safetensors")
    return tmp_path


def command(monkeypatch, capsys, *arguments):
    """Exit code and what came on the two streams."""
    monkeypatch.setattr(sys, "argv", ["evenkeel", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


QUICK = ("--device", "gaussian:0.15", "--chips", 2, "--remedy", "none,calibrate", "--workers", 0)


def test_an_audit_of_ones_own_network(here, monkeypatch, capsys, network):
    code, out, err = command(
        monkeypatch, capsys, "audit", "mine:network", "--weights", "weights.safetensors",
        "--data", "mine:small", *QUICK, "--floor", 95, "--out", "result", "--json", "facts.json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "Report: file://" in out
    assert sorted(p.name for p in Path("result").iterdir()) == [
        "audit.db", "audit.json", "mended.safetensors", "recipe.md", "report.html",
    ]  # fmt: skip
    facts = json.loads(Path("facts.json").read_text())
    assert facts == json.loads(Path("result/audit.json").read_text())
    assert facts["provenance"]["command"].startswith("evenkeel audit mine:network --weights")
    assert [c["remedy"] for c in facts["cells"]] == ["none", "calibrate"]
    assert facts["verdict"][0] in Path("result/recipe.md").read_text()
    mended = ek.load("result/mended.safetensors")  # a reference network: nothing else is needed
    assert mended(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_a_named_architecture_and_a_saved_network(here, monkeypatch, capsys, network):
    given = ["--data", "mine:small", *QUICK]
    code, _, _ = command(
        monkeypatch, capsys, "audit", "resnet8_digits", "--weights", "weights.safetensors", *given
    )
    assert code == 0
    ek.save(network, "saved.safetensors")
    code, _, _ = command(
        monkeypatch, capsys, "audit", "saved.safetensors", *given, "--test-samples", 100
    )
    assert code == 0
    facts = json.loads(Path("audit/audit.json").read_text())
    assert facts["provenance"]["test_samples"] == 100


def test_devices_are_listed(here, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "devices", "--json", "devices.json")
    assert code == 0
    listed = {d["name"]: d["settings"] for d in json.loads(Path("devices.json").read_text())}
    assert listed["pcm"]["g_max"] == 25
    assert listed["gaussian"] == {"level": None}  # must be given
    assert all(name in out for name in ("pcm", "gaussian", "log_normal", "gain", "stuck_at"))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


NET = ("mine:network", "--weights", "weights.safetensors")
BAD = {
    "no weights given": (("mine:network",), "needs its trained weights"),
    "missing weights": ((*NET[:2], "none.safetensors"), "No file none.safetensors"),
    "corrupt weights": ((*NET[:2], "corrupt.safetensors"), "damaged"),
    "cut weights": ((*NET[:2], "cut.safetensors"), "damaged"),
    "a pickle": ((*NET[:2], "bomb.pt"), "is a pickle"),
    "a zip of torch.save": ((*NET[:2], "zip.pt"), "is a pickle"),
    "other weights": ((*NET[:2], "other.safetensors"), "do not fit ResNet"),
    "NaN weights": ((*NET[:2], "nan.safetensors"), "holds NaN"),
    "classes": ((*NET, "--data", "mine:twelve_classes"), "10 outputs and the data has 12 classes"),
    "no data": ((*NET, "--data", "mine:nothing"), "needs test samples"),
    "no such data": ((*NET, "--data", "digit"), "Did you mean 'digits'"),
    "empty folder": ((*NET, "--data", "."), "test/CLASS"),
    "no analog layer": (("mine:without_layers", "--weights", "own"), "at least one layer to"),
    "unknown device": ((*NET, "--device", "pmc"), "Did you mean 'pcm'"),
    "unknown remedy": ((*NET, "--remedy", "calibrat"), "Did you mean 'calibrate'"),
    "bad age": ((*NET, "--age", "soon"), "An age is"),
    "bad level": ((*NET, "--device", "gaussian:-1"), "not negative"),
    "unknown network": (("resnet8", *NET[1:]), "Did you mean 'resnet8_digits'"),
    "unknown factory": (("mine:netwrk", "--weights", "own"), "Did you mean 'network'"),
    "no module": (("mine:no_module", "--weights", "own"), "must give a torch.nn.Module"),
    "unwritable output": ((*NET, "--out", "/proc/audit"), "Cannot write into"),
    "output is a file": ((*NET, "--out", "mine.py/x"), "Cannot write into"),
    "weights of no one": (("--weights", "weights.safetensors"), "needs the MODEL"),
    "weights twice": (("saved.safetensors", *NET[1:]), "has its weights in it"),
    "unknown option": (("mine:network", "--wights", "x"), "wights"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, here, monkeypatch, capsys, network):
    Path("corrupt.safetensors").write_bytes(b"nonsense" * 100)
    whole = Path("weights.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("bomb.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save(network.state_dict(), "zip.pt")
    save_file({"stem.weight": torch.zeros(3)}, "other.safetensors")
    bad = {k: v.clone() for k, v in network.state_dict().items()}
    bad["stem.0.weight"][0] = torch.nan
    save_file(bad, "nan.safetensors")
    ek.save(network, "saved.safetensors")

    arguments, says = BAD[case]
    code, out, err = command(monkeypatch, capsys, "audit", *arguments)
    assert code == 2
    said = " ".join((out + err).split())
    assert re.search(says, said), said
    assert "Traceback" not in said
    assert not Path("exploded").exists()
    left = {p.name for p in Path("audit").iterdir()} if Path("audit").exists() else set()
    assert left <= {"audit.db"}  # nothing half-written


def test_the_program_itself_exits_with_2_and_one_line(tmp_path):
    done = subprocess.run(
        [Path(sys.executable).with_name("evenkeel"), "audit", "--device", "pmc"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def heeding_interrupts():
    """A background job is started with interrupts ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_says_what_to_do(here, network):
    program = Path(sys.executable).with_name("evenkeel")
    options = ["--chips", "400", "--device", "gaussian:0.1", "--workers", "0", "--out", "o"]
    arguments = [program, "audit", "mine:network", "--weights", "weights.safetensors", *options]
    with subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=heeding_interrupts,  # noqa: PLW1509
    ) as run:
        while not (here / "o" / "audit.db").exists():
            time.sleep(0.1)
        time.sleep(2)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate()
    assert run.returncode == 130
    assert b"the same command goes on" in errors


# ---- balance


@pytest.mark.parametrize(("kind", "told"), [("norm", "free channels"), ("arrays", "noise power")])
def test_balance_writes_what_it_says(here, monkeypatch, capsys, network, data, kind, told):
    code, out, _ = command(
        monkeypatch, capsys, "balance", "mine:network", "--weights", "weights.safetensors",
        "--kind", kind, "--out", "out.safetensors", "--json", "out.json",
    )  # fmt: skip
    assert code == 0
    assert told in out
    assert json.loads(Path("out.json").read_text())["error"] < 1e-5
    changed = ek.load("out.safetensors")
    x = data.test[0][0]
    torch.testing.assert_close(changed(x), network(x), rtol=1e-4, atol=1e-4)
    old = network.blocks[0].conv1.weight
    stored = [t for t in changed.state_dict().values() if t.shape == old.shape]
    assert not any(torch.equal(t, old) for t in stored)


def test_balance_says_what_to_do_without_weights(here, monkeypatch, capsys):
    asked = "balance", "mine:network", "--out", "x.safetensors"
    code, _, said = command(monkeypatch, capsys, *asked)
    assert code == 2
    assert "--weights" in said
    assert not Path("x.safetensors").exists()
