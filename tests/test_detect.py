"""Objects in boxes: the task of the audit, against average precision worked out by hand."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel.audit.detect import MEASURES, MOST, SURE, Detect, _hits
from evenkeel.audit.names import resolve
from evenkeel.audit.picture import outlined
from evenkeel.audit.run import evaluate
from evenkeel.data import Data
from evenkeel.errors import ConfigError
from evenkeel.models import build

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval (the extra tasks)")

THRESHOLDS = np.linspace(0.5, 0.95, 10)


def overlap(found, box, crowd):
    """IoU; of a crowd's box how much of what was found lies in it."""
    wide = min(found[2], box[2]) - max(found[0], box[0])
    high = min(found[3], box[3]) - max(found[1], box[1])
    both = max(0, wide) * max(0, high)
    own = (found[2] - found[0]) * (found[3] - found[1])
    other = (box[2] - box[0]) * (box[3] - box[1])
    return both / (own if crowd else own + other - both)


def outcome(boxes, found, threshold):
    """Of each detection, the best first: (score, right), without those that a crowd explains."""
    found = sorted(found, key=lambda d: -d[4])
    boxes = sorted(boxes, key=lambda b: b[5])
    taken, told = set(), []
    for one in found:
        best, at = threshold, None
        for k, box in enumerate(boxes):
            if k in taken or (box[5] and at is not None and not boxes[at][5]):
                continue
            share = overlap(one, box, box[5])
            if share >= best:
                best, at = share, k
        if at is not None and boxes[at][5]:
            continue
        if at is not None:
            taken.add(at)
        told.append((one[4], at is not None))
    return told


def average_precision(pictures, label, threshold):
    """The precision at 101 recalls, each the best at that recall or above."""
    pictures = [
        ([b for b in boxes if b[4] == label], [d for d in found if d[5] == label])
        for boxes, found in pictures
    ]
    number = sum(not b[5] for boxes, _ in pictures for b in boxes)
    if not number:
        return np.nan
    told = [one for boxes, found in pictures for one in outcome(boxes, found, threshold)]
    told.sort(key=lambda one: -one[0])
    hits = np.cumsum([right for _, right in told])
    precision, recall = hits / np.arange(1, len(told) + 1), hits / number
    at = [precision[recall >= r] for r in np.linspace(0, 1, 101)]
    return np.mean([max(p) if len(p) else 0 for p in at])


def by_hand(boxes, found, classes):
    """AP, AP50 and AP75: of all classes, then of each."""
    pictures = [
        ([b for b in of_one.tolist() if b[4] >= 0], [d for d in seen.tolist() if d[4] > 0])
        for of_one, seen in zip(boxes.double(), found.double(), strict=True)
    ]
    ap = np.array([[average_precision(pictures, c, t) for c in range(classes)] for t in THRESHOLDS])
    each = np.stack([ap.mean(0), ap[0], ap[5]])
    return 100 * np.concatenate([np.nanmean(each, 1, keepdims=True), each], 1)


