"""Published data sets: their real files where they are at hand, and a server of our own."""

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evenkeel as ek
from evenkeel import data as datasets
from evenkeel.audit.run import evaluate
from evenkeel.audit.tasks import Classify
from evenkeel.batches import first
from evenkeel.data import labelled, sets
from evenkeel.data.folder import pictures_digest
from evenkeel.data.sets import SETS, StandardSet
from evenkeel.errors import ConfigError, StoreError


def real(name: str) -> Path:
    try:
        return datasets.folder_of(name)
    except ConfigError:
        pytest.skip(f"needs {name} under ${sets.ROOT_VARIABLE}")


def test_real_cifar10():
    data = SETS["cifar10"].read(real("cifar10"))
    assert data.test_samples == 10_000
    assert data.calibration_samples == 2600
    assert torch.bincount(torch.cat([y for _, y in data.test])).tolist() == [1000] * 10
    x, y = SETS["cifar10"].read_train(real("cifar10"))
    assert torch.bincount(y).tolist() == [5000] * 10
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-3)
    assert torch.equal(data.calibration[0][0], x[:200])
    assert len(data.calibration) == 13  # 13 batches of 200, the budget of Joshi et al.
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert set(datasets.check("cifar10").values()) == {"ok"}


def test_real_mnist():
    data = SETS["mnist"].read(real("mnist"))
    assert data.test_samples == 10_000
    assert data.test[0][1][:5].tolist() == [7, 2, 1, 0, 4]  # as everybody knows them
    x, y = SETS["mnist"].read_train(real("mnist"))
    assert x.shape == (60_000, 1, 28, 28)
    assert y[:5].tolist() == [5, 0, 4, 1, 9]
    assert set(datasets.check("mnist").values()) == {"ok"}


CHARACTERS = {
    ("official", "train"): 792, ("official", "validation"): 172, ("official", "test"): 659,
    ("vinyals", "train"): 1028, ("vinyals", "validation"): 172, ("vinyals", "test"): 423,
}  # fmt: skip


def test_real_omniglot():
    folder = real("omniglot")
    assert set(datasets.check("omniglot").values()) == {"ok"}
    data = datasets.omniglot(folder, "test", size=28)
    assert data.images.shape == (659 * 20, 1, 28, 28)
    assert len(data.classes) == 659
    ink = data.images.mean((1, 2, 3))
    assert data.images.median().item() == pytest.approx(0, abs=1e-6)  # paper
    assert data.images.amax((1, 2, 3)).min() > 0.3  # each has ink
    assert data.images.amax() == pytest.approx(1)
    assert 0.04 < ink.mean() < 0.15
    with pytest.raises(ConfigError, match="few-shot episodes"):
        datasets.read_set("omniglot")
    with pytest.raises(ConfigError, match="evenkeel fewshot train"):
        datasets.read_training_set("omniglot")


def test_real_omniglot_in_its_two_splits(monkeypatch):
    folder = real("omniglot")
    # The names decide; 32,460 pictures for each of six parts would take a minute.
    monkeypatch.setattr(labelled, "stacked", lambda files, *_: torch.zeros(len(files), 1, 1, 1))
    parts = {key: datasets.omniglot(folder, key[1], split=key[0]) for key in CHARACTERS}
    for key, number in CHARACTERS.items():
        assert len(parts[key].classes) == len(set(parts[key].classes)) == number, key
        assert torch.bincount(parts[key].labels).tolist() == [20] * number
    for split in ("official", "vinyals"):
        train, validation, test = (
            set(parts[split, part].classes) for part in ("train", "validation", "test")
        )
        assert not train & validation
        assert not (train | validation) & test
        assert len(train | validation | test) == 1623
        alphabets = [{name.split("/")[0] for name in p} for p in (train, validation, test)]
        both = alphabets[0] & alphabets[2]
        assert both == (set() if split == "official" else {"Gurmukhi"})
        assert not alphabets[1] & (alphabets[0] | alphabets[2])
        assert len(alphabets[1]) == 5
    validation = [parts[split, "validation"].classes for split in ("official", "vinyals")]
    assert validation[0] == validation[1]
    with pytest.raises(ConfigError, match="Did you mean 'vinyals'"):
        datasets.omniglot(folder, "test", split="vinyls")


