"""Labelled images, and drawings as another hand draws them."""

import numpy as np
import pytest
import torch
from PIL import Image

from evenkeel.data import LabelledImages, labelled_folder
from evenkeel.errors import ConfigError
from evenkeel.train import drawn_anew

DOUBLE = torch.float64
QUIET = pytest.mark.filterwarnings("ignore::UserWarning")  # fabric's own, of number of workers


# ---- labelled images


def draw(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


@pytest.fixture
def letters(tmp_path):
    """Three classes in two alphabets; each drawing has one grey value, by which it is known."""
    root = tmp_path / "letters"
    for value, name in enumerate(("b/y/2", "a/x/1", "a/x/2", "b/x/1", "b/y/1")):
        draw(root / f"{name}.png", np.full((6, 8), 51 * value))
    (root / "b" / "about.txt").write_text("no image")
    return root


def test_each_folder_with_images_is_a_class(letters):
    seen = []
    data = labelled_folder(letters, progress=lambda done, total: seen.append((done, total)))
    assert data.classes == ("a/x", "b/x", "b/y")
    assert data.labels.tolist() == [0, 0, 1, 2, 2]
    assert data.images.shape == (5, 1, 6, 8)
    values = data.images.mean((1, 2, 3))
    torch.testing.assert_close(values, torch.tensor([0.2, 0.4, 0.6, 0.8, 0.0]))
    assert seen == [(k, 5) for k in range(1, 6)]
    assert (len(data), data.channels) == (5, 1)
    torch.testing.assert_close(labelled_folder(letters, invert=True).images, 1 - data.images)
    draw(letters / "c" / "3.png", np.full((9, 5), 51))
    resized = labelled_folder(letters, size=4)
    assert resized.images.shape == (6, 1, 4, 4)
    torch.testing.assert_close(resized.images[:5], data.images[..., :4, :4])


def test_resizing_averages(tmp_path):
    fine = np.indices((32, 32)).sum(0) % 2 * 255  # a chess board of single pixels
    draw(tmp_path / "a" / "1.png", fine)
    image = labelled_folder(tmp_path, size=8).images[0, 0, 1:-1, 1:-1]
    torch.testing.assert_close(image, torch.full((6, 6), 0.5), rtol=0, atol=0.02)


def test_resized_pixels_stay_between_0_and_1(tmp_path):
    draw(tmp_path / "a" / "1.png", np.full((40, 40), 255))
    for invert in (False, True):
        images = labelled_folder(tmp_path, size=17, invert=invert).images
        assert 0 <= images.min() <= images.max() <= 1


def test_colour_has_three_channels(tmp_path):
    pixels = np.zeros((4, 4, 3))
    pixels[..., 2] = 255
    draw(tmp_path / "a" / "1.png", pixels)
    data = labelled_folder(tmp_path)
    assert data.channels == 3
    assert data.images.mean((0, 2, 3)).tolist() == [0, 0, 1]


def test_what_a_folder_of_images_lacks_is_said(letters, tmp_path):
    with pytest.raises(ConfigError, match=r"No folder .*none"):
        labelled_folder(tmp_path / "none")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"No images .*empty/CLASS/\*\.png"):
        labelled_folder(tmp_path / "empty")
    draw(letters / "c" / "odd.png", np.zeros((6, 6)))
    with pytest.raises(ConfigError, match="must have one shape"):
        labelled_folder(letters)
    draw(letters / "c" / "odd.png", np.zeros((6, 8, 3)))
    with pytest.raises(ConfigError, match="must have one shape"):
        labelled_folder(letters, size=4)
    (letters / "c" / "odd.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"odd\.png cannot be read as an image"):
        labelled_folder(letters, size=4)


def test_a_hidden_folder_is_no_class(letters):
    draw(letters / ".thumbnails" / "1.png", np.zeros((6, 8)))
    draw(letters / "a" / ".cache" / "1.png", np.zeros((6, 8)))
    assert labelled_folder(letters).classes == ("a/x", "b/x", "b/y")


def test_only_chosen_classes_stay(letters):
    data = labelled_folder(letters)
    chosen = data.only(lambda name: name.endswith("x"))
    assert chosen.classes == ("a/x", "b/x")
    assert chosen.labels.tolist() == [0, 0, 1]
    last = data.only(lambda name: name == "b/y")
    assert last.labels.tolist() == [0, 0]
    assert torch.equal(last.images, data.images[3:])
    with pytest.raises(ConfigError, match=r"None of 3 classes is chosen; .* a/x, b/x, b/y"):
        data.only(lambda name: False)


def test_turned_classes_are_further_ones():
    images = torch.rand(5, 1, 3, 3)
    data = LabelledImages(images, torch.tensor([0, 0, 1, 2, 2]), ("a", "b", "c"))
    turned = data.turned()
    assert len(turned) == 20
    assert len(set(turned.classes)) == 12
    for row in range(20):
        quarter, original = divmod(row, 5)
        name = turned.classes[turned.labels[row]]
        assert name == f"{data.classes[data.labels[original]]}/rot{90 * quarter:03d}"
        expected = np.rot90(images[original, 0].numpy(), quarter)
        assert (turned.images[row, 0].numpy() == expected).all()


# ---- drawings as another hand draws them


def drawings(n=64, size=32):
    x = torch.zeros(n, 1, size, size)
    x[:, :, 11:21, 14:18] = 1  # an upright bar in the middle
    return x


def test_drawings_drawn_anew_keep_shape_range_and_about_their_ink():
    x = drawings()
    out = drawn_anew(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6
    moved = (out - x).abs().mean((1, 2, 3)) / x.mean((1, 2, 3))
    assert moved.min() > 0.02  # all of them,
    assert 0.1 < moved.mean() < 1.5  # and not out of sight
    share = out.sum((1, 2, 3)) / x.sum((1, 2, 3))
    assert share.mean() == pytest.approx(1, abs=0.1)
    assert share.min() > 0.6
    assert share.max() < 1.6
    assert len({tuple(image.flatten().tolist()) for image in out}) == len(x)  # each its own way
    assert not drawn_anew(torch.zeros(3, 1, 16, 16)).any()
    colour = torch.rand(4, 3, 16, 16)[:, :1].expand(-1, 3, -1, -1)
    turned = drawn_anew(colour)
    assert torch.equal(turned[:, 0], turned[:, 2])  # all channels alike


def test_drawings_are_moved_by_no_more_than_said():
    size = 64
    place = torch.arange(size) - (size - 1) / 2
    dot = torch.zeros(2000, 1, size, size)
    dot[:, :, 31:33, 31:33] = 1
    out = drawn_anew(dot)[:, 0]
    ink = out.sum((1, 2))
    for axis in (1, 2):
        moved = (out.sum(3 - axis) * place).sum(1) / ink / size
        assert moved.abs().max() < 0.06 * 1.4  # the slant and stretch act on the shift as well
        assert moved.std() == pytest.approx(0.06 / 3**0.5, rel=0.2)
    bar = torch.zeros(2000, 1, size, size)
    bar[:, :, 12:52, 31:33] = 1
    out = drawn_anew(bar)[:, 0]
    rows = (out * place).sum(2) / out.sum(2).clamp_min(1e-6)  # where the bar is in each row
    tilt = torch.atan((rows[:, 40] - rows[:, 24]) / 16).rad2deg()
    assert tilt.abs().max() < 35
    assert 5 < tilt.std() < 15


def test_drawings_follow_the_global_seed():
    x = drawings(8)
    torch.manual_seed(5)
    first = drawn_anew(x)
    assert not torch.equal(first, drawn_anew(x))
    torch.manual_seed(5)
    assert torch.equal(first, drawn_anew(x))


def test_drawings_of_another_dtype_are_drawn_anew_too():
    assert drawn_anew(drawings(2).double()).dtype == DOUBLE
