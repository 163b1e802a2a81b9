"""The frame of studies: what is finished stands. And the parts of the noise-aware study."""

import json
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize

import evenkeel as ek
from evenkeel import models, studies
from evenkeel.audit import names
from evenkeel.audit.names import import_from, resolve
from evenkeel.audit.plan import parse_age
from evenkeel.audit.remedy import as_row
from evenkeel.audit.summary import summarize
from evenkeel.cli import main
from evenkeel.errors import ConfigError
from evenkeel.layers import running_normalizers, weight_layer
from evenkeel.studies import SCALES, STUDIES, Desk, Part, Study, frame, run
from evenkeel.studies import training as runs
from evenkeel.studies.batch_channel import training
from evenkeel.studies.equi_norm.training import trained as trained_balanced
from evenkeel.studies.frame import as_lines, cells_of
from evenkeel.studies.kalman.calibration import few_images, predict_
from evenkeel.studies.kalman.estimates import distances
from evenkeel.studies.noise_aware import harden, study
from evenkeel.studies.noise_aware.harden import CLIP, InjectedNoise, hardened_network
from evenkeel.studies.noise_aware.stream import aged, served
from evenkeel.train import fit


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """Work is done in a thread of this process."""
    monkeypatch.setattr(frame, "local_processes", lambda workers, label: ThreadPoolExecutor(1))
    (tmp_path / "cache").mkdir()
    return Desk("digits", None, tmp_path / "networks", tmp_path / "cache")


class Interrupted(Exception):  # noqa: N818
    pass


class Bench:
    """A study of three parts that counts how often each was worked on."""

    def __init__(self):
        self.worked: list[str] = []
        self.drawn: list[dict] = []
        self.fail: str | None = None
        self.networks: tuple[str, ...] = ()
        self.version = 1
        self.settings = {"a": {"chips": 2}, "b": {"rate": 0.5, "cells": [["x", "0"]]}, "c": {}}

    def study(self) -> Study:
        data = dict.fromkeys(SCALES, "digits")
        return Study("mine", data, self.parts, self.draw, self.version)

    def parts(self, scale):
        return [
            Part(n, f"What of {n}?", self._work(n), s, self.networks)
            for n, s in self.settings.items()
        ]

    def _work(self, name):
        def work(desk, settings):
            self.worked.append(name)
            if self.fail == name:
                raise Interrupted
            return {"of": name, "cells": [{"n": 1}, {"n": 2}], "settings": settings}

        return work

    def draw(self, done, folder):
        self.drawn.append(done)
        (folder / "picture.svg").write_text("<svg/>")
        return [folder / "picture.svg"]


@pytest.fixture
def bench():
    return Bench()


def go(bench, desk, tmp_path, **options):
    given = {"command": "evenkeel study mine", **options}
    return run(bench.study(), "smoke", desk, tmp_path / "out", **given)


# ---- the frame


def test_every_part_has_a_file_with_all_that_one_needs_to_repeat_it(bench, desk, tmp_path):
    files = go(bench, desk, tmp_path)
    folder = tmp_path / "out" / "mine" / "smoke"
    assert files == [*(folder / f"{n}.json" for n in "abc"), folder / "picture.svg"]
    assert all(path.exists() for path in files)
    known = json.loads((folder / "b.json").read_text())
    assert {
        "study", "part", "about", "scale", "command", "data", "environment", "seconds", "settings",
        "networks", "study_version",
    } == set(known) - {"figures"}  # fmt: skip
    assert list(known)[-1] == "figures"
    assert (known["study"], known["part"], known["about"]) == ("mine", "b", "What of b?")
    assert (known["scale"], known["data"]) == ("smoke", "digits")
    assert known["command"] == "evenkeel study mine"
    assert known["settings"] == bench.settings["b"]
    assert known["figures"] == {
        "of": "b", "cells": [{"n": 1}, {"n": 2}], "settings": bench.settings["b"],
    }  # fmt: skip
    assert known["seconds"] >= 0
    assert known["environment"]["torch"] == torch.__version__
    assert known["environment"]["evenkeel"]
    assert {"commit", "python", "platform", "cores"} <= set(known["environment"])
    assert bench.drawn == [{n: json.loads((folder / f"{n}.json").read_text())["figures"]
                            for n in "abc"}]  # fmt: skip


def test_what_is_finished_stands(bench, desk, tmp_path):
    first = [path.read_bytes() for path in go(bench, desk, tmp_path)]
    again = [path.read_bytes() for path in go(bench, desk, tmp_path, command="another")]
    assert bench.worked == ["a", "b", "c"]
    assert again == first
    assert bench.drawn[0] == bench.drawn[1]


def test_an_interrupted_study_goes_on_with_the_part_it_was_in(bench, desk, tmp_path):
    bench.fail = "b"
    with pytest.raises(Interrupted):
        go(bench, desk, tmp_path)
    folder = tmp_path / "out" / "mine" / "smoke"
    assert [p.name for p in folder.iterdir()] == ["a.json"]
    assert not bench.drawn
    bench.fail = None
    go(bench, desk, tmp_path)
    assert bench.worked == ["a", "b", "b", "c"]


