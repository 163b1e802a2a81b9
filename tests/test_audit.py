import inspect
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cloudpickle
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import evenkeel as ek
from evenkeel.audit.names import resolve
from evenkeel.audit.plan import age_label, parse_age
from evenkeel.audit.remedy import as_row, fitting_seed
from evenkeel.audit.run import Workload, _compact
from evenkeel.audit.store import Store
from evenkeel.audit.summary import quantile, share_interval, summarize, t_interval
from evenkeel.audit.tasks import Classify, Regress
from evenkeel.audit.verdict import judge
from evenkeel.data import Data, as_data, image_folder
from evenkeel.errors import ConfigError, StoreError

QUICK = {"devices": ["gaussian:0.15"], "chips": 3, "workers": 0}


def run(network, data, store=":memory:", **options):
    return ek.audit(network, data, store=store, **{**QUICK, **options})


# Figures


def test_intervals_are_those_of_scipy():
    values = [91.0, 92.5, 90.2, 93.3]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx((low, high))
    assert t_interval([1.0]) is None
    for good, total in ((0, 7), (3, 7), (7, 7)):
        exact = stats.binomtest(good, total).proportion_ci(0.95, "exact")
        assert share_interval(good, total) == pytest.approx((exact.low, exact.high))
    assert quantile(values, 0.05) == pytest.approx(np.quantile(values, 0.05))
    wilson = stats.binomtest(588, 600).proportion_ci(0.95, "wilson")
    assert Classify().interval(torch.tensor([588.0, 600.0])) == pytest.approx(
        (100 * wilson.low, 100 * wilson.high), abs=1e-4
    )


def cell(chips, reference=None, **options):
    given = {"device": "D", "level": None, "family": "D", "age_s": 0.0, "remedy": "r"}
    return summarize(
        **given, chips=chips, reference=reference, **{"digital": 99.0, "floor": None} | options
    )


def test_a_cell_compares_chip_by_chip():
    c = cell({0: 90.0, 1: 94.0, 2: 85.0}, {0: 80.0, 1: 95.0, 2: 70.0}, floor=90.0)
    assert (c.worst_chip, c.worst) == (2, 85.0)
    assert c.gain == pytest.approx((10 - 1 + 15) / 3)
    assert c.harmed == pytest.approx(1 / 3)
    assert c.recovered == pytest.approx(8 / (99 - 245 / 3))
    assert c.yielded == pytest.approx(2 / 3)
    assert (
        cell({0: 98.0}, {0: 98.0}).recovered is None
    )  # under 2 points lost: a share means nothing
    assert cell({0: 98.0}).half_width == math.inf


def test_the_verdict_takes_the_cheapest_row_near_the_best():
    rows = [as_row(name) for name in ("none", "drift", "calibrate", "drift+calibrate")]

    def verdict(*means):
        cells = [[cell({0: m, 1: m})] for m in means]
        return rows[judge(rows, cells, "D").row].name

    assert verdict(98.9, 98.9, 99.2, 99.2) == "none"
    assert verdict(50.0, 98.8, 99.2, 99.2) == "drift"
    assert verdict(50.0, 90.0, 99.0, 99.2) == "calibrate"
    assert verdict(50.0, 90.0, 95.0, 99.2) == "drift+calibrate"


def test_the_verdict_judges_a_row_at_its_worst_age():
    rows = [as_row("none"), as_row("calibrate")]
    young_and_old = [[cell({0: 99.0}), cell({0: 20.0})], [cell({0: 97.0}), cell({0: 97.0})]]
    assert judge(rows, young_and_old, "D").row == 1


# Names and ages


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("25s", 25), ("1h", 3600), ("1.5d", 129600), (7, 7)]
)
def test_ages(text, seconds):
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "1 fortnight", "-1d", "d", "1e400s"])
def test_bad_ages(text):
    with pytest.raises(ConfigError, match="age"):
        parse_age(text)


def test_age_labels_name_what_they_came_from():
    assert [age_label(parse_age(a)) for a in ("0", "1h", "1d", "1mo", "1y")] == [
        "0", "1h", "1d", "1mo", "1y",
    ]  # fmt: skip


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'pcm'"):
        resolve("devices", "pmc")
    with pytest.raises(ConfigError, match="Did you mean 'calibrate'"):
        resolve("remedies", "calibrat")
    with pytest.raises(ConfigError, match="does not fit Gaussian"):
        resolve("devices", "gaussian")
    with pytest.raises(ConfigError, match="No module named"):
        resolve("devices", "no_such_module:Device")


