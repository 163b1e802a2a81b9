"""Foreground and objects in pictures: the task of the audit, against sets of pixels."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel.audit.names import resolve
from evenkeel.audit.picture import tinted
from evenkeel.audit.run import evaluate
from evenkeel.audit.segment import MEASURES, Segment
from evenkeel.audit.summary import t_interval
from evenkeel.data import Data
from evenkeel.errors import ConfigError
from evenkeel.models import build


def scores_of(seen):
    """Scores (N, 1, H, W) that make a network see just these pixels."""
    return torch.where(torch.as_tensor(np.array(seen)), 1.0, -1.0)[:, None]


def batch_of(objects):
    objects = torch.as_tensor(objects if isinstance(objects, torch.Tensor) else np.array(objects))
    return torch.rand(len(objects), 3, *objects.shape[1:]), objects


def components(pixels):
    """What hangs together by sides or corners, as sets of pixels: by flooding, one at a time."""
    left, found = set(pixels), []
    while left:
        one, border = set(), [left.pop()]
        while border:
            i, j = border.pop()
            one.add((i, j))
            near = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            border += near
        found.append(one)
    return found


def by_sets(seen, objects):
    """Numerators and denominators of one picture's measures, from sets of pixels alone."""
    places = [(i, j) for i in range(objects.shape[0]) for j in range(objects.shape[1])]
    counted = {p for p in places if objects[p] >= 0}
    truth = {p for p in counted if objects[p] > 0}
    found = {p for p in counted if seen[p]}
    there = [{p for p in truth if objects[p] == k} for k in {int(objects[p]) for p in truth}]
    guesses = components(found)
    shares = []
    for percent in range(50, 100, 5):
        hits = sum(100 * len(a & b) > percent * len(a | b) for a in there for b in guesses)
        either = len(there) + len(guesses) - hits
        shares.append(hits / either if either else 1.0)
    both = len(truth) + len(found)
    hit, ap = len(truth & found), sum(shares) / 10
    return {
        "iou": (hit, both - hit), "dice": (2 * hit, both), "ap": (ap, 1), "ap50": (shares[0], 1),
    }  # fmt: skip


def blobs(rng, side=14):
    """A map of objects that touch, overlap, and do not count in places; and one nearly like it."""
    objects = np.zeros((side, side + 3), dtype=np.int64)
    for k in range(1, rng.integers(0, 6) + 1):
        i, j, high, wide = rng.integers((0, 0, 1, 1), (side, side, 8, 8))
        objects[i : i + high, j : j + wide] = 7 * k  # numbers need not follow each other
    seen = (objects > 0) ^ (rng.random(objects.shape) < rng.choice([0, 0.02, 0.2]))
    seen = np.roll(seen, rng.integers(-1, 2), 1)
    if rng.random() < 0.5:
        objects[:, side - rng.integers(0, 6) :] = -1
    return seen, objects


def test_the_measures_are_those_of_sets_of_pixels():
    rng = np.random.default_rng(0)
    pictures = [blobs(rng) for _ in range(150)]
    parts = [by_sets(*picture) for picture in pictures]
    seen, objects = (np.stack(item) for item in zip(*pictures, strict=True))
    sums = sum(
        Segment().score(scores_of(seen[k : k + 50]), batch_of(objects[k : k + 50]))
        for k in (0, 50, 100)
    )
    for measure in MEASURES:
        a, b = (sum(part[measure][k] for part in parts) for k in (0, 1))
        assert Segment(measure).value(sums) == pytest.approx(100 * a / b, abs=1e-9), measure
    for k in range(150):  # each by itself, so that nothing makes up for anything
        one = Segment().score(scores_of(seen[k : k + 1]), batch_of(objects[k : k + 1]))
        for measure in MEASURES:
            a, b = parts[k][measure]
            wanted = 100 * a / b if b else 100
            assert Segment(measure).value(one) == pytest.approx(wanted, abs=1e-9), (k, measure)


def measured(seen, objects):
    sums = Segment().score(scores_of([seen]), batch_of([objects]))
    return [round(Segment(measure).value(sums), 6) for measure in ("iou", "dice", "ap", "ap50")]


def test_the_edges_of_the_definition():
    none, all_ = [[False] * 4], [[True] * 4]
    assert measured(none, [[0, 0, 0, 0]]) == [100, 100, 100, 100]  # nothing there, nothing seen
    assert measured(none, [[1, 1, 0, 0]]) == [0, 0, 0, 0]
    assert measured(all_, [[0, 0, 0, 0]]) == [0, 0, 0, 0]
    assert measured(all_, [[3, 3, 3, 3]]) == [100, 100, 100, 100]  # there is no background at all
    assert measured(all_, [[3, 3, -1, -1]]) == [100, 100, 100, 100]
    assert measured(all_, [[-1, -1, -1, -1]]) == [100, 100, 100, 100]
    assert measured(all_, [[1, 1, 2, 2]]) == [100, 100, 0, 0]  # two that touch are seen as one
    assert measured(all_, [[1, 1, 0, 0]])[3] == 0  # an IoU of one half is not above it
    assert measured(all_, [[1, 1, 1, 0]])[2:] == [50, 100]  # 0.75 is above five of ten