def test_other_settings_make_the_part_be_done_again(bench, desk, tmp_path):
    go(bench, desk, tmp_path)
    bench.settings["b"] = {"rate": 0.25, "cells": [["x", "0"]]}
    go(bench, desk, tmp_path)
    assert bench.worked == ["a", "b", "c", "b"]
    known = json.loads((tmp_path / "out" / "mine" / "smoke" / "b.json").read_text())
    assert known["settings"]["rate"] == known["figures"]["settings"]["rate"] == 0.25


def test_another_network_data_set_or_version_make_all_be_done_again(bench, desk, tmp_path):
    desk.networks.mkdir()
    network = desk.networks / "n.safetensors"
    network.write_text("first")
    bench.networks = ("n.safetensors",)
    bench.settings = {"a": {}}
    go(bench, desk, tmp_path)
    go(bench, desk, tmp_path)
    assert bench.worked == ["a"]
    network.write_text("second")
    go(bench, desk, tmp_path)
    assert bench.worked == ["a"] * 2
    bench.version = 2
    go(bench, desk, tmp_path)
    assert bench.worked == ["a"] * 3
    desk.data_name = "mnist"
    go(bench, desk, tmp_path)
    assert bench.worked == ["a"] * 4
    go(bench, desk, tmp_path)
    assert bench.worked == ["a"] * 4


def test_settings_may_hold_tuples(bench, desk, tmp_path):
    bench.settings["a"] = {"ages": ("0", "1d")}
    go(bench, desk, tmp_path)
    go(bench, desk, tmp_path)
    assert bench.worked == ["a", "b", "c"]


def test_each_scale_has_a_folder_of_its_own(bench, desk, tmp_path):
    for scale in SCALES:
        run(bench.study(), scale, desk, tmp_path / "out", command="")
    assert bench.worked == ["a", "b", "c"] * 3
    assert sorted(p.name for p in (tmp_path / "out" / "mine").iterdir()) == sorted(SCALES)


def test_only_some_parts(bench, desk, tmp_path):
    files = go(bench, desk, tmp_path, only=["c", "a"])
    assert bench.worked == ["a", "c"]
    assert [p.name for p in files] == ["a.json", "c.json", "picture.svg"]
    assert list(bench.drawn[0]) == ["a", "c"]
    bench.settings["a"] = {"chips": 3}
    go(bench, desk, tmp_path, only=["b"])  # what is stale is not redone unasked, nor drawn
    assert bench.worked == ["a", "c", "b"]
    assert list(bench.drawn[1]) == ["b", "c"]