def test_the_layouts_are_read_byte_for_byte(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    labels = np.array([3, 0, 9, 1], dtype=np.uint8)
    records = np.concatenate([labels[:, None], pixels.reshape(4, -1)], 1)
    for file in SETS["cifar10"].files:
        (tmp_path / file).write_bytes(records.tobytes())
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    (x, y), *_ = SETS["cifar10"].read(tmp_path).test
    assert y.tolist() == labels.tolist()
    back = x * torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
    back += torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    assert (back * 255).round().byte().numpy().tolist() == pixels.tolist()

    (tmp_path / "no-idx").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match="no idx file"):
        sets.mnist.__globals__["_idx"](tmp_path / "no-idx")


# Fetching, from a server that may cut a download off


@pytest.fixture
def small(monkeypatch):
    """A set of two files in a tar.gz and one in a .gz, in place of the published ones."""
    contents = {
        "a.bin": os.urandom(300_000), "b.bin": os.urandom(200_000), "c.bin": os.urandom(9)
    }  # fmt: skip
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as file:
        for name in ("a.bin", "b.bin"):
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(contents[name])
            file.addfile(info, io.BytesIO(contents[name]))
    archives = {"all.tar.gz": tar.getvalue(), "c.bin.gz": gzip.compress(contents["c.bin"])}
    for name, files in (("packed", ["a.bin", "b.bin"]), ("single", ["c.bin"])):
        archive = "all.tar.gz" if name == "packed" else "c.bin.gz"
        described = StandardSet(
            folder=name,
            files={f: hashlib.sha256(contents[f]).hexdigest() for f in files},
            urls=(f"http://nowhere.invalid/{archive}",),
            notice="",
            read=None,
            read_train=None,
        )
        monkeypatch.setitem(SETS, name, described)
    return contents, archives


@pytest.fixture
def server(small):
    """Serves the archives; ``cut`` bytes per reply at most, where set; notes each Range asked."""
    _, archives = small

    class Handler(BaseHTTPRequestHandler):
        cut, ranges, honour = None, [], True

        def do_GET(self):
            content = archives.get(self.path.strip("/"))
            if content is None:
                self.send_error(404)
                return
            asked = self.headers.get("Range")
            self.ranges.append(asked)
            start = int(asked[6:-1]) if asked and self.honour else 0
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            end = start + self.cut if self.cut else len(content)
            self.wfile.write(content[start:end])

        def log_message(self, *args):
            pass

    Handler.ranges = []
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", Handler
        http.shutdown()


def test_a_whole_set_is_fetched_once(small, server, tmp_path):
    url, handler = server
    folder = datasets.fetch("packed", tmp_path, mirror=url)
    assert {p.name for p in folder.iterdir()} == {"a.bin", "b.bin"}  # and nothing half-done
    assert (folder / "b.bin").read_bytes() == small[0]["b.bin"]
    assert datasets.check("packed", tmp_path) == {"a.bin": "ok", "b.bin": "ok"}
    datasets.fetch("packed", tmp_path, mirror=url)
    assert handler.ranges == [None]
    datasets.fetch("single", tmp_path, mirror=url)
    assert datasets.check("single", tmp_path) == {"c.bin": "ok"}


def test_a_download_that_breaks_off_is_continued(small, server, tmp_path):
    url, handler = server
    handler.cut = 120_000  # of about 500,000: five replies
    seen = []
    datasets.fetch(
        "packed", tmp_path, mirror=url, progress=lambda _, done, total: seen.append(done)
    )
    assert set(datasets.check("packed", tmp_path).values()) == {"ok"}
    assert handler.ranges[0] is None
    assert handler.ranges[1] == "bytes=120000-"
    assert seen == sorted(seen)


def test_the_next_call_continues_what_the_last_one_left(small, server, tmp_path):
    url, handler = server
    (tmp_path / "packed").mkdir()
    part = tmp_path / "packed" / ".all.tar.gz.part"
    part.write_bytes(small[1]["all.tar.gz"][:1000])
    datasets.fetch("packed", tmp_path, mirror=url)
    assert handler.ranges == ["bytes=1000-"]
    (tmp_path / "packed" / "a.bin").unlink()
    part.write_bytes(small[1]["all.tar.gz"])  # whole, but not unpacked yet
    datasets.fetch("packed", tmp_path, mirror=url)
    assert set(datasets.check("packed", tmp_path).values()) == {"ok"}