def test_corners_hang_together():
    seen = [[True, False], [False, True]]
    assert measured(seen, [[5, 0], [0, 5]])[3] == 100


def test_what_does_not_count_parts_what_is_seen():
    assert measured([[True] * 5], [[1, 1, -1, 2, 2]])[2:] == [100, 100]


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int64, torch.bool])
def test_any_whole_numbers_will_do(kind):
    objects = torch.tensor([[[0, 1, 1, 0]]])
    scores = scores_of([[[False, True, False, False]]])
    for task in map(Segment, MEASURES):
        wanted = task.value(task.score(scores, batch_of(objects)))
        assert task.value(task.score(scores, batch_of(objects.to(kind)))) == wanted


def test_of_several_classes_the_first_is_the_background():
    scores = torch.tensor([[3.0, 0.0, 1.0, 0.0], [1.0, 4.0, 0.0, 0.0], [2.0, 0.0, 0.0, 5.0]])
    batch = batch_of([[[0, 1, 0, 2]]])
    for output in (scores.view(1, 3, 1, 4), {"out": scores.view(1, 3, 1, 4)}):
        assert Segment().value(Segment().score(output, batch)) == 100
    assert Segment("ap").value(Segment().score(scores.view(1, 3, 1, 4), batch)) == 100


@pytest.mark.parametrize("measure", MEASURES)
def test_the_interval_is_near_that_of_the_jackknife(measure):
    rng, task = np.random.default_rng(1), Segment(measure)
    each = [task.score(scores_of([s]), batch_of([o])) for s, o in (blobs(rng) for _ in range(60))]
    sums = torch.stack(each)
    whole = task.value(sums.sum(0))
    without = np.array([task.value(sums.sum(0) - one) for one in sums])
    deviation = np.sqrt(59 / 60 * ((without - without.mean()) ** 2).sum())
    low, high = task.interval(sums.sum(0))
    assert (whole - low) / (2.0010 * deviation) == pytest.approx(1, abs=0.05)  # t of 59
    assert high - whole == pytest.approx(whole - low)


def test_the_interval_of_a_mean_is_students():
    task, rng = Segment("ap"), np.random.default_rng(2)
    each = [task.score(scores_of([s]), batch_of([o])) for s, o in (blobs(rng) for _ in range(12))]
    wanted = t_interval([task.value(one) for one in each])
    assert task.interval(sum(each)) == pytest.approx(wanted)


def test_the_interval_covers_what_it_should():
    rng, task = np.random.default_rng(3), Segment()
    pool = [task.score(scores_of([s]), batch_of([o])) for s, o in (blobs(rng) for _ in range(400))]
    pool = torch.stack(pool)
    truth = task.value(pool.sum(0))
    drawn = [task.interval(pool[rng.integers(0, 400, 25)].sum(0)) for _ in range(400)]
    assert 0.90 < np.mean([low <= truth <= high for low, high in drawn]) < 0.99


def test_there_is_no_interval_for_one_picture_or_no_foreground():
    task = Segment()
    one = task.score(scores_of([[[True, False]]]), batch_of([[[1, 1]]]))
    assert task.interval(one) is None
    nothing = task.score(scores_of([[[False]]] * 3), batch_of([[[0]]] * 3))
    assert task.interval(nothing) is None
    assert task.value(nothing) == 100


def test_an_empty_batch_adds_nothing():
    task = Segment()
    one = task.score(scores_of([[[True, False]]]), batch_of([[[1, 1]]]))
    none = task.score(torch.zeros(0, 1, 1, 2), batch_of(torch.zeros(0, 1, 2, dtype=torch.long)))
    assert torch.equal(one + none, one)


def test_outputs_that_are_no_numbers_see_nothing():
    task = Segment()
    sums = task.score(torch.full((1, 1, 1, 3), torch.nan), batch_of([[[0, 1, 1]]]))
    assert task.value(sums) == 0
    assert all(np.isfinite(value) for value in task.figures(sums, ()).values())


def test_the_worst_pictures_are_those_of_the_least_iou():
    seen = [[[True, True]], [[True, False]], [[False, False]], [[False, False]]]
    batch = batch_of([[[1, 1]], [[1, 1]], [[1, 1]], [[0, -1]]])
    assert Segment().errors(scores_of(seen), batch).tolist() == [0, 0.5, 1, 0]