def test_an_unknown_part_is_an_error_before_any_work(bench, desk, tmp_path):
    with pytest.raises(ConfigError, match=r"no part 'd'; it has a, b, c"):
        go(bench, desk, tmp_path, only=["a", "d"])
    assert not bench.worked
    assert not (tmp_path / "out").exists()


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["evenkeel", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    captured = capsys.readouterr()
    return left.value.code or 0, " ".join((captured.out + captured.err).split())


def test_the_command_on_a_study(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies, "STUDIES", {"mine": "somewhere:STUDY"})
    monkeypatch.setattr(names, "import_from", lambda text: bench.study())
    code, said = command(monkeypatch, capsys, "study", "mine", "--scale", "smoke", "--part", "b")
    assert code == 0
    assert "b.json" in said
    assert bench.worked == ["b"]
    known = json.loads((tmp_path / "results" / "mine" / "smoke" / "b.json").read_text())
    assert known["command"] == "evenkeel study mine --scale smoke --part b"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["noise_awar"], "Unknown study 'noise_awar'. Did you mean 'noise_aware'"),
        (["noise_aware", "--part", "gauss"], "no part 'gauss'; it has gaussian,"),
        (["noise_aware", "--scale", "large"], "large"),
        (["noise_aware", "--out", "/proc/studies"], "Cannot write into"),
    ],
)
def test_bad_input_to_the_command(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = command(monkeypatch, capsys, "study", *arguments)
    assert code == 2
    assert says in said
    assert "Traceback" not in said


def test_a_missing_network_says_where_it_comes_from(desk):
    with pytest.raises(ConfigError, match="evenkeel train RECIPE"):
        desk.audit(Path("none.safetensors"), "nothing")


# ---- items that are kept


def test_each_item_is_run_once_and_kept(desk):
    ran, shown = [], []
    desk.progress = lambda *facts: shown.append(facts)

    def work(n, where=None):
        ran.append(n)
        return {"square": n * n}

    items = [{"n": 3}, {"n": 1, "where": Path("a")}, {"n": 2}]
    assert desk.each(work, items, "squares") == [{"square": 9}, {"square": 1}, {"square": 4}]
    assert sorted(ran) == [1, 2, 3]
    assert shown == [("squares", k, 3) for k in range(4)]
    ran.clear()
    shown.clear()
    more = [{"n": 2}, {"n": 5}, *items[:1], {"n": 1, "where": Path("b")}]
    assert [r["square"] for r in desk.each(work, more, "squares")] == [4, 25, 9, 1]
    assert sorted(ran) == [1, 5]  # another setting makes another item
    assert shown[0] == ("squares", 2, 4)
    ran.clear()
    desk.version = 2
    desk.each(work, [{"n": 5}], "squares")
    assert ran == [5]  # the study has come to mean something else


def test_items_that_were_finished_outlive_a_failure(desk):
    ran, broken = [], {3}

    def work(n):
        ran.append(n)
        if n in broken:
            raise Interrupted
        return {"n": n}

    items = [{"n": n} for n in range(6)]
    with pytest.raises(Interrupted):
        desk.each(work, items, "items")
    kept = [n for n in ran if n < 3]
    assert kept == [0, 1, 2]
    ran.clear()
    broken.clear()
    assert desk.each(work, items, "items") == items
    assert not set(ran) & set(kept)
    assert 3 in ran


def test_what_waits_is_called_off_when_an_item_fails(desk, monkeypatch):
    ran, go_on = [], threading.Event()

    def work(n):
        ran.append(n)
        if n == 0:
            raise Interrupted
        go_on.wait(5)
        return {}

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(frame, "local_processes", lambda workers, label: pool)
        with pytest.raises(Interrupted):
            desk.each(work, [{"n": n} for n in range(50)], "items")
        go_on.set()
    assert len(ran) <= 2


def test_different_work_on_the_same_items_is_kept_apart(desk):
    def one(n):
        return {"one": n}

    def two(n):
        return {"two": n}

    assert desk.each(one, [{"n": 1}], "") == [{"one": 1}]
    assert desk.each(two, [{"n": 1}], "") == [{"two": 1}]


def test_items_run_in_real_processes(tmp_path):
    desk = Desk("digits", None, tmp_path, tmp_path, workers=1)

    def work(n):
        return {"n": n, "threads": torch.get_num_threads()}

    assert desk.each(work, [{"n": 2}, {"n": 1}], "") == [
        {"n": 2, "threads": 1}, {"n": 1, "threads": 1},
    ]  # fmt: skip


def test_an_audit_at_the_desk_is_kept_trial_by_trial(desk, network):
    desk.networks.mkdir()
    desk.workers = 0
    ek.save(network, desk.networks / "n.safetensors")
    options = {"test_samples": 100, "devices": ["gaussian:0.1"], "chips": 2}
    shown = []
    desk.progress = lambda *facts: shown.append(facts)
    path = desk.networks / "n.safetensors"
    facts = desk.audit(path, "sweep", remedies=["none"], **options)
    assert facts["test_samples"] == 100
    assert facts["calibration_samples"] == 512
    assert facts["seeds"] == [0, 1]
    assert [c["remedy"] for c in facts["cells"]] == ["none"]
    assert shown[0] == ("sweep", 0, 2)
    shown.clear()
    more = desk.audit(path, "sweep", remedies=["none", "clip"], **options)
    assert shown[0] == ("sweep", 2, 4)
    assert more["cells"][0]["chips"] == facts["cells"][0]["chips"]
    assert desk.data().test_samples == 600
    assert len(desk.training_data()[0]) == 1197


# ---- the files


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": []},
        {"a": {}},
        {"a": None, "b": True, "c": "é\n\"'", "d": -0.5},
        {"a": [1, 2, [3, 4]], "b": (5, 6)},
        {"a": [{"b": 1}, {"b": [{"c": {}}, {"c": [1.25]}]}]},
        {"a": {"b": {"c": [{"d": 1}]}}, "e": [[{"f": 1}], []]},
        {"a": [{"b": [1, 2]}, 3, "x", None]},
        {1: {2: "x"}},
    ],
)
def test_lines_are_json(value):
    assert json.loads(as_lines(value)) == json.loads(json.dumps(value))


def test_each_entry_of_a_list_of_objects_has_a_line():
    text = as_lines({"cells": [{"a": 1, "b": {"c": 2}}, {"a": 3}], "list": [1, 2], "n": {"x": 1}})
    assert text.splitlines() == [
        "{", ' "cells": [', '  {"a": 1, "b": {"c": 2}},', '  {"a": 3}', " ],",
        ' "list": [1, 2],', ' "n": {"x": 1}', "}",
    ]  # fmt: skip


def test_figures_have_four_decimals(bench, desk, tmp_path):
    bench.settings = {"a": {"third": 1 / 3, "list": [2 / 3, (1 / 3,)], "large": 12345.678912}}
    go(bench, desk, tmp_path)
    known = json.loads((tmp_path / "out" / "mine" / "smoke" / "a.json").read_text())
    assert known["settings"]["third"] == 1 / 3  # what it was made of is kept whole
    assert known["figures"]["settings"] == {
        "third": 0.3333, "list": [0.6667, [0.3333]], "large": 12345.6789,
    }  # fmt: skip


