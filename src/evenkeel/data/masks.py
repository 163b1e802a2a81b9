"""Images with a mask beside each, as segmentation needs them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenkeel.data.dataset import Data
from evenkeel.data.folder import image_files, normalized, part_of, pixels_of
from evenkeel.data.shapes import UNKNOWN, batched_by_shape, mixed_batches, padded, spread
from evenkeel.errors import ConfigError

KINDS = ("instances", "masks")
CALIBRATION = 256


def is_mask_folder(root: Path) -> bool:
    """Whether a folder has ``images`` with masks beside them, in a part to test on."""
    parts = [root / part for part in ("test", "val") if (root / part / "images").is_dir()]
    holds = [{path.name for path in part.iterdir() if path.is_dir()} for part in parts]
    return any(names == {"images"} or names & set(KINDS) for names in holds)


def image_masks(
    root: str | Path,
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    calibration_samples: int = CALIBRATION,
) -> Data:
    """Read ``root/test/images/NAME.*`` with ``root/test/instances/NAME.png``, and ``root/train``.

    A mask is an image of the picture's size. In ``instances`` its values are 0 for the background
    and a number for each object; in ``masks`` anything above 0 is foreground, and what hangs
    together is an object. ``val`` or ``calibration`` stand in for ``test`` and ``train``, the
    images of which calibrate and need no masks. Sizes may differ: sides are padded to multiples of
    32, with zeros, where the target is -1 and nothing counts. Where one picture is in colour, grey
    ones get three channels.

    Args:
        root: the folder.
        mean: taken off the pixels, which are in [0, 1]; one number, or one per channel.
        std: what they are divided by then.
        calibration_samples: how many images to calibrate with, spread evenly over the files.

    Returns:
        To test on, batches of images (N, C, H, W) of one shape and objects (N, H, W), whole
        numbers; to calibrate with, batches of images alone, cut to one size where they differ.
    """
    if calibration_samples < 1:
        raise ConfigError(f"calibration_samples must be 1 or more; got {calibration_samples}.")
    root = Path(root)
    test = part_of(root, "test", "val", holds="images/*.png")
    train = part_of(root, "calibration", "train", holds="images/*.png")
    files = images_of(train)
    chosen = [files[k] for k in spread(len(files), calibration_samples)]
    tested = [_read_pair(image, mask) for image, mask in pairs_of(test)]
    images = of_one_depth([x for x, _ in tested] + [_pixels(image) for image in chosen])
    images, n = [normalized(x, mean, std) for x in images], len(tested)
    known = [padded(y, value=UNKNOWN) for _, y in tested]
    return Data(
        name=root.resolve().name,
        test=batched_by_shape([padded(x) for x in images[:n]], known),
        calibration=mixed_batches(images[n:]),
    )


def training_pairs(root: Path) -> tuple[Tensor, Tensor]:
    """All of ``root/train`` at the size of the largest: bytes (N, C, H, W), and objects (N, H, W).

    What is added is 0 in the images and -1 in the objects.
    """
    files = pairs_of(part_of(root, "train", holds="images/*.png"))
    pixels, objects = zip(*(_read_pair(image, mask) for image, mask in files), strict=True)
    sides = max(y.shape[0] for y in objects), max(y.shape[1] for y in objects)
    images = [padded((255 * x).round().byte(), sides) for x in of_one_depth(pixels)]
    return torch.stack(images), torch.stack([padded(y, sides, UNKNOWN) for y in objects])


def pairs_of(part: Path) -> list[tuple[Path, Path]]:
    """Each image below a folder, and its mask."""
    folder = next((part / kind for kind in KINDS if (part / kind).is_dir()), None)
    images = images_of(part)
    if folder is None:
        raise ConfigError(
            f"Segmentation needs {part}/instances/NAME.png or {part}/masks/NAME.png beside "
            f"{part}/images; there are no masks."
        )
    masks = {file.stem: file for file in image_files(folder)}
    if missing := [image for image in images if image.stem not in masks]:
        raise ConfigError(f"{missing[0]} has no mask {folder / missing[0].stem}.png.")
    return [(image, masks[image.stem]) for image in images]


def images_of(part: Path) -> list[Path]:
    """The images below a folder."""
    images = image_files(part / "images") if (part / "images").is_dir() else []
    if not images:
        raise ConfigError(
            f"Segmentation needs {part}/images/NAME.png (or jpg, ...); {part}/images holds none."
        )
    return images


def of_one_depth(images: Sequence[Tensor]) -> list[Tensor]:
    """Where one picture is in colour, grey ones get three channels."""
    depth = max(len(x) for x in images)
    return [x.expand(depth, -1, -1) for x in images]


def _pixels(image: Path) -> Tensor:
    return torch.from_numpy(pixels_of(image).copy())


def _read_pair(image: Path, mask: Path) -> tuple[Tensor, Tensor]:
    """Pixels (C, H, W) in [0, 1], and which object each belongs to (H, W), 0 for none."""
    pixels = _pixels(image)
    objects = _labels_of(mask)
    if mask.parent.name == "masks":
        from scipy import ndimage

        objects = ndimage.label(objects > 0, np.ones((3, 3)))[0]  # as Segment sees them
    if objects.shape != tuple(pixels.shape[1:]):
        raise ConfigError(
            f"{mask} must have the size of its image, {tuple(pixels.shape[1:])}; it has "
            f"{objects.shape}."
        )
    return pixels, torch.from_numpy(objects.astype(np.int32))


def _labels_of(path: Path) -> np.ndarray:
    """Whole numbers (H, W) as they are stored."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            array = np.asarray(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # as Pillow has it
        raise ConfigError(f"{path} cannot be read as an image: {error}.") from error
    if array.ndim != 2 or array.dtype.kind not in "bui":
        raise ConfigError(
            f"A mask has one whole number for each pixel; {path} has {array.dtype} of shape "
            f"{array.shape}. Store it as a grey or a palette image."
        )
    return array
