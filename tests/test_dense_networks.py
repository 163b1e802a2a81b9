"""A U-Net and a detector of centres: as networks, what they learn by, how pictures are varied."""

import copy
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evenkeel as ek
from evenkeel.audit.detect import Detect
from evenkeel.audit.run import evaluate
from evenkeel.audit.segment import Segment
from evenkeel.balance import balance_arrays_
from evenkeel.cli import main
from evenkeel.data import SETS, Data
from evenkeel.errors import ConfigError
from evenkeel.models import CentreDetector, UNet, build
from evenkeel.models.centre_detector import centre_loss
from evenkeel.models.norms import NORMS
from evenkeel.studies.teaching import TEACHING
from evenkeel.train import RECIPES, crops, fit, flipped_boxes, foreground_loss
from evenkeel.train.augment import flipped

NETWORKS = {
    "unet": lambda **options: build("unet", **{"width": 8, **options}),
    "centre_detector": lambda **options: build("centre_detector", **{"width": 16, **options}),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    """With weights and statistics that are not special, as after training; in eval mode."""
    return told_apart(NETWORKS[request.param]())


@torch.no_grad()
def told_apart(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
    return model.eval()


def pictures(number=2, side=64):
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(1))


def maps_of(model, x):
    """What a detector ranks: the order of near equals is a matter of rounding."""
    return (
        model.head(model.features(model.stem(x))) if isinstance(model, CentreDetector) else model(x)
    )


# ---- the networks as modules


def test_the_shapes_are_those_that_are_told():
    x = torch.rand(2, 3, 32, 64)
    assert build("unet")(x).shape == (2, 1, 32, 64)
    assert sum(p.numel() for p in build("unet").parameters()) == pytest.approx(482e3, rel=0.002)
    assert build("unet", num_classes=5, in_channels=1, width=8)(x[:, :1]).shape == (2, 5, 32, 64)
    detector = build("centre_detector", num_classes=2, width=16)
    assert detector(x).shape == (2, 6, 8, 16)
    assert detector.eval()(x).shape == (2, 100, 6)
    assert detector(x[..., :16, :16]).shape == (2, 32, 6)  # there are not more cells
    assert UNet(1, 3, widths=(4,))(torch.rand(1, 3, 5, 7)).shape == (1, 1, 5, 7)


def test_an_empty_batch(network):
    assert len(network(pictures(0))) == 0


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sides", [(60, 64), (64, 63), (1, 64)])
def test_sides_that_do_not_fit_are_refused(name, sides):
    with pytest.raises(ConfigError, match=r"multiples of (8|4|16); got .*Pad them"):
        NETWORKS[name]()(torch.rand(2, 3, *sides))


def test_the_sides_that_are_refused_are_those_of_the_pictures():
    with pytest.raises(ConfigError, match=r"multiples of 16; got \(64, 40\)"):
        build("centre_detector", width=16)(torch.rand(2, 3, 64, 40))


def test_a_saved_network_comes_back(network, tmp_path):
    ek.save(network, tmp_path / "n.safetensors")
    again = ek.load(tmp_path / "n.safetensors")
    assert not again.training
    assert torch.equal(again(pictures()), network(pictures()))
    assert again.architecture == network.architecture


def test_a_copy_is_by_itself(network):
    x, other = pictures(), copy.deepcopy(network)
    before = network(x)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    assert torch.equal(network(x), before)


def test_the_layout_in_memory_does_not_matter(network):
    x = pictures()
    there = copy.deepcopy(network).to(memory_format=torch.channels_last)
    got = maps_of(there, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, maps_of(network, x), rtol=1e-4, atol=1e-5)


def test_half_the_bits(network):
    x = pictures()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = maps_of(network, x)
        assert got.dtype == torch.bfloat16
        assert len(network(x)) == 2
    wanted = maps_of(network, x).detach()
    assert float((got - wanted).abs().mean() / wanted.std()) < 0.1
    loss = foreground_loss if wanted.shape[1] == 1 else centre_loss
    y = (
        torch.ones(2, 64, 64).long()
        if wanted.shape[1] == 1
        else torch.tensor([[[9.0, 9, 30, 30, 0, 0]]] * 2)
    )
    assert loss(got, y).dtype == torch.float32  # sums over pictures need it
    assert float(loss(got, y)) == pytest.approx(float(loss(wanted, y)), rel=0.05)


def test_all_the_bits(network):
    there, x = copy.deepcopy(network).double(), pictures().double()
    assert there(x).dtype == torch.float64


def test_it_can_be_exported(network):
    x = pictures()
    exported = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(exported(x), network(x))


@pytest.mark.parametrize("training", [False, True])
def test_it_can_be_compiled_whole(network, training):
    x = pictures()
    network.train(training)
    wanted = copy.deepcopy(network)(x)
    got = torch.compile(network, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_can_be_made_without_memory(name):
    with torch.device("meta"):
        network = NETWORKS[name]()
    assert {t.device.type for t in network.state_dict().values()} == {"meta"}
    assert network.eval()(torch.empty(2, 3, 64, 64, device="meta")).device.type == "meta"
    network = network.to_empty(device="cpu")
    network.load_state_dict(NETWORKS[name]().state_dict())


@pytest.mark.parametrize("norm", [*NORMS, "batch_kalman"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_normalizer_learns_and_comes_back(name, norm, tmp_path):
    options = {} if norm in ("group", "layer", "none") else {"normalization_batch": 2}
    network = NETWORKS[name](norm=norm, weight_standard=norm == "group", **options)
    x = pictures(4, 32)
    if name == "unet":
        y, loss = torch.randint(-1, 3, (4, 32, 32)), foreground_loss
    else:
        y, loss = torch.tensor([[[4.0, 5, 20, 15, 1, 0], [-1.0] * 6]] * 4), centre_loss
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    costs = []
    for _ in range(3):
        optimizer.zero_grad()
        cost = loss(network(x), y)
        cost.backward()
        assert all(
            p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters()
        )
        optimizer.step()
        costs.append(float(cost.detach()))
    assert costs[-1] < costs[0]
    network.eval()
    assert torch.equal(network(x), network(x))
    assert network(x).shape == ((4, 1, 32, 32) if name == "unet" else (4, 100, 6))
    ek.save(network, tmp_path / "n.safetensors")
    assert torch.equal(ek.load(tmp_path / "n.safetensors")(x), network(x))


def test_an_unknown_normalizer_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'batch_kalman'"):
        build("unet", norm="batch_kalmann")


@pytest.mark.parametrize("norm", ["group", "batch_channel"])
def test_a_width_that_makes_no_groups_is_refused(norm):
    with pytest.raises(ConfigError, match=r"[Gg]roup"):
        build("unet", width=4, norm=norm)


def test_balancing_leaves_the_outputs(network):
    x, balanced = pictures(), copy.deepcopy(network)
    done = ek.balance_(balanced, x)
    wanted = maps_of(network, x)
    torch.testing.assert_close(maps_of(balanced, x), wanted, rtol=1e-3, atol=1e-4)
    old, new = network.state_dict(), balanced.state_dict()
    assert sum(not torch.equal(old[k], new[k]) for k in old if k in new) > 5
    assert done.error < 1e-4


def test_balancing_for_arrays_leaves_the_outputs(network):
    x, balanced = pictures(), copy.deepcopy(network)
    done = balance_arrays_(balanced, [(x,)], forward=lambda model, batch: maps_of(model, batch[0]))
    torch.testing.assert_close(maps_of(balanced, x), maps_of(network, x), rtol=1e-3, atol=1e-4)
    assert sum(done.noise_after.values()) < sum(done.noise_before.values())


def test_detections_that_are_nearly_equal_do_not_hinder_the_balancing():
    """Rounding may change their order, and with it all that a row holds."""
    network = told_apart(NETWORKS["centre_detector"]())
    balance_arrays_(network, [(torch.rand(4, 3, 64, 64),)])


# ---- detections from maps


def planted(*objects, classes=3, height=8, width=10):
    """Maps in which there are just these: (row, column, class, score, box)."""
    maps = torch.full((1, classes + 4, height, width), -20.0, dtype=torch.float64)
    maps[:, classes:] = 0.7
    for i, j, label, score, (left, top, right, bottom) in objects:
        maps[0, label, i, j] = math.log(score / (1 - score))
        x, y = (left + right) / 2, (top + bottom) / 2
        maps[0, classes:, i, j] = torch.tensor(
            [x / 4 - j, y / 4 - i, (right - left) / 32, (bottom - top) / 32]
        )
    return maps


def test_what_was_planted_is_found():
    objects = [
        (1, 2, 0, 0.9, (2.0, 1.0, 15.0, 9.0)),
        (6, 9, 2, 0.8, (30.0, 20.0, 47.5, 31.25)),
        (0, 0, 1, 0.6, (-3.0, -5.0, 4.0, 6.0)),  # over the edge
        (7, 0, 0, 0.5, (0.0, 28.0, 2.0, 32.0)),
    ]
    detector = CentreDetector(3, widths=(4, 8), detections=6)
    found = detector.found(planted(*objects).float())
    wanted = [[*box, score, label] for _, _, label, score, box in objects]
    torch.testing.assert_close(found[0, :4], torch.tensor(wanted))
    assert float(found[0, 4:, 4].max()) < 1e-6
    assert found.shape == (1, 6, 6)


def test_the_lower_of_two_neighbours_is_no_object():
    box = (0.0, 0.0, 8.0, 8.0)
    near = planted(
        (3, 3, 1, 0.9, box), (4, 4, 1, 0.8, box), (4, 3, 0, 0.7, box), (1, 3, 1, 0.6, box)
    )
    found = CentreDetector(3, widths=(4, 8)).found(near)[0]
    found = found[found[:, 4] > 1e-3]
    # One of another class is another object, as is one two cells away.
    assert [round(float(row[4]), 4) for row in found] == [0.9, 0.7, 0.6]
    assert found[:, 5].tolist() == [1, 0, 1]


def test_sides_are_never_negative():
    maps = planted((3, 3, 0, 0.9, (10.0, 10.0, 8.0, 4.0)))
    left, top, right, bottom = CentreDetector(3, widths=(4, 8)).found(maps)[0, 0, :4].tolist()
    assert (left, top) == (right, bottom)


def test_boxes_of_many_precisions_are_found():
    found = CentreDetector(3, widths=(4, 8)).found(
        planted((3, 3, 0, 0.9, (8, 8, 24, 40))).bfloat16()
    )
    assert found.dtype == torch.float32
    assert found[0, 0, :4].tolist() == [8, 8, 24, 40]


def test_far_places_are_told_apart():
    """Rows and columns are counted in whole numbers, not in those of the scores."""
    maps = planted((300, 511, 0, 0.9, (2040.0, 1196.0, 2056.0, 1212.0)), height=304, width=512)
    assert CentreDetector(3, widths=(4, 8)).found(maps.float())[0, 0, :4].tolist() == [
        2040, 1196, 2056, 1212,
    ]  # fmt: skip


# ---- what a detector learns by


def by_loops(maps, boxes):
    """The loss as its formula has it, number by number."""
    maps, boxes = maps.tolist(), boxes.tolist()
    classes, height, width = len(maps[0]) - 4, len(maps[0][0]), len(maps[0][0][0])
    total, number = 0.0, sum(box[4] >= 0 for of_one in boxes for box in of_one)
    for of_map, of_one in zip(maps, boxes, strict=True):
        target = np.zeros((classes, height, width))
        for left, top, right, bottom, label, _ in of_one:
            if label < 0:
                continue
            w, h, x, y = (
                (right - left) / 4,
                (bottom - top) / 4,
                (left + right) / 8,
                (top + bottom) / 8,
            )
            j, i = (min(max(math.floor(v), 0), n - 1) for v, n in ((x, width), (y, height)))
            for p in range(height):
                for q in range(width):
                    sx, sy = max(0.09 * w, 0.5), max(0.09 * h, 0.5)
                    t = math.exp(-((q - j) ** 2) / (2 * sx * sx) - (p - i) ** 2 / (2 * sy * sy))
                    target[int(label), p, q] = max(target[int(label), p, q], t)
            given = [of_map[classes + k][i][j] for k in range(4)]
            wanted = [x - j, y - i, (right - left) / 32, (bottom - top) / 32]
            total += sum(abs(a - b) for a, b in zip(given, wanted, strict=True))
        for c in range(classes):
            for p in range(height):
                for q in range(width):
                    share, t = 1 / (1 + math.exp(-of_map[c][p][q])), target[c, p, q]
                    if t == 1:
                        total -= (1 - share) ** 2 * math.log(share)
                    else:
                        total -= (1 - t) ** 4 * share**2 * math.log(1 - share)
    return total / max(1, number)


def drawn(number=3, most=5):
    """Maps and boxes: at the border, outside of the picture, one upon another, and filled up."""
    maps = 2 * torch.randn(number, 6, 6, 8, dtype=torch.float64)
    corner = torch.rand(number, most, 2, dtype=torch.float64) * torch.tensor([40, 30]) - 8
    sides = 1 + 20 * torch.rand(number, most, 2, dtype=torch.float64)
    label = torch.randint(-1, 2, (number, most, 1)).double()
    boxes = torch.cat([corner, corner + sides, label, torch.zeros_like(label)], 2)
    boxes[0, 0, :5] = torch.tensor([30, 20, 40, 30, 1])  # its centre is beyond the last cell
    boxes[1, 1] = boxes[1, 0]
    boxes[-1, -1] = -1
    return maps, boxes


def test_the_loss_of_centres_is_its_formula():
    for _ in range(3):
        maps, boxes = drawn()
        assert float(centre_loss(maps, boxes)) == pytest.approx(by_loops(maps, boxes), rel=1e-5)


def test_the_loss_of_centres_keeps_the_precision_of_its_maps():
    maps, boxes = drawn()
    assert float(centre_loss(maps, boxes)) == pytest.approx(by_loops(maps, boxes), rel=1e-12)


def test_the_slopes_of_the_loss_of_centres():
    maps, boxes = drawn(2, 3)
    assert torch.autograd.gradcheck(lambda m: centre_loss(m, boxes), maps.requires_grad_())


@pytest.mark.parametrize("most", [0, 1, 3])
def test_pictures_without_boxes_teach_the_background(most):
    maps = torch.randn(2, 6, 4, 4, requires_grad=True)
    cost = centre_loss(maps, torch.full((2, most, 6), -1.0))
    cost.backward()
    assert float(cost.detach()) == pytest.approx(
        by_loops(maps.detach(), torch.full((2, 1, 6), -1.0)), rel=1e-5
    )
    assert bool((maps.grad[:, :2] >= 0).all())  # lower scores are better
    assert float(maps.grad[:, 2:].abs().sum()) == 0


def test_filling_up_does_not_matter():
    maps, boxes = drawn()
    filled = torch.cat([torch.full((3, 4, 6), -1.0).double(), boxes], 1)
    assert float(centre_loss(maps, filled)) == float(centre_loss(maps, boxes))


def test_extreme_scores_have_a_finite_loss():
    maps = torch.full((1, 5, 4, 4), 1e4)
    maps[0, :, :2] = -1e4
    maps.requires_grad_()
    cost = centre_loss(maps, torch.tensor([[[0.0, 0, 4, 4, 0, 0], [8.0, 8, 12, 12, 0, 0]]]))
    cost.backward()
    assert math.isfinite(cost.detach())
    assert bool(maps.grad.isfinite().all())


def test_the_best_maps_are_those_that_are_found_again():
    """Down the slope of the loss until the boxes come back."""
    boxes = torch.tensor([[[3.0, 2, 17, 12, 0, 0], [14.0, 12, 30, 23, 1, 0], [-1.0] * 6]])
    maps = torch.zeros(1, 6, 6, 8, requires_grad=True)
    optimizer = torch.optim.Adam([maps], 0.1)
    for _ in range(250):
        optimizer.zero_grad()
        centre_loss(maps, boxes).backward()
        optimizer.step()
    found = CentreDetector(2, widths=(4, 8)).found(maps.detach())
    task = Detect("ap75")
    assert task.value(task.gathered([task.score(found, (torch.zeros(1, 3, 24, 32), boxes))])) > 99


# ---- what a segmentation network learns by


def test_the_loss_of_the_foreground_is_its_formula():
    scores, objects = torch.randn(2, 1, 4, 5), torch.randint(-1, 4, (2, 4, 5))
    p = scores[:, 0].double().sigmoid()[objects >= 0].tolist()
    t = (objects[objects >= 0] > 0).tolist()
    entropy = -sum(math.log(a if b else 1 - a) for a, b in zip(p, t, strict=True)) / len(p)
    overlap = (2 * sum(a * b for a, b in zip(p, t, strict=True)) + 1) / (sum(p) + sum(t) + 1)
    assert float(foreground_loss(scores, objects)) == pytest.approx(entropy + 1 - overlap, rel=1e-5)


def test_the_slopes_of_the_loss_of_the_foreground():
    scores = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    objects = torch.randint(-1, 3, (2, 3, 4))
    assert torch.autograd.gradcheck(lambda s: foreground_loss(s, objects), scores)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64])
def test_objects_of_any_whole_numbers(kind):
    scores, objects = torch.randn(2, 1, 4, 5), torch.randint(0, 4, (2, 4, 5))
    wanted = foreground_loss(scores, objects)
    assert torch.equal(foreground_loss(scores, objects.to(kind)), wanted)


def test_what_is_not_known_does_not_count():
    scores = torch.randn(1, 1, 4, 5, requires_grad=True)
    objects = torch.randint(-1, 2, (1, 4, 5))
    foreground_loss(scores, objects).backward()
    assert torch.equal(scores.grad[:, 0] == 0, objects < 0)


def test_pictures_of_which_nothing_is_known_teach_nothing():
    scores = torch.randn(2, 1, 4, 5, requires_grad=True)
    cost = foreground_loss(scores, torch.full((2, 4, 5), -1))
    cost.backward()
    assert math.isfinite(cost.detach())
    assert float(scores.grad.abs().sum()) == 0


# ---- varied pictures


def numbered(number, height, width):
    """Bytes that tell picture, row and column in three channels, and a map of the same."""
    n, i, j = torch.meshgrid(*map(torch.arange, (number, height, width)), indexing="ij")
    return torch.stack([n, i, j], 1).byte(), 10_000 * n + 100 * i + j


def read_back(pixels, light=255.0):
    """The number that the map should have, from the pixels."""
    n, i, j = (light * pixels).round().long().unbind(1)
    return 10_000 * n + 100 * i + j


def test_pictures_are_flipped_as_their_maps_are():
    x, y = numbered(64, 7, 7)
    before = x.clone(), y.clone()
    made, map_ = flipped(x.float(), y, turn=True)
    assert torch.equal(read_back(made, 1), map_)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    ways = {tuple((m % 10_000).flatten().tolist()) for m in map_}
    assert len(ways) == 8  # all of a square
    assert torch.equal(map_.flatten(1).sort(1)[0], y.flatten(1).sort(1)[0])
    made, map_ = flipped(*numbered(64, 5, 7))
    assert torch.equal(read_back(made, 1), map_)
    assert len({tuple((m % 10_000).flatten().tolist()) for m in map_}) == 4


def test_windows_hold_a_picture_and_its_objects(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, rand=torch.rand: (
        torch.full(shape, 0.5) if len(shape) == 4 else rand(*shape)
    ))  # fmt: skip  # as light as it was
    x, y = numbered(40, 60, 50)
    before = x.clone(), y.clone()
    made, objects = crops(x, y, side=16)
    assert made.shape == (40, 3, 16, 16)
    assert objects.shape == (40, 16, 16)
    assert torch.equal(read_back(made), objects)
    assert torch.equal(objects[:, 0, 0] // 10_000, torch.arange(40))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    rows, columns = (objects % 10_000) // 100, objects % 100
    assert int((rows.amax((1, 2)) - rows.amin((1, 2))).max()) == 15
    assert (int(rows.min()), int(columns.min())) < (5, 5)
    assert int(rows.max()) > 50
    assert int(columns.max()) > 42


def test_windows_lie_in_what_is_known():
    x, y = numbered(30, 40, 40)
    y[:, 25:], y[:, :, 20:] = -1, -1
    assert int(crops(x, y, side=20)[1].min()) >= 0
    _, objects = crops(x, y, side=32)  # where that is too small, from its corner
    assert (objects >= 0).sum((1, 2)).tolist() == [25 * 20] * 30


def test_windows_have_the_side_that_is_asked_for():
    for sides in ((20, 20), (20, 40)):
        x, y = numbered(8, *sides)
        made, objects = crops(x, y, side=32)
        assert made.shape == (8, 3, 32, 32)
        assert objects.shape == (8, 32, 32)


def test_pictures_get_lighter_and_darker_by_a_fifth():
    x, y = torch.full((200, 1, 8, 8), 100, dtype=torch.uint8), torch.zeros(200, 8, 8).long()
    for made in (
        crops(x, y, 8)[0],
        flipped_boxes(x, torch.full((200, 1, 6), -1.0))[0][..., :8, :8],
    ):
        light = made.mean((1, 2, 3)) / (100 / 255)
        assert 0.8 <= float(light.min()) < 0.83
        assert 1.17 < float(light.max()) <= 1.2
        assert float(made.std((1, 2, 3)).max()) < 1e-6


def framed(number=60, height=40, width=50):
    """Pictures that are white where their one box is."""
    x, boxes = torch.zeros(number, 1, height, width), torch.full((number, 2, 6), -1.0)
    for k in range(number):
        left, top = int(torch.randint(0, 30, ())), int(torch.randint(0, 20, ()))
        x[k, :, top : top + 9, left : left + 14] = 255
        boxes[k, k % 2] = torch.tensor([left, top, left + 14, top + 9, k % 3, k % 2])
    return x.byte(), boxes


def test_boxes_are_flipped_with_their_pictures():
    x, boxes = framed()
    before = x.clone(), boxes.clone()
    made, found = flipped_boxes(x, boxes)
    assert made.shape == (60, 1, 64, 64)
    for k in range(60):
        left, top, right, bottom, label, crowd = found[k, k % 2].tolist()
        assert (right - left, bottom - top, label, crowd) == (14, 9, k % 3, k % 2)
        lit = torch.zeros(64, 64, dtype=torch.bool)
        lit[int(top) : int(bottom), int(left) : int(right)] = True
        assert torch.equal(made[k, 0] > 0.5, lit)
        assert found[k, 1 - k % 2, 4] == -1
    moved = (found[..., :2] != boxes[..., :2])[torch.arange(60), torch.arange(60) % 2]
    assert {tuple(row) for row in moved.tolist()} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert torch.equal(x, before[0])
    assert torch.equal(boxes, before[1])


def test_no_boxes_can_be_flipped_too():
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    made, found = flipped_boxes(x, torch.zeros(4, 0, 6))
    assert made.shape == (4, 3, 32, 32)
    assert found.shape == (4, 0, 6)
    assert flipped_boxes(x[:0], torch.zeros(0, 2, 6))[1].shape == (0, 2, 6)


@pytest.mark.parametrize("vary", ["crops", "flipped_boxes", "flipped"])
def test_the_same_seed_gives_the_same_pictures(vary):
    x, y = numbered(6, 16, 16)
    change = {
        "crops": lambda: crops(x, y, 8),
        "flipped_boxes": lambda: flipped_boxes(*framed(6)),
        "flipped": lambda: flipped(x, y, turn=True),
    }[vary]

    def drawn_with(seed):
        torch.manual_seed(seed)
        return change()

    one, same, other = drawn_with(1), drawn_with(1), drawn_with(2)
    assert all(map(torch.equal, one, same))
    assert not all(map(torch.equal, one, other))


# ---- training


def squares(number, side=32):
    """Bytes with a square each; its objects, and its box."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randint(0, 60, (number, 3, side, side), generator=generator).byte()
    y, boxes = torch.zeros(number, side, side).int(), torch.zeros(number, 1, 6)
    for k, (i, j) in enumerate(
        torch.randint(0, side - 12, (number, 2), generator=generator).tolist()
    ):
        x[k, :, i : i + 12, j : j + 12] += 150
        y[k, i : i + 12, j : j + 12] = 3
        boxes[k, 0, :4] = torch.tensor([j, i, j + 12, i + 12])
    return x, y, boxes


@pytest.mark.parametrize(("task", "steps", "rate"), [("segment", 16, 0.1), ("detect", 14, 0.02)])
def test_networks_learn_what_their_task_is(task, steps, rate):
    x, y, boxes = squares(32)
    taught = TEACHING[task]
    name = "unet" if task == "segment" else "centre_detector"
    options = {"num_classes": 1, "width": 8 if task == "segment" else 16}
    vary = (lambda x, y: crops(x, y, 32)) if task == "segment" else taught.vary
    target, losses = y if task == "segment" else boxes, []
    network = fit(
        lambda: build(name, **options), x, target, epochs=steps, batch_size=8, learning_rate=rate,
        vary=vary, loss=taught.loss, on_epoch=lambda facts: losses.append(facts["loss"]),
    )  # fmt: skip
    assert losses[-1] < losses[0] / 2
    x, y, boxes = squares(8)
    test = [(x.float() / 255, y if task == "segment" else boxes)]
    figure = taught.task.value(evaluate(network, Data("squares", test, test), taught.task))
    assert figure > 60


def test_inputs_and_labels_are_varied_together_and_behind_the_augmenting():
    seen = []

    def vary(x, y):
        seen.append((x.clone(), y.clone()))
        return -x, y

    def loss(output, y):
        assert torch.allclose(output.detach().flatten(), -2 * y, rtol=1e-2)
        return output.sum() * 0

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.weight

    x = torch.arange(8.0).view(8, 1)
    fit(
        Twice, x, x.flatten(), epochs=1, batch_size=4, augment=lambda x: 2 * x, vary=vary, loss=loss
    )
    assert len(seen) == 2
    assert all(torch.equal(a.flatten(), 2 * b) for a, b in seen)


def test_recipes_are_of_networks_and_sets_that_there_are():
    for name in ("nuclei", "bccd"):
        chosen = RECIPES[name]
        assert chosen.task in TEACHING
        assert SETS[chosen.data].read_train is not None
        assert build(chosen.architecture, norm=chosen.norm) is not None
    assert TEACHING["segment"].task == Segment()
    assert TEACHING["detect"].task == Detect()


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(task, tmp_path):
    x, y, boxes = squares(16)
    taught = TEACHING[task]
    target = y if task == "segment" else boxes
    name, width = ("unet", 8) if task == "segment" else ("centre_detector", 16)

    def trained(stop=None):
        def on_step(done, total):
            if done == stop:
                raise KeyboardInterrupt

        return fit(
            lambda: build(name, width=width), x, target, epochs=2, batch_size=8,
            learning_rate=0.01, loss=taught.loss, on_step=on_step,
            vary=(lambda x, y: crops(x, y, 16)) if task == "segment" else taught.vary,
            checkpoint=tmp_path / str(stop is None),
        )  # fmt: skip

    whole = trained()
    checkpoint = tmp_path / "False"
    with pytest.raises(KeyboardInterrupt):
        trained(stop=3)
    assert checkpoint.exists()
    (tmp_path / "True").unlink()
    checkpoint.rename(tmp_path / "True")
    again = trained()
    theirs = again.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in whole.state_dict().items())


# ---- from the command line


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["evenkeel", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Folders of pictures with masks and with boxes, and weights, in the working folder."""
    monkeypatch.chdir(tmp_path)
    x, y, boxes = squares(6, 64)
    files = []
    for k in range(6):
        part = "test" if k < 4 else "train"
        for kind, pixels in (("images", x[k].permute(1, 2, 0)), ("masks", 255 * (y[k] > 0))):
            folder = Path("masked") / part / kind
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy().astype(np.uint8)).save(folder / f"{k}.png")
        Path("boxed/images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[k].permute(1, 2, 0).numpy()).save(f"boxed/images/{k}.png")
        left, top, right, bottom = boxes[k, 0, :4].tolist()
        files.append((part, k, [left, top, right - left, bottom - top]))
    for part in ("test", "train"):
        facts = {
            "images": [{"id": k, "file_name": f"{k}.png"} for p, k, _ in files if p == part],
            "annotations": [
                {"id": k, "image_id": k, "category_id": 4, "bbox": box}
                for p, k, box in files if p == part
            ],
            "categories": [{"id": 4, "name": "square"}],
        }  # fmt: skip
        Path(f"boxed/instances_{part}.json").write_text(json.dumps(facts))
    torch.manual_seed(0)
    for name in ("unet", "centre_detector"):
        ek.save(build(name), f"{name}.safetensors")
    return tmp_path


QUICK = ("--device", "gaussian:0.05", "--chips", 2, "--remedy", "none,calibrate", "--workers", 0)


@pytest.mark.parametrize(
    ("network", "task", "folder", "metric"),
    [
        ("unet", "segment", "masked", "foreground IoU"),
        ("unet", "segment:ap", "masked", "object AP"),
        ("centre_detector", "detect", "boxed", "AP50"),
    ],
)
def test_a_folder_is_audited(network, task, folder, metric, here, monkeypatch, capsys):
    code, out, err = command(
        monkeypatch, capsys, "audit", network, "--weights", f"{network}.safetensors",
        "--task", task, "--data", folder, *QUICK, "--out", "result",
    )  # fmt: skip
    assert (code, err) == (0, "")
    facts = json.loads(Path("result/audit.json").read_text(), parse_constant=pytest.fail)
    assert facts["metric"] == metric
    assert facts["digital_figures"][metric] == facts["digital"]
    assert facts["provenance"]["test_samples"] == 4
    assert "The digital network in all: " in " ".join(out.split())
    assert "Report: file://" in out
    if task == "detect":
        assert "AP50 square" in facts["digital_figures"]
    assert isinstance(ek.load("result/mended.safetensors"), nn.Module)


def test_a_recipe_trains_on_a_set_in_its_folder(here, monkeypatch, capsys):
    Path("sets").mkdir()
    Path("masked").rename("sets/nuclei")
    for part in ("train", "test"):
        Path(f"sets/nuclei/{part}/masks").rename(f"sets/nuclei/{part}/instances")
    Path("boxed").rename("sets/bccd")
    Path("sets/bccd/instances_val.json").write_text("{}")
    for recipe, metric in (("nuclei", "foreground IoU"), ("bccd", "AP50")):
        code, out, err = command(
            monkeypatch, capsys, "train", recipe, "--data-root", "sets", "--out",
            f"{recipe}.safetensors", "--epochs", 1, "--batch-size", 2, "--precision", "32-true",
        )  # fmt: skip
        assert (code, err) == (0, "")
        log = json.loads(Path(f"{recipe}.json").read_text(), parse_constant=pytest.fail)
        assert log[f"test_{metric.replace(' ', '_')}"] == log["figures"][metric]
        assert log["test_samples"] == 4
        assert f"test {metric}" in " ".join(out.split())
        assert ek.load(f"{recipe}.safetensors")(torch.rand(1, 3, 32, 32)).shape[0] == 1
        assert not Path(f"{recipe}.checkpoint").exists()


BAD = {
    "boxes to segment": (("unet", "--task", "segment", "--data", "boxed"), "whole numbers"),
    "masks to detect in": (("centre_detector", "--task", "detect", "--data", "masked"), "N, M, 6"),
    "a detector to segment": (
        ("centre_detector", "--task", "segment", "--data", "masked"), "one for each pixel"
    ),
    "a U-Net to detect": (("unet", "--task", "detect", "--data", "boxed"), "needs outputs"),
    "another measure": (("unet", "--task", "segment:iuo", "--data", "masked"), "you mean 'iou'"),
    "masks to classify": (("unet", "--data", "masked"), "Classification needs outputs"),
    "mean of two": (
        ("unet", "--task", "segment", "--data", "masked", "--mean", "1,2"), "each of 3 channels"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_said_in_a_line(case, here, monkeypatch, capsys):
    (network, *arguments), says = BAD[case]
    code, out, err = command(
        monkeypatch, capsys, "audit", network, "--weights", f"{network}.safetensors", *arguments,
        *QUICK,
    )  # fmt: skip
    said = " ".join((out + err).split())
    assert code == 2
    assert re.search(says, said), said
    assert "Traceback" not in said