def test_a_server_without_ranges_starts_anew(small, server, tmp_path):
    url, handler = server
    handler.honour = False
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / ".all.tar.gz.part").write_bytes(b"x" * 1000)
    datasets.fetch("packed", tmp_path, mirror=url)
    assert set(datasets.check("packed", tmp_path).values()) == {"ok"}


def test_what_has_another_checksum_is_not_kept(small, server, tmp_path):
    url, _ = server
    small[1]["c.bin.gz"] = gzip.compress(b"another")
    with pytest.raises(ConfigError, match="another checksum"):
        datasets.fetch("single", tmp_path, mirror=url)
    assert list((tmp_path / "single").iterdir()) == []
    small[1]["c.bin.gz"] = b"no archive at all"
    with pytest.raises(ConfigError, match="no whole archive"):
        datasets.fetch("single", tmp_path, mirror=url)


def test_a_damaged_file_is_found_and_fetched_again(small, server, tmp_path):
    url, _ = server
    folder = datasets.fetch("packed", tmp_path, mirror=url)
    (folder / "a.bin").write_bytes(b"damaged")
    assert datasets.check("packed", tmp_path) == {"a.bin": "damaged", "b.bin": "ok"}
    datasets.fetch("packed", tmp_path, mirror=url)
    assert set(datasets.check("packed", tmp_path).values()) == {"ok"}


# A folder of images, in a .zip


def draw(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pictures(small, monkeypatch, tmp_path):
    """The published folder of a set of images, and the archives that are served."""
    folder = tmp_path / "published" / "images_all"
    numbers = np.random.default_rng(1)
    for name in ("a/one/1.png", "a/one/2.png", "a/two/1.png", "b/one/1.png"):
        draw(folder / name, numbers.integers(0, 256, (9, 9), dtype=np.uint8))
    described = StandardSet(
        folder="pictures",
        files={"images_all": pictures_digest(folder)},
        urls=("http://nowhere.invalid/images_all.zip",),
        notice="",
    )
    monkeypatch.setitem(SETS, "pictures", described)
    small[1]["images_all.zip"] = zipped(folder)
    return folder, small[1]


def zipped(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder.parent))
    return content.getvalue()


def test_a_folder_of_images_is_fetched_once(pictures, server, tmp_path):
    url, handler = server
    folder = datasets.fetch("pictures", tmp_path, mirror=url)
    assert [p.name for p in folder.iterdir()] == ["images_all"]  # and nothing half-done
    assert len(list(folder.rglob("*.png"))) == 4
    assert datasets.check("pictures", tmp_path) == {"images_all": "ok"}
    datasets.fetch("pictures", tmp_path, mirror=url)
    assert handler.ranges == [None]
    assert datasets.labelled_folder(folder / "images_all").classes == ("a/one", "a/two", "b/one")


def test_a_zip_whose_download_breaks_off_is_continued(pictures, server, tmp_path):
    url, handler = server
    handler.cut = 400
    datasets.fetch("pictures", tmp_path, mirror=url)
    assert handler.ranges[:2] == [None, "bytes=400-"]
    assert datasets.check("pictures", tmp_path) == {"images_all": "ok"}


def test_other_pictures_than_the_published_are_not_kept(pictures, server, tmp_path):
    url, _ = server
    published, archives = pictures
    draw(published / "a" / "one" / "1.png", np.zeros((9, 9), dtype=np.uint8))
    archives["images_all.zip"] = zipped(published)
    with pytest.raises(ConfigError, match="another checksum"):
        datasets.fetch("pictures", tmp_path, mirror=url)
    assert list((tmp_path / "pictures").iterdir()) == []
    published = published.rename(published.with_name("elsewhere"))
    archives["images_all.zip"] = zipped(published)  # without the folder that it should hold
    with pytest.raises(ConfigError, match="another checksum"):
        datasets.fetch("pictures", tmp_path, mirror=url)
    assert list((tmp_path / "pictures").iterdir()) == []