def cell(remedy, value, *, level=None, age_s=0.0, reference=None, device="D"):
    chips = {0: value, 1: value + 1, 10: value - 1}
    return summarize(
        device=device, level=level, family=device, age_s=age_s, remedy=remedy, chips=chips,
        reference=reference, digital=99.0, floor=None,
    )  # fmt: skip


def test_cells_come_back_from_a_file():
    cells = [cell("none", 90.0), cell("x", 95.0, reference={0: 90.0, 1: 91.0, 10: 89.0})]
    kept = json.loads(as_lines({"cells": [c.to_dict() for c in cells]}))
    back = cells_of(kept)
    assert [c.remedy for c in back] == ["none", "x"]
    assert back[0].chips == {0: 90.0, 1: 91.0, 10: 89.0}
    assert back[1].gain == pytest.approx(5.0)
    assert back[1].half_width == pytest.approx(cells[1].half_width, abs=1e-3)


# ---- the noise-aware study


@pytest.mark.parametrize("scale", SCALES)
def test_the_parts_of_the_study(scale):
    parts = study.parts(scale)
    found = [part.name for part in parts]
    assert len(set(found)) == len(found)
    assert {
        "gaussian", "pcm", "stuck_at", "log_normal", "gain", "norm_group", "norm_none", "online",
        "ageing", "hardened", "reads", "headline",
    } == set(found)  # fmt: skip
    assert all(part.about for part in parts)
    for part in parts:
        assert json.loads(json.dumps(part.settings)) == part.settings
        kept = json.loads(as_lines({"settings": part.settings}))
        assert kept["settings"] == part.settings  # as a file gives it back
        for device in part.settings.get("devices", ()):
            resolve("devices", device)
        for device, age in part.settings.get("cells", ()):
            assert resolve("devices", device).ages or age == "0"
            parse_age(age)
        for device, age, batch, chips in part.settings.get("runs", ()):
            assert resolve("devices", device).ages or age == "0"
            parse_age(age)
            assert batch > 1
            assert chips > 1
        rows = [as_row(remedy) for remedy in part.settings.get("remedies", ())]
        net = models.build("resnet8_digits", norm=part.settings.get("network", "batch"))
        assert [row.why_not(net) for row in rows] == [None] * len(rows)
        assert len({row.name for row in rows}) == len(rows)
    assert set(study.STUDY.data) == set(study.SIZES) == set(SCALES)
    assert import_from(STUDIES["noise_aware"]) is study.STUDY


def test_the_published_scale_has_what_was_promised():
    parts = {part.name: part.settings for part in study.parts("full")}
    assert {"gaussian:0.02", "gaussian:0.05", "gaussian:0.1", "gaussian:0.15"} <= set(
        parts["gaussian"]["devices"]
    )
    assert {"log_normal:0.2", "log_normal:0.4"} <= set(parts["log_normal"]["devices"])
    assert {"gain:0.7", "gain:0.4"} <= set(parts["gain"]["devices"])
    assert parts["stuck_at"]["devices"]
    assert parts["pcm"]["devices"] == ["pcm"]
    assert parts["pcm"]["ages"] == ["0", "1h", "1d", "1mo", "1y"]
    for family in ("gaussian", "log_normal", "gain", "stuck_at", "pcm"):
        settings = parts[family]
        assert (settings["chips"], settings["test_samples"]) == (16, 2000)
        assert settings["epochs"] == 0  # published networks
        assert {
            "none", "clip", "pooled", "online", "calibrate:adabs:gate=false", "calibrate",
            "calibrate:samples=32", "match+calibrate", "match+clip+calibrate",
        } < set(settings["remedies"])  # fmt: skip
        assert family == "pcm" or settings["ages"] == ["0"]
    assert {"drift", "match+drift+calibrate"} < set(parts["pcm"]["remedies"])
    assert (parts["headline"]["chips"], parts["headline"]["test_samples"]) == (16, 10_000)
    assert ["gaussian:0.1", "0"] in parts["headline"]["cells"]
    assert ["pcm", "1d"] in parts["headline"]["cells"]
    assert parts["online"]["stream"] == 10_000
    assert {(run[0], run[1]) for run in parts["online"]["runs"]} == {
        ("gaussian:0.1", "0"), ("pcm", "1d"),
    }  # fmt: skip
    files = {part.name: tuple(part.networks) for part in study.parts("full")}
    assert all(files.values())  # a network trained anew makes all of it be done anew
    assert files["norm_none"] == ("resnet14_none.safetensors",)
    ageing = parts["ageing"]
    assert ageing["warm_up"] + ageing["steps"] * ageing["samples"] <= 10_000
    for norm in ("group", "none"):
        assert parts[f"norm_{norm}"]["network"] == norm
        assert (parts[f"norm_{norm}"]["chips"], parts[f"norm_{norm}"]["test_samples"]) == (16, 2000)
    assert {"calibrate:samples=16", "calibrate:samples=16:reads=8"} < set(
        parts["reads"]["remedies"]
    )