def scene(seed, number=6, most=8, classes=3):
    """Boxes, some of them crowds, and detections: near boxes, or anywhere, or twice."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    corner, sides = 40 * random(number, most, 2), 4 + 20 * random(number, most, 2)
    label = (classes * random(number, most, 1)).floor()
    label[random(number, most, 1) < 0.3] = -1
    crowd = (random(number, most, 1) < 0.15).float()
    boxes = torch.cat([corner, corner + sides, label, crowd], 2)
    near = torch.cat([boxes[..., :4]] * 2, 1) + 4 * random(number, 2 * most, 4) - 2
    kind = torch.where(random(number, 2 * most) < 0.8, torch.cat([label, label], 1)[..., 0], 1.0)
    score = random(number, 2 * most)
    score[random(number, 2 * most) < 0.1] = 0
    found = torch.cat([near, score[..., None], kind.clamp_min(0)[..., None]], 2)
    return boxes, found


@pytest.mark.parametrize("seed", range(8))
def test_the_figures_are_those_worked_out_by_hand(seed):
    boxes, found = scene(seed)
    task, x = Detect(), torch.zeros(6, 3, 64, 64)
    scores = [task.score(found[k : k + 2], (x[k : k + 2], boxes[k : k + 2])) for k in (0, 2, 4)]
    sums = task.gathered(scores)
    wanted = by_hand(boxes, found, int(boxes[..., 4].max()) + 1)
    np.testing.assert_allclose(sums.view(3, -1).numpy(), wanted, atol=1e-9)
    assert 5 < wanted[1, 0] < 95  # neither all right nor all wrong
    values = [Detect(measure).value(sums) for measure in MEASURES]
    assert values == pytest.approx(wanted[:, 0])


def test_the_check_by_hand_can_fail():
    boxes, found = scene(0)
    wanted = by_hand(boxes, found, 3)
    found[..., 2] += 3
    assert not np.allclose(by_hand(boxes, found, 3), wanted, atol=1)


def batch_of(boxes):
    boxes = torch.tensor(boxes, dtype=torch.float32)
    return torch.rand(len(boxes), 3, 32, 32), boxes


def measured(found, batch, task=Detect("ap")):  # noqa: B008
    return task.value(task.gathered([task.score(found, batch)]))


def test_the_edges_of_the_definition():
    batch = batch_of([[[0, 0, 10, 10, 0, 0]]])
    half = torch.tensor([[[0.0, 0, 10, 5, 0.9, 0]]])
    assert measured(half, batch, Detect("ap50")) == pytest.approx(100)  # one half is enough
    assert measured(half, batch) == pytest.approx(10)
    twice = torch.tensor([[[0.0, 0, 10, 10, 0.9, 0], [0.0, 0, 10, 10, 0.8, 0]]])
    assert measured(twice, batch) == pytest.approx(
        100
    )  # what is invented comes after what is there
    assert measured(twice + torch.tensor([0, 0, 0, 0, 0, 1]), batch) == 0  # of another class
    wrong_first = torch.tensor([[[20.0, 20, 30, 30, 0.95, 0], [0.0, 0, 10, 10, 0.9, 0]]])
    assert measured(wrong_first, batch) == pytest.approx(50)


def test_a_crowd_is_neither_right_nor_wrong():
    batch = batch_of([[[0, 0, 10, 10, 0, 0], [12, 12, 30, 30, 0, 1]]])
    found = torch.tensor([[[14.0, 14, 20, 20, 0.95, 0], [0.0, 0, 10, 10, 0.9, 0]]])
    assert measured(found, batch) == pytest.approx(100)
    batch[1][0, 1, 4] = -1  # without it there was nothing
    assert measured(found, batch) == pytest.approx(50)


def test_as_many_detections_count_as_in_coco():
    batch = batch_of([[[0, 0, 10, 10, 0, 0]]])
    found = torch.tensor([20.0, 20, 30, 30, 0.9, 0]).repeat(1, MOST + 5, 1)
    found[0, MOST - 1] = torch.tensor([0.0, 0, 10, 10, 0.5, 0])
    found[0, MOST:, 4] = 0.1
    assert measured(found, batch) == pytest.approx(1)  # the last of a hundred
    found[0, MOST, 4] = 0.8
    assert measured(found, batch) == 0


def test_detections_as_torchvision_gives_them():
    boxes, found = scene(1)
    batch = torch.zeros(6, 3, 64, 64), boxes
    lists = [
        {"boxes": d[:, :4], "scores": d[:, 4], "labels": d[:, 5].long() + 1, "masks": d}
        for d in found
    ]
    task = Detect(first_label=1)
    np.testing.assert_equal(
        task.gathered([task.score(lists, batch)]).numpy(),
        Detect().gathered([Detect().score(found, batch)]).numpy(),
    )


def test_the_order_of_detections_and_of_filling_does_not_matter():
    boxes, found = scene(2)
    batch = torch.zeros(6, 3, 64, 64), boxes
    order = torch.randperm(found.shape[1])
    filled = torch.cat([torch.full((6, 3, 6), -1.0), boxes], 1)
    wanted = Detect().gathered([Detect().score(found, batch)])
    again = Detect().gathered([Detect().score(found[:, order], (batch[0], filled))])
    np.testing.assert_allclose(again.numpy(), wanted.numpy())


def test_inputs_are_left_as_they_were():
    boxes, found = scene(3)
    before = boxes.clone(), found.clone()
    task, batch = Detect(first_label=1), (torch.rand(6, 3, 64, 64), boxes)
    task.gathered([task.score(found, batch)])
    task.errors(found, batch)
    task.draw(batch, 0, {"it": found}, ())
    assert torch.equal(boxes, before[0])
    assert torch.equal(found, before[1])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_detections_of_any_precision(kind):
    batch = batch_of([[[0, 0, 8, 8, 0, 0], [8, 8, 24, 16, 1, 0]]])
    found = torch.tensor([[[0.0, 0, 8, 8, 0.5, 0], [8.0, 8, 24, 16, 0.5, 1]]]).to(kind)
    assert measured(found, batch) == pytest.approx(100)


def test_boxes_of_whole_numbers():
    x, boxes = batch_of([[[0, 0, 8, 8, 0, 0]]])
    assert measured(torch.tensor([[[0.0, 0, 8, 8, 0.5, 0]]]), (x, boxes.long())) == pytest.approx(
        100
    )


@pytest.mark.parametrize("number", [0, 3])
def test_nothing_found_is_worth_nothing(number):
    batch = batch_of([[[0, 0, 8, 8, 0, 0], [8, 8, 24, 16, 2, 0]]])
    found = torch.zeros(1, number, 6)  # scores of 0 fill up
    assert measured(found, batch) == 0
    assert Detect().errors(found, batch).tolist() == [1]
    no_rows = {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0).long(),
    }
    assert Detect().errors([no_rows], batch).tolist() == [1]


def test_a_class_that_is_not_there_does_not_count():
    batch = batch_of([[[0, 0, 8, 8, 0, 0], [8, 8, 24, 16, 2, 0]]])
    found = torch.tensor([[[0.0, 0, 8, 8, 0.9, 0], [0, 0, 8, 8, 0.8, 1], [0, 0, 8, 8, 0.7, 9]]])
    sums = Detect().gathered([Detect().score(found, batch)])
    figures = Detect().figures(sums, ["red", "blue", "green", "more"])
    assert figures["AP50"] == pytest.approx(50)
    assert (figures["AP50 red"], figures["AP50 green"]) == (pytest.approx(100), 0)
    assert not any("blue" in name or "more" in name for name in figures)
    assert set(Detect().figures(sums, ())) >= {"AP 0", "AP 2"}


def test_an_empty_batch_adds_nothing():
    batch = batch_of([[[0, 0, 8, 8, 0, 0]]])
    found = torch.tensor([[[0.0, 0, 8, 8, 0.9, 0]]])
    task, none = Detect(), (batch[0][:0], batch[1][:0])
    scores = [task.score(found, batch), task.score(found[:0], none)]
    assert task.value(task.gathered(scores)) == pytest.approx(100)
    assert task.errors(found[:0], none).tolist() == []


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [2, 4, 5])
def test_detections_that_are_no_numbers_are_none(odd, place):
    batch = batch_of([[[0, 0, 8, 8, 0, 0], [8, 8, 24, 16, 1, 0]]])
    found = torch.zeros(1, MOST + 2, 6)
    found[0, 0] = torch.tensor([0.0, 0, 8, 8, 0.9, 0])
    found[0, 1:] = torch.tensor([8.0, 8, 24, 16, 0.8, 1])
    found[0, 1:-1, place] = odd  # a hundred of them leave room for those that are numbers
    found = found[:, torch.randperm(MOST + 2)]
    assert measured(found, batch) == pytest.approx(100)
    assert Detect().errors(found, batch).tolist() == [0]
    assert "2 right of 2" in Detect().draw(batch, 0, {"it": found}, ())


def test_without_any_boxes_all_that_is_found_is_invented():
    batch = batch_of([[[-1, -1, -1, -1, -1, -1]]])
    found = torch.tensor([[[0.0, 0, 8, 8, 0.9, 0], [0.0, 0, 8, 8, 0.8, 0]]])
    assert Detect().errors(found, batch).tolist() == [2]
    assert "0 right of 2" in Detect().draw(batch, 0, {"it": found}, ())


def test_errors_are_what_is_missed_and_what_is_invented():
    batch = batch_of([[[0, 0, 8, 8, 0, 0], [8, 8, 24, 16, 1, 0]]] * 4)
    right = torch.tensor([[0.0, 0, 8, 8, 0.9, 0], [8.0, 8, 24, 16, 0.8, 1]])
    unsure, elsewhere, other = right.clone(), right.clone(), right.clone()
    unsure[1, 4] = SURE - 0.01
    elsewhere[1, :4] = torch.tensor([0.0, 20, 4, 30])
    other[1, 5] = 0
    found = torch.stack([right, unsure, elsewhere, other])
    assert Detect().errors(found, batch).tolist() == [0, 0.5, 1, 1]


def test_a_box_is_hit_once():
    boxes = torch.tensor([[0.0, 0, 10, 10, 0, 0]])
    found = torch.tensor([[0.0, 0, 10, 9, 0.9, 0], [0.0, 0, 10, 10, 0.8, 0]]).double()
    assert _hits(boxes, found) == (1, 2)
    assert _hits(boxes[:0], found) == (0, 2)
    assert _hits(boxes, found[:0]) == (0, 0)


class Fixed(nn.Module):
    """Gives the same for whatever comes."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