@pytest.mark.parametrize(
    ("batch", "model", "says"),
    [
        (torch.rand(2, 3, 4, 4), nn.Identity(), "got Tensor|got NoneType"),
        ((torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4)), nn.Identity(), r"whole numbers"),
        ((torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4).long()), nn.Identity(), r"\(2, 1, 4, 4"),
        ((torch.rand(2, 3, 4, 4), -torch.ones(2, 4, 4).long()), nn.Identity(), "some foreground"),
        ((torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4).long()), nn.Flatten(), r"gives \(2, 48\)"),
        ((torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4).long()), nn.AvgPool2d(2), r"\(2, 3, 2, 2\)"),
    ],
    ids=["alone", "kind", "shape", "nothing", "flat", "smaller"],
)
def test_what_does_not_fit_is_refused(batch, model, says):
    with pytest.raises(ConfigError, match=says):
        Segment().check(model, [batch], ())


def test_every_batch_is_looked_at():
    good = torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4).long()
    for bad in ((good[0],), (good[0], torch.ones(2, 1, 4, 4).long()), (good[0], good[1].float())):
        with pytest.raises(ConfigError, match="whole numbers"):
            Segment().check(nn.Identity(), [good, bad], ())


def test_it_is_known_by_name():
    assert resolve("tasks", "segment") == Segment()
    assert resolve("tasks", "segment:dice").to_dict() == {
        "type": "Segment", "version": 1, "measure": "dice",
    }  # fmt: skip
    assert resolve("tasks", "segment:ap").metric == "object AP"
    with pytest.raises(ConfigError, match="Did you mean 'dice'"):
        resolve("tasks", "segment:dic")
    assert pickle.loads(pickle.dumps(Segment("ap50"))) == Segment("ap50")


def test_the_tint_lies_where_the_mask_is():
    picture, mask = torch.rand(1, 4, 5), torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = True
    before = picture.clone()
    made = tinted(picture, [(mask, (1.0, 0.0, 0.0))])
    assert torch.equal(picture, before)
    plain = tinted(picture, [])
    assert torch.equal(made[:, ~mask], plain[:, ~mask])
    assert made[0, 1, 2] > made[1, 1, 2]
    assert (made - plain).abs().sum((0,)).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_drawing_has_a_picture_for_the_truth_and_for_each_network(channels):
    batch = torch.rand(2, channels, 8, 8), torch.ones(2, 8, 8).long()
    outputs = {"a & b": torch.randn(2, 1, 8, 8), "c": torch.randn(2, 1, 8, 8).bfloat16()}
    drawn = Segment().draw(batch, 1, outputs, ())
    assert drawn.count("data:image/png") == 3
    assert "a &amp; b: IoU" in drawn


def test_pictures_of_any_number_of_channels_can_be_drawn():
    batch = torch.rand(1, 4, 8, 8), torch.ones(1, 8, 8).long()
    assert "IoU" in Segment().draw(batch, 0, {"it": torch.randn(1, 1, 8, 8)}, ())


# ---- an audit


@pytest.fixture(scope="module")
def cells():
    """Bright squares, and what is right of them does not count."""
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.rand(12, 1, 32, 32, generator=generator)
    y = torch.zeros(12, 32, 32, dtype=torch.int32)
    corners = torch.randint(0, 20, (12, 2, 2), generator=generator).tolist()
    for n, places in enumerate(corners):
        for k, (i, j) in enumerate(places, 1):
            x[n, :, i : i + 8, j : j + 8] += 0.4
            y[n, i : i + 8, j : j + 8] = k
    y[:, :, 28:] = -1
    cut = [(x[k : k + 4], y[k : k + 4]) for k in (0, 4, 8)]
    return Data("squares", cut[:2], cut[2:], note="Squares & other cells.")


@pytest.fixture(scope="module")
def small():
    """A U-Net with its scores about its own median, so that it sees a half."""
    torch.manual_seed(0)
    return build("unet", in_channels=1, width=8).eval()


def test_an_audit_on_chips(cells, small, tmp_path):
    result = ek.audit(
        small, cells, task="segment", devices=["gaussian:0.05"], chips=2, workers=0,
        remedies=["none", "calibrate", "balance:arrays+calibrate"], store=":memory:",
    )  # fmt: skip
    facts = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (result.metric, result.unit) == ("foreground IoU", "%")
    assert set(facts["digital_figures"]) == {"foreground IoU", "Dice", "object AP", "object AP50"}
    assert facts["digital_figures"]["foreground IoU"] == result.digital
    assert result.digital_interval[0] <= result.digital <= result.digital_interval[1]
    assert "Squares & other cells." in result.notes
    page = result.report(tmp_path / "r.html").read_text()
    assert "Squares &amp; other cells." in page
    assert Segment().legend in page
    assert page.count('class="beside"') == 4
    task = Segment()
    assert task.value(evaluate(small, cells, task)) == pytest.approx(result.digital)