def test_pictures_and_tables_are_drawn_of_what_is_done(tmp_path):
    def sweep(cells):
        facts = {"digital": 99.0, "test_samples": 100, "calibration_samples": 50}
        return facts | {"cells": [c.to_dict() for c in cells]}

    raw = {0: 90.0, 1: 91.0, 10: 89.0}
    gaussian = [
        cell(remedy, value, level=level, device=f"Gaussian({level})", reference=reference)
        for level in (0.1, 0.2)
        for remedy, value, reference in (("none", 90.0, None), ("calibrate", 97.0, raw))
    ]
    done = json.loads(json.dumps({"gaussian": sweep(gaussian), "pcm": sweep(gaussian[:1])}))
    files = study.STUDY.draw(done, tmp_path)
    assert [path.name for path in files] == ["tables.md", "gaussian.svg"]  # one point is no line
    text = files[0].read_text()
    assert "## gaussian" in text
    assert "| calibrate | 97.0 (96.0) | 97.0 (96.0) |" in text
    assert files[1].read_text().startswith("<svg")


# ---- hardening


def test_injected_noise_has_the_level_asked_for_and_passes_the_gradient():
    w = torch.randn(200, 300, requires_grad=True)
    layer = InjectedNoise(0.08).train()
    limit = CLIP * float(w.detach().std(correction=0))
    clipped = w.detach().clamp(-limit, limit)
    noisy = layer(w)
    noise = (noisy - clipped).detach() / clipped.abs().max()
    assert float(noise.mean()) == pytest.approx(0, abs=5 * 0.08 / math.sqrt(60_000))
    assert float(noise.std()) == pytest.approx(0.08, rel=0.02)
    assert float((noise / 0.08).pow(4).mean()) == pytest.approx(3, rel=0.05)  # normal
    assert float(torch.corrcoef(torch.stack([noise.flatten(), w.detach().flatten()]))[0, 1]) < 0.02
    assert not torch.equal(layer(w), noisy)  # new at each step
    upstream = torch.randn_like(w)
    (noisy * upstream).sum().backward()
    inside = w.detach().abs() < limit
    assert torch.equal(w.grad[inside], upstream[inside])  # straight through
    assert not w.grad[~inside].any()
    assert 0.005 < float((~inside).float().mean()) < 0.02


def test_injected_noise_only_clips_in_eval_mode():
    w = torch.randn(50, 60)
    layer = InjectedNoise(0.5).eval()
    limit = CLIP * float(w.std(correction=0))
    torch.testing.assert_close(layer(w), w.clamp(-limit, limit), rtol=0, atol=1e-6)
    assert torch.equal(layer(w), layer(w))


@pytest.fixture
def plain(desk):
    desk.networks.mkdir()
    torch.manual_seed(0)
    net = models.build("resnet8_digits").eval()
    ek.save(net, desk.networks / "plain.safetensors")
    return desk.networks / "plain.safetensors"


def test_a_hardened_network_is_trained_once_and_left_plain(desk, plain, monkeypatch):
    x, y = ek.data.digits().train
    monkeypatch.setattr(desk, "training_data", lambda: (x[:256], y[:256]))
    seen = []
    fit = harden.fit

    def watched(make, *data, **options):
        net = make()
        layers = [m for m in net.modules() if parametrize.is_parametrized(m, "weight")]
        seen.append((len(layers), {p.level for m in layers for p in m.parametrizations.weight}))
        return fit(make, *data, **options)

    monkeypatch.setattr(harden, "fit", watched)
    path, minutes = hardened_network(desk, plain, "gaussian:0.08", 1)
    assert path.parent == desk.cache
    assert 0 < minutes < 1
    weighted = [m for m in ek.load(plain).modules() if weight_layer(m) is not None]
    assert seen == [(len(weighted), {0.08})]  # every layer that goes onto an array
    net = ek.load(path)
    for module in net.modules():
        assert not parametrize.is_parametrized(module)
        if weight_layer(module) is not None:
            assert module.weight.is_contiguous()
            assert module.weight.abs().max() <= 1.001 * CLIP * _std_before_clip(module.weight)
    assert hardened_network(desk, plain, "gaussian:0.08", 1) == (path, minutes)
    assert len(seen) == 1
    other, _ = hardened_network(desk, plain, "gaussian:0.04", 1)
    assert other != path
    assert seen[1][1] == {0.04}


def _std_before_clip(weight):
    """At least that of the clipped weights; clipping at 2.5 deviations takes 6 % off at most."""
    return 1.06 * weight.std(correction=0)


# ---- a chip that serves


