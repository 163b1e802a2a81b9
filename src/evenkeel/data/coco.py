"""Images with boxes, in the layout of COCO's detection sets."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evenkeel.data.dataset import Data
from evenkeel.data.folder import normalized, pixels_of
from evenkeel.data.shapes import UNKNOWN, batched_by_shape, mixed_batches, padded, spread
from evenkeel.errors import ConfigError

CALIBRATION = 256


def annotation_file(root: Path, *parts: str) -> Path | None:
    """``instances_PART*.json`` of the first part that there is, below a folder or annotations/."""
    for part in parts:
        for folder in (root, root / "annotations"):
            # instances_trainval.json is none of train.
            names = (p for p in folder.glob(f"instances_{part}*.json"))
            if found := sorted(
                p for p in names if not p.stem[len(f"instances_{part}") :][:1].isalpha()
            ):
                return found[0]
    return None


def coco_detection(
    root: str | Path,
    *,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    calibration_samples: int = CALIBRATION,
) -> Data:
    """Read ``root/instances_test.json`` to test on, and ``instances_train.json`` to calibrate with.

    ``val`` stands in for ``test``, the files may lie in ``annotations``, and names may go on, as in
    ``instances_val2017.json``. Images lie in ``images``, in a folder of the part's name, such as
    ``val2017``, or in ``root``. Classes are numbered in the order of their ids.

    Args:
        root: the folder.
        size: height and width to resize to, boxes too; default: as they are, with sides padded by
            zeros to multiples of 32.
        mean: taken off the pixels, which are in [0, 1]; one number, or one per channel.
        std: what they are divided by then.
        calibration_samples: how many images to calibrate with, spread evenly over the files.

    Returns:
        Batches of images (N, 3, H, W) of one shape and boxes (N, M, 6): left, top, right, bottom in
        pixels, class, and 1 where a box is around a crowd. Images with fewer boxes are filled up
        with boxes of class -1. To calibrate with, batches of images alone, cut to one size where
        they differ.
    """
    if calibration_samples < 1:
        raise ConfigError(f"calibration_samples must be 1 or more; got {calibration_samples}.")
    root = Path(root)
    files = {
        "test": annotation_file(root, "test", "val"),
        "train": annotation_file(root, "calibration", "train"),
    }
    if missing := [part for part, file in files.items() if file is None]:
        raise ConfigError(
            f"Detection needs {root}/instances_{missing[0]}.json (or in {root}/annotations); no "
            f"such file is there."
        )
    test, train = (_Annotations(root, file) for file in files.values() if file)
    if test.classes != train.classes:
        raise ConfigError(
            f"Both files must have the same categories; {test.file.name} has {test.classes}, "
            f"{train.file.name} has {train.classes}."
        )
    tested = [test.read(k, size) for k in range(len(test))]
    chosen = [train.read(k, size) for k in spread(len(train), calibration_samples)]
    images, more = ([normalized(x, mean, std) for x, _ in part] for part in (tested, chosen))
    boxes = filled_up([boxes for _, boxes in tested])
    return Data(
        name=root.resolve().name,
        test=batched_by_shape([padded(x) for x in images], boxes),
        calibration=mixed_batches(more),
        classes=test.classes,
    )


def filled_up(boxes: Sequence[Tensor]) -> list[Tensor]:
    """Boxes (m, 6) of each image as (M, 6), M the most there are; what is added is of class -1."""
    most = max(1, *(len(of_image) for of_image in boxes))
    return [F.pad(b, (0, 0, 0, most - len(b)), value=UNKNOWN) for b in boxes]


class _Annotations:
    """One JSON file, read and checked."""

    def __init__(self, root: Path, file: Path) -> None:
        self.root, self.file = root, file
        try:
            facts = json.loads(file.read_text())
            self.images: list[Mapping[str, Any]] = sorted(facts["images"], key=lambda i: i["id"])
            categories = sorted(facts["categories"], key=lambda c: c["id"])
            self.classes = [str(c["name"]) for c in categories]
            self.label = {c["id"]: k for k, c in enumerate(categories)}
            self.names = [str(image["file_name"]) for image in self.images]
            self.boxes: dict[Any, list[list[float]]] = {image["id"]: [] for image in self.images}
            for a in facts["annotations"]:
                left, top, width, height = map(float, a["bbox"])
                if width > 0 and height > 0:  # boxes of no area are in many a set
                    box = [left, top, left + width, top + height]
                    crowd = float(a.get("iscrowd", 0))
                    self.boxes[a["image_id"]].append([*box, self.label[a["category_id"]], crowd])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} must be a COCO detection file with images, annotations and categories; "
                f"reading it failed: {type(error).__name__}: {error}."
            ) from error
        if not self.images:
            raise ConfigError(f"{file} lists no images.")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, k: int, size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """Pixels (3, H, W) in [0, 1] and boxes (m, 6) of an image."""
        image = self.images[k]
        pixels = torch.from_numpy(pixels_of(self._path(self.names[k])).copy())
        pixels = pixels.expand(3, -1, -1)
        boxes = torch.tensor(self.boxes[image["id"]], dtype=torch.float32).reshape(-1, 6)
        if size is not None:
            old = pixels.shape[1:]
            pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
            factor = torch.tensor([size[1] / old[1], size[0] / old[0]])
            boxes[:, :4] *= factor.repeat(2)
        return pixels.clamp(0, 1), boxes

    def _path(self, name: str) -> Path:
        part = self.file.stem.removeprefix("instances_")
        places = [self.root / "images" / name, self.root / part / name, self.root / name]
        for path in places:
            if path.exists():
                return path
        raise ConfigError(
            f"{self.file} names {name}, which is in none of {', '.join(map(str, places))}."
        )


def training_pictures(root: Path, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """All images of ``instances_train.json`` as bytes (N, 3, H, W), and boxes (N, M, 6)."""
    file = annotation_file(root, "train")
    if file is None:
        raise ConfigError(f"Training needs {root}/instances_train.json; it is not there.")
    part = _Annotations(root, file)
    read = [part.read(k, size) for k in range(len(part))]
    images = torch.stack([(255 * x).round().byte() for x, _ in read])
    return images, torch.stack(filled_up([boxes for _, boxes in read]))
