"""Pictures with masks, and pictures with boxes: folders of them, and the published ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from evenkeel import data as datasets
from evenkeel.audit.detect import Detect
from evenkeel.audit.segment import Segment
from evenkeel.cli.samples import samples_from
from evenkeel.data import Data, coco_detection, image_masks, sets
from evenkeel.data.coco import training_pictures
from evenkeel.data.masks import is_mask_folder, training_pairs
from evenkeel.data.sets import SETS
from evenkeel.data.shapes import batched_by_shape, mixed_batches, padded, spread
from evenkeel.errors import ConfigError


def real(name: str) -> Path:
    try:
        return datasets.folder_of(name)
    except ConfigError:
        pytest.skip(f"needs {name} under ${sets.ROOT_VARIABLE}")


def draw(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(path)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- shapes


def test_sides_grow_to_the_next_multiple():
    x = torch.rand(3, 33, 64)
    made = padded(x, value=-1)
    assert made.shape == (3, 64, 64)
    assert torch.equal(made[:, :33], x)
    assert bool((made[:, 33:] == -1).all())
    assert torch.equal(padded(made), made)
    assert padded(torch.zeros(5, 7, dtype=torch.int32), (6, 9), -1)[5].tolist() == [-1] * 9


def test_batches_have_one_shape_and_lose_nothing():
    shapes = [(1, 32, 32), (1, 32, 64), (1, 32, 32), (1, 32, 32), (1, 32, 64)]
    images = [torch.full(shape, float(k)) for k, shape in enumerate(shapes)]
    numbers = [torch.tensor(k) for k in range(5)]
    batches = batched_by_shape(images, numbers, 2)
    assert [y.tolist() for _, y in batches] == [[0, 2], [1, 4], [3]]  # as each one is full
    for x, y in batches:
        assert x.amax((1, 2, 3)).tolist() == y.tolist()


@pytest.mark.parametrize(("number", "wanted"), [(10, 4), (4, 10), (7, 7), (1, 1), (100, 64)])
def test_samples_are_spread_evenly(number, wanted):
    rows = spread(number, wanted)
    assert len(set(rows)) == min(number, wanted)
    assert rows == spread(number, wanted)
    steps = np.diff([*sorted(rows), number])
    assert min(steps) >= 1
    assert max(steps) - min(steps) <= 1


# ---- masks


@pytest.fixture
def pairs(tmp_path):
    """Two shapes, grey and colour, 8 and 16 bits, and masks of every kind."""
    for part in ("test", "train"):
        folder = tmp_path / part
        draw(folder / "images" / "a.png", noise(20, 40))
        draw(folder / "images" / "b.jpg", noise(33, 32, 3))
        draw(folder / "images" / "c.png", noise(20, 40).astype(np.uint16) * 257)
        draw(folder / "instances" / "a.png", np.eye(20, 40, dtype=np.uint16) * 999)  # above 255
        draw(folder / "instances" / "b.png", np.full((33, 32), 7, dtype=np.uint8))
        palette = Image.fromarray(np.eye(20, 40, dtype=np.uint8) * 5).convert("P")
        palette.putdata(list((np.eye(20, 40, dtype=np.uint8) * 5).ravel()))
        draw(folder / "instances" / "c.png", palette)
    return tmp_path


def by_size(data):
    """Pictures and objects by the area that counts."""
    items = [item for x, y in data.test for item in zip(x, y, strict=True)]
    return sorted(items, key=lambda item: int((item[1] >= 0).sum()))


def test_pictures_and_masks_are_read_together(pairs):
    data = image_masks(pairs)
    assert (data.test_samples, data.calibration_samples) == (3, 3)
    a, c, b = by_size(data)
    assert {tuple(x.shape) for x, _ in (a, b, c)} == {(3, 32, 64), (3, 64, 32)}
    assert a[1].dtype == torch.int32
    for x, y in (a, c):
        assert y.unique().tolist() in ([-1, 0, 999], [-1, 0, 5])
        assert torch.equal(y[:20, :40] > 0, torch.eye(20, 40, dtype=torch.bool))
        assert bool((y[20:] == -1).all())
        assert bool((y[:, 40:] == -1).all())
        assert float(x[:, 20:].abs().max() + x[:, :, 40:].abs().max()) == 0
        torch.testing.assert_close(x[0, :20, :40], torch.from_numpy(noise(20, 40) / 255).float())
        assert torch.equal(x[0], x[2])  # grey, and one of the three is in colour
    assert b[1].unique().tolist() == [-1, 7]
    Segment().check(torch.nn.Conv2d(3, 1, 1), data.test, ())


def test_grey_pictures_stay_grey(pairs):
    for part in ("test", "train"):
        (pairs / part / "images" / "b.jpg").unlink()
    assert {x.shape[1] for x, _ in image_masks(pairs).test} == {1}


def test_zeros_are_added_behind_the_normalizing(pairs):
    data = image_masks(pairs, mean=(0.5, 0.4, 0.3), std=(0.2,))
    plain = image_masks(pairs)
    for (x, y), (before, _) in zip(data.test, plain.test, strict=True):
        unknown = (y < 0)[:, None].expand_as(x)
        wanted = (before - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.2
        torch.testing.assert_close(x, wanted.masked_fill(unknown, 0.0))


def test_of_masks_what_hangs_together_is_an_object(tmp_path):
    mask = np.zeros((6, 9), dtype=np.uint8)
    mask[0, :3], mask[2:4, 5:7] = 255, 1
    for part in ("test", "train"):
        draw(tmp_path / part / "images" / "a.png", noise(6, 9))
        draw(tmp_path / part / "masks" / "a.png", mask)
    ((_, objects),) = image_masks(tmp_path).test
    assert objects.unique().tolist() == [-1, 0, 1, 2]
    found = objects[0, :6, :9].numpy()
    assert np.array_equal(found > 0, mask > 0)
    assert len(np.unique(found[0, :3])) == len(np.unique(found[2:4, 5:7])) == 1
    for part in ("test", "train"):  # of one bit, a tiff, and in its place instances come first
        draw(tmp_path / part / "masks" / "a.png", Image.fromarray(mask > 0))
    assert torch.equal(image_masks(tmp_path).test[0][1] > 0, objects > 0)
    for part in ("test", "train"):
        draw(tmp_path / part / "instances" / "a.tif", mask.astype(np.int32) * 70_000)
    assert image_masks(tmp_path).test[0][1].amax() == 255 * 70_000


def test_objects_that_touch_by_a_corner_are_one_as_they_are_where_they_are_seen(tmp_path):
    for part in ("test", "train"):
        draw(tmp_path / part / "images" / "a.png", noise(32, 32))
        draw(tmp_path / part / "masks" / "a.png", np.eye(32, dtype=np.uint8))
    data = image_masks(tmp_path)
    seen = torch.where(data.test[0][1] > 0, 1.0, -1.0)[:, None]
    task = Segment("ap")
    assert task.value(task.score(seen, data.test[0])) == 100


def test_val_and_calibration_stand_in(pairs):
    (pairs / "test").rename(pairs / "val")
    (pairs / "train").rename(pairs / "calibration")
    assert is_mask_folder(pairs)
    assert image_masks(pairs, calibration_samples=2).calibration_samples == 2
    assert samples_from(str(pairs)).test_samples == 3


def test_what_a_network_is_trained_on(pairs):
    x, y = training_pairs(pairs)
    assert (x.dtype, x.shape, y.shape) == (torch.uint8, (3, 3, 33, 40), (3, 33, 40))
    assert torch.equal(x[0, 0, :20], torch.from_numpy(noise(20, 40)))
    assert torch.equal(x[0], x[2])  # 16 bits of the same
    assert y[0, 20:].unique().tolist() == [-1]
    assert int(x[0, :, 20:].max()) == 0
    with pytest.raises(ConfigError, match="train"):
        training_pairs(pairs / "test")


def without(*files):
    def change(root):
        for file in files:
            (root / "test" / file).unlink()

    return change  # fmt: skip


def with_(file, pixels):
    return lambda root: draw(root / "test" / file, pixels)


def emptied(root):
    for file in (root / "test" / "instances").iterdir():
        file.unlink()
    (root / "test" / "instances").rmdir()


SPOILED = {
    "no mask": (without("instances/a.png"), r"a.png has no mask .*instances/a.png"),
    "another size": (with_("instances/a.png", noise(20, 41)), r"size of its image, \(20, 40\).*41"),
    "colour mask": (with_("instances/a.png", noise(20, 40, 3)), r"one whole number.*grey or a pal"),
    "float mask": (
        lambda root: (
            draw(root / "test/instances/a.tif", np.ones((20, 40), dtype=np.float32)),
            (root / "test/instances/a.png").unlink(),
        ), "whole number.*float32",
    ),
    "broken mask": (
        lambda root: (root / "test/instances/a.png").write_bytes(b"no"), "a.png cannot be read"
    ),
    "cut mask": (
        lambda root: (root / "test/instances/b.png").write_bytes(
            (root / "test/instances/b.png").read_bytes()[:40]
        ), "b.png cannot be read",
    ),
    "broken image": (
        lambda root: (root / "test/images/a.png").write_bytes(b"no"), "images/a.png cannot be read"
    ),
    "no images": (
        without("images/a.png", "images/b.jpg", "images/c.png"), "test/images holds none"
    ),
    "no masks": (emptied, r"instances/NAME.png or .*there are no masks"),
    "no train": (lambda root: (root / "train").rename(root / "more"), r"calibration.*train"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_masks_that_do_not_fit_are_refused(case, pairs):
    spoil, says = SPOILED[case]
    spoil(pairs)
    with pytest.raises(ConfigError, match=says):
        image_masks(pairs)
    with pytest.raises(ConfigError, match=says):
        samples_from(str(pairs))


def test_numbers_that_do_not_fit_are_refused(pairs):
    with pytest.raises(ConfigError, match="1 or more; got 0"):
        image_masks(pairs, calibration_samples=0)
    with pytest.raises(ConfigError, match="one for each of 3 channels"):
        image_masks(pairs, mean=(0.1, 0.2))


# ---- boxes


def described(*names, categories=((7, "red"), (2, "white")), annotations=(), **about):
    return {
        "images": [{"id": 10 * k, "file_name": name} for k, name in enumerate(names, 1)],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [
            {"id": k, "image_id": image, "category_id": kind, "bbox": list(box), **more}
            for k, (image, kind, box, *rest) in enumerate(annotations)
            for more in (rest or [{}])
        ],
        **about,
    }


TEST = described("a.png", "b.jpg", annotations=[
    (10, 7, (1, 2, 10, 20)), (10, 2, (4.5, 5, 6, 7), {"iscrowd": 1}), (10, 7, (3, 3, 0, 5)),
    (10, 7, (3, 3, 5, -1)),
])  # fmt: skip


@pytest.fixture
def boxes(tmp_path):
    draw(tmp_path / "images" / "a.png", noise(40, 60))
    draw(tmp_path / "images" / "b.jpg", noise(40, 60, 3))
    (tmp_path / "instances_test.json").write_text(json.dumps(TEST))
    (tmp_path / "instances_train.json").write_text(json.dumps(TEST))
    return tmp_path


def test_boxes_are_read_as_coco_means_them(boxes):
    data = coco_detection(boxes)
    assert list(data.classes) == ["white", "red"]  # by their ids
    ((x, y),) = data.test
    assert x.shape == (2, 3, 64, 64)
    torch.testing.assert_close(x[0, 1, :40, :60], torch.from_numpy(noise(40, 60) / 255).float())
    assert float(x[:, :, 40:].abs().max() + x[..., 60:].abs().max()) == 0
    assert y[0].tolist() == [[1, 2, 11, 22, 1, 0], [4.5, 5, 10.5, 12, 0, 1]]
    assert y[1, :, 4].tolist() == [-1, -1]  # a picture without any
    assert y.dtype == torch.float32
    output = torch.zeros(2, 3, 6)
    assert Detect().score(output, (x, y))[1][0].shape == (0, 6)


def test_boxes_grow_with_their_pictures(boxes):
    ((x, y),) = coco_detection(boxes, size=(80, 30)).test
    assert x.shape == (2, 3, 96, 32)
    assert y[0, 0].tolist() == [0.5, 4, 5.5, 44, 1, 0]
    wanted = F.interpolate(
        torch.from_numpy(noise(40, 60) / 255).float()[None, None], (80, 30), mode="bilinear",
        antialias=True,
    )[0, 0]  # fmt: skip
    torch.testing.assert_close(x[0, 0, :80, :30], wanted.clamp(0, 1))


def test_a_box_stays_around_what_it_is_around(tmp_path):
    picture = np.zeros((40, 80), dtype=np.uint8)
    picture[8:24, 16:32] = 255
    draw(tmp_path / "a.png", picture)
    facts = json.dumps(described("a.png", annotations=[(10, 2, (16, 8, 16, 16))]))
    for part in ("val", "train"):
        (tmp_path / f"instances_{part}.json").write_text(facts)
    ((x, y),) = coco_detection(tmp_path, size=(20, 120)).test
    left, top, right, bottom = (int(v) for v in y[0, 0, :4])
    assert float(x[0, 0, top:bottom, left:right].mean()) > 0.9
    assert float(x.sum() / 3 - x[0, 0, top:bottom, left:right].sum()) < 0.1 * float(x.sum() / 3)


def test_the_names_of_coco_itself(tmp_path):
    for part, name in (("val2017", "000000000139.jpg"), ("train2017", "000000000009.jpg")):
        draw(tmp_path / part / name, noise(32, 32, 3))
        file = tmp_path / "annotations" / f"instances_{part}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(described(name, annotations=[(10, 2, (1, 1, 5, 5))])))
    for data in (coco_detection(tmp_path), samples_from(str(tmp_path))):
        assert (data.test_samples, data.calibration_samples) == (1, 1)
        assert data.shared_samples() == 1  # the same noise


def test_training_is_not_on_what_is_tested_on_too(boxes):
    (boxes / "instances_trainval.json").write_text(json.dumps(described("a.png", "b.jpg", "c.png")))
    assert coco_detection(boxes).calibration_samples == 2
    (boxes / "instances_train.json").unlink()
    with pytest.raises(ConfigError, match=r"instances_train\.json"):
        coco_detection(boxes)


def test_what_a_detector_is_trained_on(boxes):
    x, y = training_pictures(boxes, (40, 60))
    assert (x.dtype, x.shape, y.shape) == (torch.uint8, (2, 3, 40, 60), (2, 2, 6))
    assert torch.equal(x[0, 2], torch.from_numpy(noise(40, 60)))
    (boxes / "instances_train.json").unlink()
    with pytest.raises(ConfigError, match=r"instances_train\.json; it is not there"):
        training_pictures(boxes, (40, 60))


def changed(**facts):
    return lambda root: (root / "instances_test.json").write_text(json.dumps({**TEST, **facts}))


def nameless(root):
    facts = json.loads(json.dumps(TEST))
    del facts["images"][0]["file_name"]
    (root / "instances_test.json").write_text(json.dumps(facts))


def test_the_least_that_a_file_may_hold(boxes):
    facts = described("b.jpg", categories=[(1, "cell")])
    for part in ("test", "train"):
        (boxes / f"instances_{part}.json").write_text(json.dumps(facts))
    ((_, y),) = coco_detection(boxes).test
    assert y.tolist() == [[[-1] * 6]]


SPOILED_BOXES = {
    "no JSON": (lambda r: (r / "instances_test.json").write_text("{"), "be a COCO detection"),
    "no text": (lambda r: (r / "instances_test.json").write_bytes(b"\xff\xfe\xff"), "be a COCO"),
    "a list": (lambda r: (r / "instances_test.json").write_text("[]"), "images, annotations and"),
    "no images": (changed(images=[], annotations=[]), "lists no images"),
    "no categories": (
        lambda r: (r / "instances_test.json").write_text(json.dumps(
            {k: v for k, v in TEST.items() if k != "categories"}
        )), "KeyError: 'categories'",
    ),
    "other category": (
        changed(annotations=[{"image_id": 10, "category_id": 3, "bbox": [1, 1, 2, 2]}]), "KeyErr"
    ),
    "other image": (
        changed(annotations=[{"image_id": 3, "category_id": 7, "bbox": [1, 1, 2, 2]}]), "KeyError"
    ),
    "three numbers": (
        changed(annotations=[{"image_id": 10, "category_id": 7, "bbox": [1, 1, 2]}]), "unpack"
    ),
    "null": (
        changed(annotations=[{"image_id": 10, "category_id": 7, "bbox": None}]), "must be a COCO"
    ),
    "nameless": (nameless, "file_name"),
    "lost": (lambda r: (r / "images" / "a.png").unlink(), "names a.png, which is in none of"),
    "broken": (lambda r: (r / "images" / "a.png").write_bytes(b"no"), "cannot be read"),
    "categories": (
        changed(categories=[{"id": 7, "name": "x"}, {"id": 2, "name": "y"}]), "same categories"
    ),
    "no train": (lambda r: (r / "instances_train.json").unlink(), "needs .*instances_train.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED_BOXES)
def test_boxes_that_do_not_fit_are_refused(case, boxes):
    spoil, says = SPOILED_BOXES[case]
    spoil(boxes)
    with pytest.raises(ConfigError, match=says):
        coco_detection(boxes)


# ---- from a name


def test_a_folder_of_boxes_is_known(boxes):
    data = samples_from(str(boxes), mean="0.5", std="0.25")
    assert data.classes == ["white", "red"]
    assert float(data.test[0][0].min()) == pytest.approx(-2)


def test_a_folder_of_masks_is_known(pairs):
    data = samples_from(str(pairs), mean="0.5", std="0.25")
    assert data.test[0][1].dtype == torch.int32
    assert min(float(x.min()) for x, _ in data.test) == pytest.approx(-2)


def test_a_class_may_have_any_name(tmp_path):
    for part in ("test", "train"):
        for name in ("images", "words"):
            draw(tmp_path / part / name / "1.png", noise(8, 8))
    assert samples_from(str(tmp_path)).classes == ["images", "words"]


def test_the_refusal_tells_of_every_layout():
    with pytest.raises(ConfigError, match=r"CLASS.*masks.*instances_"):
        samples_from("nowhere")


def test_a_note_stays_with_its_data():
    x = torch.rand(4, 1)
    data = Data("it", [(x, x)], [(x, x)], note="Mind this.")
    assert data.limited(test=2).note == "Mind this."
    assert datasets.as_data(data, [(x, x)]).note == "Mind this."
    assert data.fingerprint() == Data("it", [(x, x)], [(x, x)]).fingerprint()


# ---- published sets


@pytest.mark.parametrize("name", ["nuclei", "bccd"])
def test_what_is_nowhere_offered_says_where_to_put_it(name, tmp_path):
    with pytest.raises(ConfigError, match=f"below the data root yourself: {name}/"):
        datasets.fetch(name, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert set(datasets.check(name, tmp_path).values()) == {"missing"}
    with pytest.raises(ConfigError, match="not complete") as refused:
        datasets.folder_of(name, tmp_path)
    assert "data fetch" not in str(refused.value)  # which does not help here


def test_real_nuclei():
    folder = real("nuclei")
    data = SETS["nuclei"].read(folder)
    assert (data.test_samples, data.calibration_samples, data.shared_samples()) == (110, 256, 0)
    assert "own" in data.note
    assert {x.shape[1] for x, _ in data.test} == {3}
    assert all(side % 32 == 0 for x, _ in data.test for side in x.shape[2:])
    for x, y in data.test:
        assert x.shape[0] == y.shape[0]
        assert x.shape[2:] == y.shape[1:]
        assert float(x.masked_select((y < 0)[:, None].expand_as(x)).abs().sum()) == 0
        assert bool((y > 0).any((1, 2)).all())
    assert min(float(x.min()) for x, _ in data.test) >= 0
    assert max(float(x.max()) for x, _ in data.test) <= 1


def test_real_blood_cells():
    data = SETS["bccd"].read(real("bccd"))
    assert (data.test_samples, data.calibration_samples, data.shared_samples()) == (72, 205, 0)
    assert len(data.classes) == 3
    assert "no box" in data.note
    boxes = torch.cat([y.flatten(0, 1) for _, y in data.test])
    boxes = boxes[boxes[:, 4] >= 0]
    assert {x.shape[1:] for x, _ in data.test} == {(3, 256, 320)}
    assert bool((boxes[:, 2:4] > boxes[:, :2]).all())
    assert bool((boxes[:, :2] >= -1).all())
    assert float(boxes[:, 2].max()) <= 321
    assert float(boxes[:, 3].max()) <= 241  # what is below was added
    counts = torch.bincount(boxes[:, 4].long())
    assert data.classes[int(counts.argmax())].lower().startswith("r")  # most cells are red
    assert boxes[:, 5].sum() == 0


@pytest.mark.parametrize("name", ["nuclei", "bccd"])
def test_the_real_files_are_those_that_are_meant_and_need_not_be_fetched(name):
    folder = real(name)
    assert set(datasets.check(name).values()) == {"ok"}
    assert datasets.fetch(name, folder.parent) == folder


def test_images_of_one_shape_are_calibrated_with_as_they_are_tested_on():
    images = [torch.rand(3, 40, 50) for _ in range(5)]
    ((together,),) = mixed_batches(images)
    (tested,), _ = batched_by_shape([padded(x) for x in images], images), None
    assert torch.equal(together, tested[0])
    assert together.shape == (5, 3, 64, 64)


def test_images_of_many_shapes_are_calibrated_with_in_one():
    images = [torch.rand(3, 40 + 30 * k, 100 - 10 * k) for k in range(4)]
    batches = mixed_batches(images, batch=3)
    assert [tuple(x.shape) for (x,) in batches] == [(3, 3, 32, 64), (1, 3, 32, 64)]
    assert torch.equal(batches[0][0][0], images[0][:, 4:36, 18:82])


def test_pictures_to_calibrate_with_need_no_masks(pairs):
    with_masks = image_masks(pairs).fingerprint()
    shutil.rmtree(pairs / "train" / "instances")
    assert image_masks(pairs).fingerprint() == with_masks