def test_a_served_stream_of_digits(network, data, tmp_path):
    path = tmp_path / "n.safetensors"
    ek.save(network, path)
    facts = served(path, "digits", None, "gain:0.4", "0", 3, 20, 80)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["device"], facts["age"], facts["seed"]) == ("Gain(0.4)", "0", 3)
    x = torch.cat([b[0] for b in data.test])[:80]
    y = torch.cat([b[1] for b in data.test])[:80]
    chip = ek.analog.program(network, ek.analog.Gain(0.4), seed=3)

    def right(model):
        return 100 * float((model(x[40:]).argmax(1) == y[40:]).float().mean())

    assert facts["raw"] == pytest.approx(right(chip))
    ek.calibrate_(chip, data.calibration)
    assert facts["calibrated"] == pytest.approx(right(chip))
    assert facts["online"] > facts["raw"] + 20
    assert [row["class"] for row in facts["one_class"]] == sorted(set(y.tolist()))
    assert [row["samples"] for row in facts["one_class"]] == [
        int((y == c).sum()) for c in sorted(set(y.tolist()))
    ]
    assert served(path, "digits", None, "gain:0.4", "0", 3, 20, 80) == facts
    kept = frame.load_network(path)
    assert not any(isinstance(m, ek.norm.NoiseAwareBatchNorm) for m in kept.modules())


def test_a_chip_that_ages_while_it_serves(network, tmp_path):
    path = tmp_path / "n.safetensors"
    ek.save(network, path)
    facts = aged(path, "digits", None, seed=1, warm_up=100, steps=3, samples=40, batch=20)
    assert json.loads(json.dumps(facts)) == facts
    ages = facts["ages_s"]
    assert ages == pytest.approx([60, (60 * 2629746) ** 0.5, 2629746])  # even in log time
    for name in ("online", "frozen", "online_after_a_jump"):
        assert len(facts[name]) == 3
        assert all(0 <= value <= 100 for value in facts[name])
    assert not any(m.training for m in frame.load_network(path).modules())


# ---- what a reviewer broke


def test_a_missing_network_of_a_part_says_where_it_comes_from(bench, desk, tmp_path):
    bench.networks = ("none.safetensors",)
    with pytest.raises(ConfigError, match="evenkeel train RECIPE"):
        go(bench, desk, tmp_path)


def test_settings_of_more_than_four_decimals_stand_too(bench, desk, tmp_path):
    bench.settings = {"a": {"learning_rate": 0.00025, "cells": [{"x": 1 / 3}]}}
    go(bench, desk, tmp_path)
    go(bench, desk, tmp_path)
    assert bench.worked == ["a"]
    known = json.loads((tmp_path / "out" / "mine" / "smoke" / "a.json").read_text())
    assert known["settings"]["learning_rate"] == 0.00025


def test_an_item_whose_file_has_changed_is_run_again(desk, tmp_path):
    ran = []
    path = tmp_path / "network"

    def work(network):
        ran.append(Path(network).read_text())
        return {}

    for content in ("first", "second", "second"):
        path.write_text(content)
        desk.each(work, [{"network": path}], "")
    assert ran == ["first", "second"]


def test_a_file_of_a_part_that_was_damaged_is_made_again(bench, desk, tmp_path):
    go(bench, desk, tmp_path)
    path = tmp_path / "out" / "mine" / "smoke" / "b.json"
    path.write_text(path.read_text()[:100])
    go(bench, desk, tmp_path)
    assert bench.worked == ["a", "b", "c", "b"]


# ---- batch_channel


def run_of(desk, **changed):
    options = {
        "data": "digits",
        "root": None,
        "cache": desk.cache,
        "architecture": "resnet8_digits",
        "norm": "batch_channel",
        "weight_standard": False,
        "normalization_batch": None,
        "seed": 0,
        "epochs": 2,
        "samples": 256,
        "batch_size": 64,
        "learning_rate": 0.1,
        "precision": "32-true",
        "watched": True,
    }
    return training.trained(**(options | changed))


def test_a_training_run_tells_errors_and_dead_units(desk):
    run_ = run_of(desk)
    first, last = run_["epochs"]
    assert (first["epoch"], last["epoch"]) == (1, 2)
    assert 0 <= last["error"] <= 100
    assert {row["kind"] for row in last["layers"]} == {"BatchChannelNorm2d", "relu"}
    assert "layers" not in run_of(desk, watched=False, epochs=1)["epochs"][0]


def test_a_training_run_takes_its_update_rate(desk, monkeypatch):
    seen = []
    watched = runs.error

    def noted(network, *given):
        seen.append({m.update_rate for m in network.modules() if hasattr(m, "update_rate")})
        return watched(network, *given)

    monkeypatch.setattr(runs, "error", noted)
    for rate in (None, 0.01):
        run_of(desk, norm="batch_channel_running", update_rate=rate, epochs=1, watched=False)
    assert seen == [{0.1}, {0.01}]