def test_a_zip_that_is_cut_off_is_said_to_be(pictures, server, tmp_path):
    url, _ = server
    whole = pictures[1]["images_all.zip"]
    pictures[1]["images_all.zip"] = whole[: len(whole) // 2]
    with pytest.raises(ConfigError, match="no whole archive"):
        datasets.fetch("pictures", tmp_path, mirror=url)
    assert list((tmp_path / "pictures").iterdir()) == []
    pictures[1]["images_all.zip"] = whole
    datasets.fetch("pictures", tmp_path, mirror=url)  # from its start
    assert datasets.check("pictures", tmp_path) == {"images_all": "ok"}


@pytest.mark.parametrize("name", ["pictures", "single"])
def test_an_archive_with_a_wrong_byte_is_said_to_be_damaged(name, pictures, server, tmp_path):
    url, _ = server
    archive = "images_all.zip" if name == "pictures" else "c.bin.gz"
    whole = bytearray(pictures[1][archive])
    header = 30 + int.from_bytes(whole[26:28], "little") if name == "pictures" else 10
    whole[header] |= 0b110  # of the first deflated block: a type that there is not
    pictures[1][archive] = bytes(whole)
    with pytest.raises(ConfigError, match="no whole archive"):
        datasets.fetch(name, tmp_path, mirror=url)


def with_a_pixel_changed(folder: Path) -> None:
    file = folder / "a" / "two" / "1.png"
    pixels = np.asarray(Image.open(file)).copy()
    pixels[0, 0] ^= 255
    draw(file, pixels)


def with_a_file_gone(folder: Path) -> None:
    (folder / "b" / "one" / "1.png").unlink()


def with_one_too_many(folder: Path) -> None:
    draw(folder / "b" / "two" / "1.png", np.zeros((9, 9), dtype=np.uint8))


def with_a_file_cut_off(folder: Path) -> None:
    file = folder / "a" / "one" / "2.png"
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize(
    "damage",
    [
        with_a_pixel_changed,
        with_a_file_gone,
        with_one_too_many,
        with_a_file_cut_off,
    ],
)
def test_a_damaged_folder_is_replaced(damage, pictures, server, tmp_path):
    url, _ = server
    folder = datasets.fetch("pictures", tmp_path, mirror=url)
    damage(folder / "images_all")
    assert datasets.check("pictures", tmp_path) == {"images_all": "damaged"}
    datasets.fetch("pictures", tmp_path, mirror=url)
    assert datasets.check("pictures", tmp_path) == {"images_all": "ok"}
    assert [p.name for p in folder.iterdir()] == ["images_all"]
    assert len(list(folder.rglob("*.png"))) == 4


def test_pixels_and_names_of_folders_make_the_checksum_and_names_of_files_do_not(
    pictures, tmp_path
):
    published, _ = pictures
    expected = pictures_digest(published)

    def after(change):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(published, tmp_path / "copy")
        change(tmp_path / "copy")
        return pictures_digest(tmp_path / "copy")

    def rename_files(root):
        for file in root.rglob("*.png"):
            file.rename(file.with_name(f"drawing {file.stem}.PNG"))

    def pack_otherwise(root):
        for file in root.rglob("*.png"):
            Image.open(file).save(file.with_suffix(".bmp"))
            file.unlink()

    def note(root):
        (root / "a" / "one" / "read me.txt").write_text("no picture")
        (root / "empty").mkdir()

    for change in (rename_files, pack_otherwise, note):
        assert after(change) == expected, change
    changes = [
        with_a_pixel_changed,
        with_a_file_gone,
        with_one_too_many,
        lambda root: (root / "b").rename(root / "c"),
        lambda root: (root / "a/one/1.png").rename(root / "a/two/2.png"),
    ]
    assert len({expected, *map(after, changes)}) == 6


def test_errors(server, tmp_path, monkeypatch):
    url, _ = server
    with pytest.raises(StoreError, match="404"):
        datasets.fetch("single", tmp_path, mirror=f"{url}/elsewhere")
    with pytest.raises(ConfigError, match="Did you mean 'cifar10'"):
        datasets.check("cifar", tmp_path)
    with pytest.raises(ConfigError, match="evenkeel data fetch mnist"):
        datasets.folder_of("mnist", tmp_path)
    monkeypatch.delenv(sets.ROOT_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="--data-root"):
        datasets.folder_of("mnist")


def test_the_committed_network_is_as_accurate_as_its_log_says():
    folder = Path(__file__).parents[1] / "results" / "cifar10"
    log = json.loads((folder / "resnet14.json").read_text())
    assert log["test_accuracy"] >= 84
    data = SETS["cifar10"].read(real("cifar10"))
    slice_ = datasets.Data("slice", first(data.test, 2000), data.calibration)
    task = Classify()
    value = task.value(evaluate(ek.load(folder / "resnet14.safetensors"), slice_, task))
    assert abs(value - log["test_accuracy"]) < 2.5  # 2,000 of the 10,000 images