X, BOXES = torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 6)


@pytest.mark.parametrize(
    ("batch", "output", "says"),
    [
        (X, torch.zeros(2, 3, 6), "batches of"),
        ((X, torch.zeros(2, 3)), torch.zeros(2, 3, 6), r"got \(2, 3\)"),
        ((X, torch.zeros(2, 3, 5)), torch.zeros(2, 3, 6), r"got \(2, 3, 5\)"),
        ((X, [{}]), torch.zeros(2, 3, 6), "got list"),
        ((X, BOXES - 1), torch.zeros(2, 3, 6), "all are of class -1"),
        ((X, BOXES), torch.zeros(2, 7, 8, 8), r"gives \(2, 7, 8, 8\)"),
        ((X, BOXES), torch.zeros(1, 3, 6), r"gives \(1, 3, 6\)"),
        ((X, BOXES), [{"boxes": 1, "scores": 2}] * 2, "gives list"),
        ((X, BOXES), [{"boxes": 1, "scores": 2, "labels": 3}], "gives list"),
        ((X, BOXES), None, "gives NoneType"),
    ],
    ids=["alone", "2d", "five", "list", "none", "maps", "one", "labels", "short", "nothing"],
)
def test_what_does_not_fit_is_refused(batch, output, says):
    with pytest.raises(ConfigError, match=says):
        Detect().check(Fixed(output), [batch], ())