def test_a_killed_training_run_ends_as_one_that_was_not(desk, tmp_path, monkeypatch):
    whole = run_of(desk, epochs=3, watched=False)
    (tmp_path / "other").mkdir()
    later = runs.error

    def dies(*given):
        if list((tmp_path / "other").glob("*.checkpoint")):
            raise Interrupted
        return later(*given)

    monkeypatch.setattr(runs, "error", dies)
    with pytest.raises(Interrupted):
        run_of(desk, epochs=3, watched=False, cache=tmp_path / "other")
    monkeypatch.setattr(runs, "error", later)
    again = run_of(desk, epochs=3, watched=False, cache=tmp_path / "other")
    told = [[(e["epoch"], e["loss"], e["error"]) for e in r["epochs"]] for r in (whole, again)]
    assert told[0] == told[1]


def test_displaced_norms_are_displaced():
    network = models.build("resnet8_digits").train()
    training.displace_(network, 2.0, 0.5, seed=1)
    x = 5 + 3 * torch.randn(200, 1, 8, 8)
    found = ek.norm.singularity(network, [x]).rows  # eval mode: running statistics are new
    assert all(row.kind in ("Displaced", "relu", "BatchNorm2d") for row in found)
    layer = network.stem[1]
    y = layer.train()(torch.randn(256, 16, 4, 4) * 3 + 1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.mean(1), layer.shift.flatten(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y.std(1), layer.scale.flatten(), atol=1e-2, rtol=1e-3)
    assert float(layer.shift.std()) > 1


def test_the_toy_of_the_batch_channel_study(desk, tmp_path):
    paths = run(
        names.import_from(STUDIES["batch_channel"]),
        "smoke",
        desk,
        tmp_path / "out",
        command="",
        only=["toy"],
    )
    figures = json.loads(paths[0].read_text())["figures"]
    assert figures["GN"]["dead"] > 0.05
    assert figures["BCN"]["dead"] == figures["BCN running"]["dead"] == figures["BN"]["dead"] == 0
    assert figures["BCN"]["mean"] < 0.01 < 0.3 < figures["GN"]["mean"]
    assert "| GN |" in paths[-1].read_text()


# ---- equi_norm


@pytest.fixture
def equi_norm(desk, tmp_path):
    """Parts of the study at its smallest, as files."""
    study = import_from(STUDIES["equi_norm"])

    def done(*parts):
        frame.run(study, "smoke", desk, tmp_path / "out", command="it", only=parts)
        folder = tmp_path / "out" / "equi_norm" / "smoke"
        return [
            json.loads((folder / f"{part}.json").read_text())["figures"] for part in parts
        ], folder

    return done


def test_the_solver_takes_few_rounds(equi_norm):
    (figures,), folder = equi_norm("rounds")
    for chain in figures["runs"]:
        assert chain["rounds"]["layer by layer"] <= 8
        assert chain["rounds"]["simultaneous"] <= 20
        assert max(chain["excess"].values()) <= 1e-8
    assert "| 7 | 64 |" in (folder / "tables.md").read_text()


def test_balance_is_measured_on_arrays_and_in_training(equi_norm):
    (arrays, dense, residual), folder = equi_norm("analog", "dense_0", "residual_0")
    assert {cell["remedy"] for cell in arrays["cells"]} >= {"none", "balance", "balance:arrays"}
    assert [one["method"] for one in dense["runs"]][:2] == ["baseline", "BN"]
    assert all(0 <= one["epochs"][-1]["error"] <= 100 for one in residual["runs"])
    text = (folder / "tables.md").read_text()
    assert all(f"## {part}" in text for part in ("analog", "dense", "residual"))
    assert {p.name for p in folder.glob("*.svg")} == {"dense.svg", "residual.svg"}


def test_balanced_training_is_another_training(desk):
    options = {
        "data": "digits", "root": None, "cache": desk.cache, "norm": "none", "seed": 0,
        "network": {"intermediate": 2, "width": 50}, "epochs": 2, "samples": 512, "batch_size": 64,
        "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "augment": False,
        "precision": "32-true",
    }  # fmt: skip
    runs = [trained_balanced(**options, depth_factor=c)["epochs"] for c in (None, 1.2, 1.2)]
    told = [[(e["loss"], e["error"]) for e in one] for one in runs]
    assert told[1] == told[2] != told[0]
    assert runs[1][-1]["error"] < 60


# ---- kalman


def test_the_kalman_study(desk, tmp_path):
    study = import_from(STUDIES["kalman"])
    parts = ["cost", "estimates", "accuracy_0"]
    beside = tmp_path / "out" / "batch_channel" / "smoke" / "accuracy_0.json"
    beside.parent.mkdir(parents=True)
    epochs = [{"epoch": 1, "error": 50.0}, {"epoch": 2, "error": 40.0}]
    rows = [{"method": name, "together": 2, "seed": 0, "epochs": epochs} for name in ("BN", "BCN")]
    beside.write_text(json.dumps({"figures": {"runs": rows}}))
    run(study, "smoke", desk, tmp_path / "out", command="it", only=parts)
    folder = tmp_path / "out" / "kalman" / "smoke"
    cost, estimates, accuracy = (
        json.loads((folder / f"{part}.json").read_text())["figures"] for part in parts
    )
    assert all(row["ratio"] > 0 and row["kalman_ms"] > 0 for row in cost["runs"])
    seen = {(r["epoch"], r["size"], r["estimate"]): r["mean"] for r in estimates["rows"]}
    assert all(seen[epoch, 8, "observed"] < seen[epoch, 1, "observed"] for epoch in (0, 1))
    assert {r["together"] for r in accuracy["runs"]} == {2, 128}
    text = (folder / "tables.md").read_text()
    assert "| BN | 40.00 | 8.7 |" in text
    assert "BCN" not in text
    assert {p.name for p in folder.glob("*.svg")} == {"error.svg", "estimates.svg"}


def test_the_oracle_is_of_the_network_as_the_batch_left_it():
    torch.manual_seed(0)
    network = models.build("resnet8_digits")
    pool = torch.randn(80, 1, 8, 8)
    options = {"sizes": [64], "variants": [[1.0, "observed"]], "batches": 1}
    rows = distances(network, torch.cat([pool[:64], pool[:64]]), oracle=64, **options)
    observed = next(r for r in rows if r["estimate"] == "observed")  # of the oracle's own samples
    assert max(observed["mean"], observed["log_var"]) < 1e-4


def test_a_chip_by_a_handful_of_images(desk, tmp_path):
    network = fit(lambda: models.build("resnet8_digits"), *desk.training_data(), epochs=2)
    ek.save(network, tmp_path / "network.safetensors")
    row = few_images(tmp_path / "network.safetensors", "digits", None, 0.1, 0, 16, 100)
    assert list(row["accuracy"]) == ["none", "calibrate", "predicted", "predicted+calibrate"]
    assert all(0 <= value <= 100 for value in row["accuracy"].values())


def test_a_prediction_of_what_the_weights_change(desk):
    x = desk.training_data()
    network = fit(lambda: models.build("resnet8_digits"), *x, epochs=4)
    chip = ek.analog.program(network, ek.analog.Gain(0.8), seed=0)
    before = {p: n.running_var.clone() for p, n in running_normalizers(chip.model)}
    predict_(chip, network, x[0][:64])
    after = dict(running_normalizers(chip.model))
    for path, var in before.items():  # of a layer alone, 0.8 of the weights is 0.64 of the variance
        torch.testing.assert_close(after[path].running_var / var, torch.full_like(var, 0.64))


def test_the_memory_is_measured_on_a_crossbar(desk, tmp_path):
    study = import_from(STUDIES["hd_memory"])
    frame.run(study, "smoke", desk, tmp_path / "out", command="it")
    folder = tmp_path / "out" / "hd_memory" / "smoke"
    software, crossbar, spread, continual = (
        json.loads((folder / f"{part}.json").read_text())["figures"]
        for part in ("software", "crossbar", "spread", "continual")
    )

    def of(rows, **which):
        return [row for row in rows if all(row[key] == value for key, value in which.items())]

    summed = software["sum"]
    for task in ("3-way 1-shot", "5-way 2-shot"):  # the same signs, so the same answers
        bipolar, complement = (of(summed, task=task, code=c) for c in ("bipolar", "complement"))
        assert bipolar[0]["accuracy"] == complement[0]["accuracy"]
    assert {row["age_s"] for row in crossbar["compensated"]} == {0, 3600, 86_400}
    fresh = [
        of(rows, code="binary", age_s=0) for rows in (crossbar["as_read"], crossbar["compensated"])
    ]
    assert fresh[0] == fresh[1]
    assert (
        spread["softmax"][0]["accuracy"]
        == of(spread["softmax"], code="real", device=None)[0]["accuracy"]
    )
    assert [run["device"] for run in continual["runs"]] == [None, None, "pcm"]
    assert all(run["rows"][0]["all"] == 100 for run in continual["runs"])
    text = (folder / "tables.md").read_text()
    assert all(f"## {part}" in text for part in ("software", "crossbar", "spread", "continual"))
    assert {p.name for p in folder.glob("*.svg")} == {"spread.svg", "continual.svg"}


def test_trained_controllers_are_asked_for_by_name(desk, tmp_path):
    study = import_from(STUDIES["hd_memory"])
    with pytest.raises(ConfigError, match=r"controller\.safetensors.*evenkeel fewshot train"):
        frame.run(study, "full", desk, tmp_path / "out", command="it", only=("crossbar",))


def test_parts_that_are_not_asked_for_need_no_networks(desk, tmp_path):
    study = import_from(STUDIES["hd_memory"])
    wanted = desk.networks.parent / "hd_memory" / "controller.safetensors"
    with pytest.raises(ConfigError) as error:
        frame.run(study, "full", desk, tmp_path / "out", command="it", only=("continual",))
    assert str(wanted) in str(error.value)