# The audit itself


def test_an_audit_of_real_digits(network, data, accuracy):
    result = run(network, data, remedies=["none", "calibrate", "clip:3+calibrate"], floor=90)
    none, calibrated, _ = result.cells
    assert result.digital == pytest.approx(accuracy(network))
    # The cells hold what one gets by hand: the same chips, in order of their seeds.
    for seed, value in none.chips.items():
        chip = ek.analog.program(network, ek.analog.Gaussian(0.15), seed=seed)
        assert value == pytest.approx(accuracy(chip))
        ek.calibrate_(chip, data.calibration)
        assert calibrated.chips[seed] == pytest.approx(accuracy(chip))
    assert calibrated.gain > 0
    assert set(result.shifts[0]["before"]) == {
        path for path, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)
    }
    assert "resnet8_digits has accuracy" in result.verdict[0]
    assert "clip:3+calibrate" in result.table()
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_users_network_and_generator_are_left_alone(network, data):
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    state = torch.get_rng_state()
    run(network, data, remedies=["none", "pooled", "clip", "calibrate"])
    assert network.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_finished_trials_are_not_run_again(network, data, tmp_path):
    asked = []

    def watch(done, total):
        asked.append((done, total))

    first = run(network, data, tmp_path / "a.db", remedies=["none", "clip"], progress=watch)
    assert asked[0] == (0, 6)
    asked.clear()
    again = run(network, data, tmp_path / "a.db", remedies=["none", "clip"], progress=watch)
    assert asked == [(6, 6)]
    assert [c.chips for c in first.cells] == [c.chips for c in again.cells]
    asked.clear()
    run(network, data, tmp_path / "a.db", remedies=["none", "clip"], chips=4, progress=watch)
    assert asked[0] == (6, 8)  # only what is new
    network.classifier.bias.data[0] += 1  # another network: nothing of the old counts
    asked.clear()
    run(network, data, tmp_path / "a.db", remedies=["none", "clip"], progress=watch)
    assert asked[0] == (0, 6)


def test_any_executor_and_any_worker_count_give_the_same(network, data):
    alone = run(network, data, remedies=["none", "calibrate"])
    processes = run(network, data, remedies=["none", "calibrate"], workers=2)
    with ThreadPoolExecutor(2) as pool:
        threads = run(network, data, remedies=["none", "calibrate"], executor=pool)
    assert [c.chips for c in alone.cells] == [c.chips for c in processes.cells]
    assert [c.chips for c in alone.cells] == [c.chips for c in threads.cells]


def test_until_adds_chips_to_what_is_wide(network, data):
    result = run(network, data, devices=["gaussian:0.15", "gain:0.9"], remedies=["none"], until=1.0)
    noisy, exact = result.cells
    assert len(noisy.chips) > 8
    assert noisy.half_width <= 1.0
    assert len(exact.chips) == 8  # all chips of a pure gain are alike; fewer are never believed


def test_devices_that_do_not_age_are_visited_once(network, data):
    result = run(network, data, devices=["pcm", "gain:0.9"], ages=["0", "1d"], remedies=["none"])
    assert [(c.device, c.age_s) for c in result.cells] == [
        ("PCM", 0.0), ("PCM", 86400.0), ("Gain(0.9)", 0.0),
    ]  # fmt: skip


def test_read_noise_is_the_same_for_every_remedy(network, data):
    """A remedy that does nothing must come out equal, chip by chip, read noise and all."""

    @dataclass(frozen=True)
    class Idle:
        name = "idle"
        advice = ""
        needs_data = False

        def mend_(self, chip, bench):
            for batch in bench.batches[:2]:
                bench.forward(chip, batch)  # uses up some of the read noise
            return {}

        def to_dict(self):
            return {"type": "Idle"}

    result = run(network, data, devices=["pcm"], ages=["1h"], remedies=["none", Idle()])
    assert result.cells[0].chips == result.cells[1].chips


def test_shared_remedies_never_see_the_chips_that_are_tested():
    tested = set(range(512))
    assert not tested & {fitting_seed(seed, k) for seed in range(3) for k in range(8)}


# The mended network