def test_every_batch_is_looked_at():
    for bad in ((X,), (X, torch.zeros(2, 3, 5)), (X, torch.zeros(2, 6))):
        with pytest.raises(ConfigError, match="batches of"):
            Detect().check(Fixed(torch.zeros(2, 3, 6)), [(X, BOXES), bad], ())


def test_crowds_alone_are_refused():
    boxes = torch.tensor([[[0.0, 0, 8, 8, 0, 1]]] * 2)
    with pytest.raises(ConfigError, match="boxes"):
        Detect().check(Fixed(torch.zeros(2, 3, 6)), [(X, boxes)], ())


def test_it_is_known_by_name():
    assert resolve("tasks", "detect") == Detect()
    assert resolve("tasks", "detect:ap").metric == "AP"
    assert resolve("tasks", "detect:ap75:first_label=1") == Detect("ap75", 1)
    assert resolve("tasks", "detect:ap").to_dict() == {
        "type": "Detect", "version": 1, "measure": "ap", "first_label": 0,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="Known: ap, ap50, ap75"):
        resolve("tasks", "detect:iou")
    assert pickle.loads(pickle.dumps(Detect("ap", 1))) == Detect("ap", 1)


def test_the_same_task_by_name_and_by_hand_finds_the_same_trials():
    assert str(resolve("tasks", "detect:ap:1").to_dict()) == str(Detect("ap", 1).to_dict())


