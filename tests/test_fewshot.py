"""``evenkeel fewshot``."""

import base64
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import evenkeel as ek
from evenkeel.cli import fewshot_measure, main
from evenkeel.data import labelled_folder
from evenkeel.memory import (
    CODES,
    EpisodeSampler,
)
from evenkeel.memory.recall import accuracies, by_prototypes, embed

QUIET = pytest.mark.filterwarnings("ignore::UserWarning")  # fabric's own, of number of workers


KINDS = ("disc", "ring", "bar", "cross")


class KillError(Exception):
    """Of a run, in its midst."""


def draw(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def shape(kind, numbers):
    """A drawing on paper, dark on white."""
    image = Image.new("L", (40, 40), 255)
    pen = ImageDraw.Draw(image)
    x, y = (20 + numbers.integers(-3, 4, 2)).tolist()
    if kind == "disc":
        pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill=0)
    elif kind == "ring":
        pen.ellipse((x - 12, y - 12, x + 12, y + 12), outline=0, width=3)
    elif kind == "bar":
        pen.line((x - 14, y, x + 14, y), fill=0, width=4)
    else:
        pen.line((x - 12, y - 12, x + 12, y + 12), fill=0, width=3)
        pen.line((x - 12, y + 12, x + 12, y - 12), fill=0, width=3)
    return image


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """A folder with drawings/, controller.safetensors, and prototypes.safetensors."""
    folder = tmp_path_factory.mktemp("studio")
    numbers = np.random.default_rng(0)
    for part in ("train", "validation", "test"):
        for kind in KINDS:
            (folder / "drawings" / part / kind).mkdir(parents=True)
            for k in range(16):
                shape(kind, numbers).save(folder / "drawings" / part / kind / f"{k:02d}.png")
    program = Path(sys.executable).with_name("evenkeel")
    for objective, name in (("softabs", "controller"), ("prototypes", "prototypes")):
        done = subprocess.run(
            [program, "fewshot", "train", "--out", f"{name}.safetensors", *TINY, "--objective",
             objective],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (folder / f"{name}.out").write_text(done.stdout)
    return folder


TINY = (
    "--data", "drawings", "--ink", "--ways", "4", "--shots", "2", "--queries", "2",
    "--episodes", "20", "--every", "10", "--channels", "8", "--dim", "64",
)  # fmt: skip


@pytest.fixture
def here(studio, tmp_path, monkeypatch):
    """A working folder with what is in the studio."""
    monkeypatch.chdir(tmp_path)
    for entry in studio.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Exit code and what came on the two streams; work is done in threads, which start at once."""

    def run(*arguments, threads=True):
        monkeypatch.setattr(sys, "argv", ["evenkeel", "fewshot", *map(str, arguments)])
        if threads:
            monkeypatch.setattr(
                fewshot_measure, "local_processes", lambda workers, _: ThreadPoolExecutor(workers)
            )
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return run


ASK = ("test", "controller.safetensors", "--data", "drawings", "--out", "o", "--task", "3x1",
       "--episodes", "10", "--workers", "1", "--ink")  # fmt: skip


def test_a_controller_is_trained_and_kept_in_half_precision(studio):
    file = studio / "controller.safetensors"
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    encoder = ek.load(file)
    assert not encoder.training
    assert encoder(torch.rand(2, 1, 32, 32)).shape == (2, 64)
    log = json.loads((studio / "controller.json").read_text())
    assert log["command"].startswith("evenkeel fewshot train --out controller.safetensors")
    assert log["settings"]["channels"] == 8
    assert log["settings"]["turned"] is True
    assert [v["episode"] for v in log["validations"]] == [10, 20]
    assert log["parameters"] == sum(p.numel() for p in encoder.parameters())
    about = ek.saving.describe(file)["about"]
    best = max(v["validation"] for v in log["validations"])
    assert about["validation"] == best > 60  # of four classes
    assert about["objective"] == "softabs"
    said = (studio / "controller.out").read_text()
    assert f"{best:.2f} %" in said
    assert "episode 10: loss" in said
    assert not list(studio.glob("*.checkpoint"))


@QUIET
def test_the_command_killed_goes_on(here, command, monkeypatch):
    from evenkeel.train import episodes

    # In this process, as the other: sums come out the same on equally many threads only.
    assert command("train", "--out", "whole.safetensors", *TINY)[0] == 0
    step = episodes._loss
    calls = []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 15:
            raise KillError
        return step(*arguments)

    monkeypatch.setattr(episodes, "_loss", dying)
    with pytest.raises(KillError):
        command("train", "--out", "again.safetensors", *TINY)
    assert Path("again.checkpoint").exists()
    assert not Path("again.safetensors").exists()
    code, _, err = command("train", "--out", "again.safetensors", *TINY, "--seed", 1)
    assert code == 2
    assert "checkpoint of another run" in err
    code, _, _ = command("train", "--out", "again.safetensors", *TINY)
    assert code == 0
    assert len(calls) == 25  # of the 15 the first 10 were kept
    again, first = (load_file(f"{name}.safetensors") for name in ("again", "whole"))
    assert same(again, first)
    validations = [
        [v["loss"] for v in json.loads(Path(f"{name}.json").read_text())["validations"]]
        for name in ("again", "whole")
    ]
    assert validations[0] == validations[1]
    assert not Path("again.checkpoint").exists()


def test_a_test_answers_for_codes_devices_and_ages(here, command):
    code, out, err = command(*ASK, "--json", "f.json")
    assert (code, err) == (0, "")
    facts = json.loads(Path("f.json").read_text())
    assert facts["classes"] == 4
    assert facts["command"].startswith("evenkeel fewshot test controller.safetensors")
    met = [(r["code"], r["device"], r["age_s"]) for r in facts["rows"]]
    devices = [(None, 0.0), *((f"Spread({s})", 0.0) for s in (0.2, 0.4, 0.6, 0.8, 1.0)),
               *(("PCM", age) for age in (0.0, 3600.0, 86400.0))]  # fmt: skip
    assert len(met) == len(set(met))
    assert set(met) == {(c, *device) for c in CODES for device in devices}
    assert {r["task"] for r in facts["rows"]} == {"3-way 1-shot"}
    software = next(r for r in facts["rows"] if r["code"] == "real" and r["device"] is None)
    assert software["accuracy"] > 60  # of three classes
    told = f"{software['accuracy']:.2f} ± {software['half_width']:.2f}"
    assert told in " ".join(out.split())
    for picture in ("spread.svg", "episode.svg"):
        text = Path("o", picture).read_text()
        assert text.startswith("<svg")
        assert f"o/{picture}" in out
    assert Path("o/episode.svg").read_text().count("<image") == 3 + 3
    for word in ("bipolar", "complement", "3-way 1-shot"):
        assert word in Path("o/spread.svg").read_text()


def test_vectors_are_computed_once_and_are_those_of_the_controller(here, command):
    quick = (*ASK, "--device", "spread:0.2", "--code", "bipolar", "--json", "f.json")
    assert command(*quick)[0] == 0
    (file,) = Path("o").glob("vectors-*.safetensors")
    os.utime(file, (1, 1))
    first = json.loads(Path("f.json").read_text())["rows"]
    assert command(*quick)[0] == 0
    assert file.stat().st_mtime == 1
    assert json.loads(Path("f.json").read_text())["rows"] == first
    stored = load_file(file)
    images = labelled_folder("drawings/test", size=32, invert=True)
    encoder = ek.load("controller.safetensors")
    torch.testing.assert_close(stored["vectors"], embed(encoder, images.images))
    assert torch.equal(stored["labels"], images.labels)
    assert not Path("o/spread.svg").exists()  # of one level there is no curve
    code, _, _ = command("test", "prototypes.safetensors", *quick[2:])
    assert code == 0
    assert len(list(Path("o").glob("vectors-*.safetensors"))) == 2  # another's are others


def test_a_controller_of_prototypes_adds_a_column(here, command):
    code, out, _ = command(
        *ASK[:6], "--task", "3x1", "4x2", *ASK[8:], "--code", "real", "--device", "pcm", "--age",
        "0", "--prototypes", "prototypes.safetensors", "--json", "f.json",
    )  # fmt: skip
    assert code == 0
    rows = json.loads(Path("f.json").read_text())["rows"]
    assert [(r["task"], r["code"], r["device"]) for r in rows if r["code"] != "real"] == [
        ("3-way 1-shot", "prototypes", None),
        ("4-way 2-shot", "prototypes", None),
    ]
    assert out.count("prototypes") == 2
    images = labelled_folder("drawings/test", size=32, invert=True)
    x = embed(ek.load("prototypes.safetensors"), images.images)
    sampler = EpisodeSampler(images.labels, 3, 1, 15, episodes=10)
    expected = 100 * accuracies(x, sampler, by_prototypes).mean()
    assert next(r for r in rows if r["code"] == "prototypes")["accuracy"] == pytest.approx(
        expected.item()
    )


def test_processes_of_their_own_say_the_same(here, command, tmp_path):
    quick = [*ASK, "--device", "spread:0.5", "--json"]
    assert command(*quick, "threads.json")[0] == 0
    done = subprocess.run(
        [Path(sys.executable).with_name("evenkeel"), "fewshot", *quick, "processes.json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    threads, processes = (
        json.loads(Path(f"{name}.json").read_text())["rows"] for name in ("threads", "processes")
    )
    assert threads == processes


def instead(name, value, arguments):
    """The arguments with another value of one option."""
    arguments = list(arguments)
    if name not in arguments:
        return [*arguments, name, value]
    arguments[arguments.index(name) + 1] = value
    return arguments


BAD_TEST = [
    ("--code", "bipolr", "Did you mean 'bipolar'"),
    ("--task", "20", "A task is ways x shots"),
    ("--task", "3x0", "shots must be 1 or more"),
    ("--task", "9x1", "An episode of 9 ways"),
    ("--task", "3x16", "16 shots and 1 queries"),
    ("--device", "pmc", "Did you mean 'pcm'"),
    ("--device", "spread:-1", "not negative"),
    ("--age", "soon", "An age is"),
    ("--data", "nowhere", "nowhere/test is no folder"),
    ("--data", "omniglot", "--data-root"),
    ("--split", "vinyls", "vinyals"),
    ("--workers", "-1", "workers must be 0"),
    ("--prototypes", "none.safetensors", "No file none.safetensors"),
    ("--out", "/proc/o", "Cannot write into"),
    ("--task", "0x1", "ways must be 1 or more"),
    ("--episodes", "0", "episodes must be 1 or more"),
    ("--data", "colour", "channel"),
]


@pytest.mark.parametrize(("option", "value", "says"), BAD_TEST)
def test_a_test_that_cannot_be_is_refused_in_a_line(
    option, value, says, here, command, monkeypatch
):
    monkeypatch.delenv("EVENKEEL_DATA", raising=False)
    for kind in KINDS:
        for k in range(4):
            draw(Path("colour", "test", kind, f"{k}.png"), np.full((32, 32, 3), [k, 9, 99]))
    code, out, err = command(*instead(option, value, ASK))
    said = " ".join((out + err).split())
    assert code == 2
    assert says in said
    assert "Traceback" not in said


def test_a_controller_that_is_none_is_refused(here, command):
    Path("bomb.safetensors").write_bytes(b"\x80\x04")
    save_file({"x": torch.zeros(3)}, "bare.safetensors")
    for name, says in (("bomb", "is a pickle"), ("bare", "not the code"), ("none", "No file")):
        code, _, err = command("test", f"{name}.safetensors", *ASK[2:])
        assert code == 2
        assert err.startswith("error: ")
        assert len(err.strip().splitlines()) == 1
        assert says in err


def test_the_picture_shows_images_as_they_are(here, command):
    for ink in (True, False):
        arguments = [a for a in ASK if ink or a != "--ink"]
        assert command(*arguments, "--device", "pcm", "--code", "real", "--age", "0")[0] == 0
        coded = Path("o/episode.svg").read_text().split("base64,")[1].split('"')[0]
        with Image.open(io.BytesIO(base64.b64decode(coded))) as image:
            assert np.asarray(image).mean() > 128  # a dark drawing on white paper


def test_no_workers_means_in_this_process(here, command):
    assert command(*instead("--workers", "0", ASK), threads=False)[0] == 0


@pytest.mark.parametrize(
    "device",
    [
        "spread:0.2 spread:0.4",
        "pcm",
    ],
)
def test_one_episode_has_no_interval_and_the_rest_is_written(device, here, command):
    def refuse(text):
        raise AssertionError(text)

    arguments = (*instead("--episodes", "1", ASK), "--json", "f.json", "--code", "real")
    assert command(*arguments, "--device", *device.split())[0] == 0
    json.loads(Path("f.json").read_text(), parse_constant=refuse)


BAD_TRAIN = [
    ("--objective", "sofabs", "Did you mean 'softabs'"),
    ("--ways", "17", "An episode of 17 ways"),
    ("--shots", "16", "16 shots and 2 queries"),
    ("--queries", "0", "queries must be 1 or more"),
    ("--data", "nowhere", "nowhere/train is no folder"),
    ("--out", "/proc/o/c.safetensors", "Cannot write into"),
    ("--out", "prototypes.out/c.safetensors", "Cannot write into"),
    ("--dim", "many", "many"),
    ("--every", "0", "every must be 1 or more"),
    ("--episodes", "0", "episodes must be 1 or more"),
    ("--learning-rate", "-1", "learning"),
    ("--dim", "-3", "dim must be 1 or more"),
    ("--channels", "0", "channels must be 1 or more"),
    ("--precision", "33", "32-true"),
]


@QUIET
@pytest.mark.parametrize(("option", "value", "says"), BAD_TRAIN)
def test_a_training_that_cannot_be_is_refused_in_a_line(option, value, says, here, command):
    arguments = ("train", "--out", "c.safetensors", *TINY)
    code, out, err = command(*instead(option, value, arguments))
    said = " ".join((out + err).split())
    assert code == 2
    assert says in said
    assert "Traceback" not in said


@QUIET
def test_a_controller_is_not_overwritten_by_its_log(here, command):
    code, _, _ = command("train", "--out", "c.json", *TINY)
    assert code == 2 or ek.load("c.json")


@QUIET
def test_a_folder_as_the_controllers_file_is_refused_at_once(here, command):
    Path("folder").mkdir()
    code, _, err = command("train", "--out", "folder", *TINY)
    assert code == 2
    assert not Path("folder.json").exists(), err