def test_best_is_the_network_for_every_chip(network, data, accuracy, tmp_path):
    result = run(
        network, data, devices=["gain:0.5"], remedies=["none", "pooled", "calibrate"], chips=2
    )
    assert result.best_remedy == "pooled"  # cheaper than calibrating each chip, and as good
    ek.save(result.best, tmp_path / "best.safetensors")
    mended = ek.load(tmp_path / "best.safetensors")
    chip = ek.analog.program(mended, ek.analog.Gain(0.5), seed=99)
    assert accuracy(chip) > result.digital - 1
    assert "mended.safetensors" in result.recipe[0]


def test_best_holds_nothing_that_was_fitted_to_one_chip(network, data):
    result = run(network, data, remedies=["none", "calibrate"], chips=2)
    assert result.best_remedy == "calibrate"
    own = network.state_dict()
    assert all(torch.equal(own[k], v) for k, v in result.best.state_dict().items())
    assert "calibrate_" in result.recipe[0]


def test_an_audited_chip_can_be_had_again(network, data, accuracy):
    result = run(network, data, devices=["pcm"], ages=["1d"], remedies=["none", "drift"])
    chip = result.mended_chip(0, 86400.0, 1, 2)
    assert accuracy(chip) == pytest.approx(result.cells[1].chips[2])


def test_xarray(network, data):
    result = run(network, data, remedies=["none", "clip"])
    array = result.to_xarray()
    assert array.dims == ("device", "age_s", "remedy", "chip")
    assert float(array.sel(remedy="clip", chip=1).item()) == result.cells[1].chips[1]


# Tasks and data of one's own


def test_regression_on_real_data():
    from sklearn.datasets import load_diabetes
    from sklearn.metrics import r2_score

    x, y = (torch.from_numpy(part).float() for part in load_diabetes(return_X_y=True))
    y = ((y - y.mean()) / y.std()).unsqueeze(1)
    net = nn.Linear(x.shape[1], 1)
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    net.load_state_dict({"weight": solved[:-1].T, "bias": solved[-1]})
    result = run(net, (x, y), task="regress", remedies=["none"], devices=["gaussian:0.05"])
    tested = x[len(x) - result.provenance["test_samples"] :]
    expected = r2_score(y[-len(tested) :].numpy(), net(tested).detach().numpy())
    assert result.digital == pytest.approx(100 * expected, abs=1e-3)
    assert result.cells[0].mean < result.digital
    assert result.digital_interval is None
    assert isinstance(result._work.plan.task, Regress)


def test_a_pair_of_tensors_is_cut_without_overlap():
    x = torch.arange(1000.0).unsqueeze(1)
    cut = as_data((x, torch.zeros(1000)))
    seen = torch.cat([b[0] for b in [*cut.test, *cut.calibration]])
    assert sorted(seen.flatten().tolist()) == x.flatten().tolist()
    assert 100 < cut.calibration_samples < 300


def test_a_folder_of_images(network, data, tmp_path):
    from PIL import Image

    for part, batches in (("test", data.test), ("train", data.test)):
        for k, (image, label) in enumerate(zip(*batches[0], strict=True)):
            folder = tmp_path / part / f"digit{int(label)}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (image[0] * 255).round().byte().numpy()
            Image.fromarray(pixels).save(folder / f"{k}.png")
    read = image_folder(tmp_path)
    assert list(read.classes) == [f"digit{k}" for k in range(10)]
    assert read.test_samples == len(data.test[0][0])
    result = run(network, read, remedies=["none"])
    assert result.digital > 95
    normalized = image_folder(tmp_path, mean=[0.5], std=[0.25])
    torch.testing.assert_close(normalized.test[0][0], (read.test[0][0] - 0.5) / 0.25)


# Errors


