"""The studies of dense networks: what they train, what they tell, what they draw."""

import json

import pytest
import torch
from torch import nn

from evenkeel.audit.names import import_from
from evenkeel.data import Data
from evenkeel.errors import ConfigError
from evenkeel.models import build
from evenkeel.saving import read, save
from evenkeel.studies import STUDIES, Desk, frame
from evenkeel.studies.micro_batch import training
from evenkeel.studies.micro_batch.figures import draw
from evenkeel.studies.teaching import TEACHING
from evenkeel.train import recipe
from evenkeel.train.recipe import RECIPES


def blobs(n, side=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    objects = torch.zeros(n, side, side, dtype=torch.int32)
    for k in range(n):
        top, left = torch.randint(4, side - 20, (2,), generator=generator).tolist()
        objects[k, top : top + 16, left : left + 16] = 1
    pixels = (200 * (objects > 0) + torch.randint(0, 50, objects.shape, generator=generator)).byte()
    return pixels[:, None].expand(-1, 3, -1, -1), objects


@pytest.fixture
def nuclei(monkeypatch):
    x, y = blobs(16)
    test = Data("blobs", [(x[:4].float() / 255, y[:4])], [(x[4:8].float() / 255, y[4:8])])
    monkeypatch.setattr(training, "load_training_data", lambda name, root: (x, y))
    monkeypatch.setattr(training, "load_data", lambda name, root: test)
    return test


def settings(tmp_path, **given):
    return {
        "method": "batch", "options": {"norm": "batch"}, "data": "nuclei", "task": "segment",
        "architecture": "unet", "width": 8, "batch_size": 4, "seed": 0, "epochs": 2, "samples": 16,
        "test_samples": 4, "learning_rate": 0.05, "precision": "32-true", "started_at": None,
        "root": None, "cache": tmp_path,
    } | given  # fmt: skip


def test_a_run_tells_settings_losses_and_all_figures(nuclei, tmp_path):
    run = training.trained(**settings(tmp_path))
    assert run["losses"][1] < run["losses"][0]
    assert set(run["figures"]) == {"foreground IoU", "Dice", "object AP", "object AP50"}
    assert (run["batch_size"], run["options"]) == (4, {"norm": "batch"})
    json.dumps(run)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]  # no checkpoint is left


def test_frozen_norms_keep_the_statistics_of_the_run_they_start_at(nuclei, tmp_path, monkeypatch):
    training.trained(**settings(tmp_path))
    (source,) = tmp_path.glob("*.safetensors")
    before, _ = read(source)
    kept = {}
    fit = training.fit

    def seen(make, *args, **options):
        kept["start"] = {k: v.clone() for k, v in make().state_dict().items()}
        kept["end"] = fit(make, *args, **options)
        return kept["end"]

    monkeypatch.setattr(training, "fit", seen)
    frozen = {"method": training.FROZEN, "batch_size": 2, "started_at": 4}
    run = training.trained(**settings(tmp_path, **frozen))
    after = kept["end"].state_dict()
    of_norms = [
        f"network.{path}.{name}"
        for path, module in build("unet", width=8).named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for name in ("weight", "bias", "running_mean", "running_var")
    ]
    assert all(torch.equal(kept["start"][f"network.{k}"], v) for k, v in before.items())
    assert all(torch.equal(after[k], kept["start"][k]) for k in of_norms)
    convolution = "network.classifier.weight"
    assert not torch.equal(after[convolution], kept["start"][convolution])
    assert run["started_at"] == 4


def test_a_network_that_leaves_the_numbers_has_no_figures(nuclei, tmp_path):
    run = training.trained(**settings(tmp_path, learning_rate=1e30, epochs=3))
    assert run["figures"] == {}
    (path,) = draw({"segmentation": {"runs": [run]}}, tmp_path)
    assert "1, 1 diverged" in path.read_text()


def test_the_table_has_a_line_for_each_batch_and_normalizer(nuclei, tmp_path):
    runs = [training.trained(**settings(tmp_path, batch_size=b, epochs=1)) for b in (2, 4)]
    (path,) = draw({"segmentation": {"runs": runs}}, tmp_path)
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| 2", "batch"], ["| 4", "batch"]]


def test_every_method_of_the_study_builds_its_networks():
    methods = import_from(STUDIES["micro_batch"]).parts("full")
    for part in methods:
        for options in part.settings["methods"].values():
            network = build(part.settings["architecture"], width=part.settings["width"], **options)
            assert network(torch.zeros(2, 3, 32, 32)).isfinite().all()


def test_the_learning_rate_follows_the_batch(tmp_path, monkeypatch):
    study = import_from(STUDIES["micro_batch"])
    asked = []
    monkeypatch.setattr(Desk, "each", lambda self, work, items, what: asked.extend(items) or [])
    (part,) = study.parts("small")
    part.work(Desk("nuclei", None, tmp_path, tmp_path), part.settings)
    assert {(item["batch_size"], item["learning_rate"]) for item in asked} == {
        (2, 0.0125), (16, 0.1),
    }  # fmt: skip
    assert {item["started_at"] for item in asked if item["method"] == training.FROZEN} == {16}
    assert len(asked) == 3 * 2 * len(part.settings["methods"])


def test_the_audits_are_of_the_recipes_networks(tmp_path, monkeypatch):
    study = import_from(STUDIES["dense"])
    monkeypatch.setitem(study.data, "smoke", "digits")
    x, y = blobs(12)
    samples = Data("blobs", [(x[:8].float() / 255, y[:8])], [(x[8:].float() / 255, y[8:])],
                   note="Blobs are not nuclei.")  # fmt: skip
    monkeypatch.setattr(frame, "load_data", lambda name, root: samples)
    (tmp_path / "dense").mkdir()
    save(build("unet", width=8), tmp_path / "dense" / "unet.safetensors")
    desk = Desk("nuclei", None, tmp_path / "cifar10", tmp_path / "cache", workers=0)
    written = frame.run(study, "smoke", desk, tmp_path, command="it", only=["segmentation"])
    figures = json.loads(written[0].read_text())["figures"]
    assert figures["notes"][-1] == "Blobs are not nuclei."
    table = written[-1].read_text()
    assert "Blobs are not nuclei." in table
    assert "calibrate" in table
    assert "object AP50" in table


def test_a_recipe_of_each_task_has_its_teaching():
    assert {r.task for r in RECIPES.values()} == set(TEACHING)
    with pytest.raises(ConfigError, match="nuclei"):
        recipe("nuclej")