def test_a_frame_lies_around_the_box():
    picture = torch.rand(3, 20, 30)
    before = picture.clone()
    made, plain = (outlined(picture, boxes) for boxes in ([([4, 5, 14, 13], (1.0, 0.0, 0.0))], []))
    assert torch.equal(picture, before)
    changed = (made != plain).any(0)
    wanted = torch.zeros(20, 30, dtype=torch.bool)
    wanted[5:14, 4:15] = True
    wanted[7:12, 6:13] = False
    assert torch.equal(changed, wanted)
    assert torch.equal(made[:, changed].unique(dim=1), torch.tensor([[1.0], [0], [0]]))


@pytest.mark.parametrize(
    "box", [(-50, -50, 500, 500), (3, 3, 3, 3), (3, 3, 4, 4), (40, 40, 60, 60), (9, 9, 2, 2)]
)
def test_a_frame_of_any_box_can_be_drawn(box):
    made = outlined(torch.rand(1, 10, 12), [(box, (1.0, 0.0, 0.0))])
    assert made.shape == (3, 10, 12)


def test_a_drawing_has_a_picture_for_the_truth_and_for_each_network():
    batch = batch_of([[[0, 0, 8, 8, 0, 0], [-1] * 6]])
    found = torch.tensor([[[0.0, 0, 8, 8, 0.9, 0], [0, 0, 8, 8, 0.1, 1]]])
    drawn = Detect().draw(batch, 0, {"a & b": found, "c": found[:, :0]}, ())
    assert drawn.count("data:image/png") == 3
    assert "truth: 1" in drawn
    assert "a &amp; b: 1 right of 1" in drawn
    assert "c: 0 right of 0" in drawn


# ---- an audit


@pytest.fixture(scope="module")
def cells():
    """Bright squares and dark ones, and a box around a crowd."""
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + 0.1 * torch.rand(12, 3, 64, 64, generator=generator)
    boxes = torch.full((12, 4, 6), -1.0)
    corners = torch.randint(0, 48, (12, 3, 2), generator=generator).tolist()
    for n, places in enumerate(corners):
        for k, (i, j) in enumerate(places[: 1 + n % 3]):
            x[n, :, i : i + 16, j : j + 16] += 0.4 - 0.8 * (k % 2)
            boxes[n, k] = torch.tensor([j, i, j + 16, i + 16, 2 * (k % 2), k == 2])
    cut = [(x[k : k + 4], boxes[k : k + 4]) for k in (0, 4, 8)]
    return Data("squares", cut[:2], cut[2:], ["light", "none", "dark"], note="Squares & others.")


@pytest.fixture(scope="module")
def small():
    """A detector after a few steps, so that it is neither right nor wrong throughout."""
    torch.manual_seed(0)
    return build("centre_detector", width=16).eval()


def test_an_audit_on_chips(cells, small, tmp_path):
    result = ek.audit(
        small, cells, task="detect", devices=["gaussian:0.05"], chips=2, workers=0,
        remedies=["none", "calibrate"], store=":memory:",
    )  # fmt: skip
    facts = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (result.metric, result.unit, result.digital_interval) == ("AP50", "%", None)
    assert facts["digital_figures"]["AP50"] == result.digital
    assert "AP75 dark" in facts["digital_figures"]
    assert not any("none" in name for name in facts["digital_figures"])
    assert "Squares & others." in result.notes
    page = result.report(tmp_path / "r.html").read_text()
    assert "Squares &amp; others." in page
    assert "a colour for each class" in page
    assert page.count('class="beside"') == 4
    assert Detect().value(evaluate(small, cells, Detect())) == pytest.approx(result.digital)


def test_balanced_arrays_can_be_audited(cells, small):
    result = ek.audit(
        small, cells, task="detect", devices=["gaussian:0.05"], chips=1, workers=0,
        remedies=["balance:arrays", "balance:arrays+calibrate"], store=":memory:",
    )  # fmt: skip
    assert result.cells[0].remedy == "balance:arrays"


def test_finished_trials_are_found_again(cells, small, tmp_path):
    def values(workers):
        result = ek.audit(
            small, cells, task=Detect("ap"), devices=["gaussian:0.1"], chips=2, workers=workers,
            remedies=["none"], store=tmp_path / "s.db",
        )  # fmt: skip
        return [result.digital, result.figures, *(cell.chips for cell in result.cells)]

    first = values(2)  # with workers, to which the task travels
    assert values(0) == first