def test_audit_errors(network, data):
    with pytest.raises(ConfigError, match="none"):
        run(nn.Sequential(nn.Flatten()), (torch.rand(64, 1, 2, 5), torch.zeros(64).long()))
    with pytest.raises(ConfigError, match="10 outputs and the data has 12 classes"):
        run(network, Data("d", data.test, data.calibration, classes=[str(k) for k in range(12)]))
    labels = [(x, y + 5) for x, y in data.test]
    with pytest.raises(ConfigError, match="10 outputs and the data has labels up to 14"):
        run(network, Data("d", labels, data.calibration))
    with pytest.raises(ConfigError, match="needs test samples"):
        Data("empty", [], data.calibration)
    with pytest.raises(ConfigError, match="must be a list"):
        run(network, data, devices="pcm")
    with pytest.raises(ConfigError, match="named once"):
        run(network, data, devices=["pcm", "pcm"])
    with pytest.raises(ConfigError, match="chips must be 1"):
        run(network, data, chips=0)
    with pytest.raises(ConfigError, match="has neither"):
        run(network, data, remedies=["none", object()])
    network.classifier.weight.data[3, 3] = torch.nan
    with pytest.raises(ConfigError, match=r"'classifier\.weight' holds NaN"):
        run(network, data)


def test_store_errors(tmp_path):
    (tmp_path / "text.db").write_text("this is no database, and long enough to be told apart " * 20)
    with pytest.raises(StoreError, match="Cannot open"):
        Store(tmp_path / "text.db")
    with pytest.raises(StoreError, match="Cannot open"):
        Store(tmp_path / "no" / "folder.db")
    with Store(tmp_path / "a.db"), pytest.raises(StoreError, match="another audit"):
        Store(tmp_path / "a.db")


def test_a_store_keeps_each_trial_once(tmp_path):
    with Store(tmp_path / "a.db") as store:
        store.add("k", "{}", {"value": 1.0})
        with pytest.raises(StoreError):
            store.add("k", "{}", {"value": 2.0})
        assert store.results(["k", "other"]) == {"k": {"value": 1.0}}


def test_default_remedies_leave_out_what_a_network_has_no_use_for(data):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = run(plain, data, chips=1)
    rows = ["none", "drift", "match+calibrate", "match+clip+calibrate"]
    assert [c.remedy for c in result.cells] == rows
    assert "calibrate" in result.notes[0]
    with pytest.raises(ConfigError, match="'calibrate' cannot be used"):
        run(plain, data, remedies=["none", "calibrate"])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_an_edited_forward_is_another_network(data, monkeypatch):
    model = Scaled()

    def fingerprint():
        result = run(model, data, remedies=["none"], chips=1)
        return result.provenance["model_fingerprint"]

    first = fingerprint()
    assert fingerprint() == first
    monkeypatch.setattr("inspect.getsource", lambda kind: "def forward(self, x): ...")
    assert fingerprint() != first


# What a reviewer once broke


def test_a_setting_of_a_module_makes_another_network(data):
    class Rolled(Scaled):
        def __init__(self, by):
            torch.manual_seed(0)
            super().__init__()
            self.by = by
            self.register_buffer("hidden", torch.ones(()), persistent=False)

    def fingerprint(model):
        return run(model, data, remedies=["none"], chips=1).provenance["model_fingerprint"]

    model = Rolled(0)
    first = fingerprint(model)
    assert fingerprint(Rolled(0)) == first
    assert fingerprint(Rolled(1)) != first
    model.hidden.fill_(2)
    assert fingerprint(model) != first


class Grown(Scaled):
    """Its forward is its parent's."""


def test_the_code_of_a_parent_class_counts(data, monkeypatch):
    def fingerprint():
        torch.manual_seed(0)
        result = run(Grown(), data, remedies=["none"], chips=1)
        return result.provenance["model_fingerprint"]

    first, source = fingerprint(), inspect.getsource
    edited = {Scaled: "def forward(self, x): ..."}
    monkeypatch.setattr("inspect.getsource", lambda kind: edited.get(kind) or source(kind))
    assert fingerprint() != first


class OutFirst(nn.Linear):
    def forward(self, x):
        return 1.0 * super().forward(x)


class OutFirstWeights:
    def matrix(self, layer):
        return layer.weight

    def weight(self, layer, matrix):
        return matrix

    def forward(self, layer, x, matrix):
        return nn.functional.linear(x, matrix, layer.bias)


def test_kinds_of_layers_of_ones_own_are_known_to_workers(data):
    from evenkeel.layers import register_weight_layer, weights

    register_weight_layer(OutFirst, OutFirstWeights())
    try:
        model = nn.Sequential(nn.Flatten(), OutFirst(64, 32), nn.ReLU(), nn.Linear(32, 10))
        options = {"remedies": ["none"], "devices": ["gaussian:0.3"]}
        alone, workers = (run(model, data, **options, workers=n) for n in (0, 2))
        assert alone.cells[0].chips == workers.cells[0].chips
    finally:
        del weights._KINDS[OutFirst]


def test_labels_must_be_one_number_each(network, data):
    columns = [(x, y[:, None]) for x, y in data.test]
    with pytest.raises(ConfigError, match=r"labels of shape \(N,\)"):
        run(network, Data("d", columns, data.calibration))
    with pytest.raises(ConfigError, match="batches of \\(inputs, labels\\)"):
        run(network, Data("d", [{"x": data.test[0][0]}], data.calibration))


def test_calibration_batches_given_are_the_ones_used(network, data):
    own = [(data.test[0][0][:5],)]
    result = run(network, data, remedies=["none"], chips=1, calibration=own)
    assert result.provenance["calibration_samples"] == 5
    assert result.provenance["shared_samples"] == 5  # and the report says so
    assert run(network, data, remedies=["none"], chips=1).provenance["shared_samples"] == 0


def test_the_first_row_is_called_what_it_is(network, data, tmp_path):
    result = run(network, data, devices=["pcm"], ages=["1d"], remedies=["drift", "calibrate"])
    assert "with drift compensation it keeps" in result.verdict[0]
    page = result.report(tmp_path / "r.html").read_text()
    assert "chip as it is" not in page


def test_the_worst_ages_of_both_are_told(network, data):
    result = run(network, data, devices=["pcm"], ages=["0", "1y"], remedies=["none", "pooled"])
    raw = min(result.verdicts[0].raw, key=lambda c: c.mean)
    assert f"{raw.mean:.1f}" in result.verdict[0]


def test_a_normalizer_that_eval_never_reaches_is_left_alone(data):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.aux = nn.BatchNorm1d(64)
            self.main = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))

        def forward(self, x):
            x = x.flatten(1)
            return self.main(self.aux(x) if self.training else x)

    model = Auxiliary().eval()
    result = run(model, data, chips=1)  # all default remedies
    assert {"pooled", "calibrate"} <= {c.remedy for c in result.cells}
    assert torch.equal(result.best.aux.running_mean, model.aux.running_mean)


def test_best_is_a_copy(network, data):
    result = run(network, data, remedies=["none"], chips=1)
    result.best.classifier.bias.data.add_(1)
    assert not torch.equal(result.best.classifier.bias, network.classifier.bias)


def test_names_are_no_markup(network, data):
    from evenkeel.audit.remedy import Nothing

    odd = Nothing()
    odd.name = "half[bold]x[/y]"
    assert odd.name in run(network, data, remedies=["none", odd], chips=1).table()


def test_a_folder_is_sampled_evenly(tmp_path):
    from PIL import Image

    for part, count in (("test", 1), ("train", 30)):
        for k in range(5):
            folder = tmp_path / part / f"c{k}"
            folder.mkdir(parents=True)
            (folder / "._junk.png").write_bytes(b"not an image")
            for i in range(count):
                Image.fromarray(np.full((4, 4), 50 * k, dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "test" / ".hidden").mkdir()
    read = image_folder(tmp_path, calibration_samples=100)
    shades = torch.cat([b[0][:, 0, 0, 0] for b in read.calibration])
    assert torch.bincount((shades * 255 / 50).round().long()).tolist() == [20] * 5
    assert list(read.classes) == [f"c{k}" for k in range(5)]
    with pytest.raises(ConfigError, match="one number or one for each of 1"):
        image_folder(tmp_path, mean=[0.5, 0.5, 0.5])


def test_deep_grey_images_keep_their_depth(tmp_path):
    from PIL import Image

    values = np.array([[0, 256], [20000, 65535]], dtype=np.uint16)
    for part in ("test", "train"):
        (tmp_path / part / "c").mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / part / "c" / "0.png")
    (x, _), *_ = image_folder(tmp_path).test
    torch.testing.assert_close(x[0, 0], torch.from_numpy(values / 65535).float())


def test_workers_are_sent_each_sample_once():
    x = torch.randn(1000, 100)
    whole = Data("parts", [(p, p) for p in x.split(10)], [(p,) for p in x.split(10)])
    work = Workload(torch.nn.Linear(2, 2), whole, None)
    sent = cloudpickle.dumps(_compact(work))
    assert len(sent) < 4 * x.numel() * 4
    assert len(cloudpickle.dumps(work)) > 50 * len(sent)  # what it would be
