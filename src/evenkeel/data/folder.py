"""Images in one folder per class."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evenkeel.data.dataset import Data, batched
from evenkeel.errors import ConfigError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def image_folder(
    root: str | Path,
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    calibration_samples: int = 512,
) -> Data:
    """Read ``root/test/CLASS/*.png`` to test on and ``root/train/CLASS/*.png`` to calibrate with.

    Classes are numbered in the order of their names. ``val`` or ``calibration`` stand in for the
    two folders. All images must have one size; grey ones give one channel, others three.

    Args:
        root: the folder.
        mean: taken off the pixels, which are in [0, 1]; one number, or one per channel.
        std: what they are divided by then.
        calibration_samples: how many images to calibrate with, spread evenly over the files.
    """
    if calibration_samples < 1:
        raise ConfigError(f"calibration_samples must be 1 or more; got {calibration_samples}.")
    root = Path(root)
    test, train = part_of(root, "test", "val"), part_of(root, "calibration", "train")
    classes = _classes(test)
    paths = [(path, k) for k, name in enumerate(classes) for path in image_files(test / name)]
    wanted = [path for name in _classes(train) for path in image_files(train / name)]
    if not paths or not wanted:
        empty = train if paths else test
        raise ConfigError(f"No images in {empty}: expected {empty}/CLASS/*.png (or jpg, ...).")
    count = min(calibration_samples, len(wanted))
    spread = [wanted[k * len(wanted) // count] for k in range(count)]
    pixels = stacked([path for path, _ in paths] + spread)  # together, as they must have one shape
    x = normalized(pixels, mean, std)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return Data(
        name=root.resolve().name,
        test=batched(x[: len(paths)], torch.tensor([k for _, k in paths])),
        calibration=batched(x[len(paths) :][order]),
        classes=classes,
    )


def part_of(root: Path, *names: str, holds: str = "CLASS/*.png") -> Path:
    """The first folder of these names; what it holds is for the refusal."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    others = "".join(f" (or {name}/ in its place)" for name in names[1:])
    raise ConfigError(f"A folder of images needs {root}/{names[0]}/{holds}{others}; none is there.")


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """The images that lie in a folder itself, by name."""
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )


def image_folders(root: Path) -> list[Path]:
    """All folders below one that themselves hold images, by name; hidden ones are left out."""
    return sorted(
        path
        for path in root.rglob("*")
        if path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and image_files(path)
    )


def stacked(
    paths: list[Path],
    size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Images (N, C, H, W) in [0, 1], which must have one shape; resized where a size is given."""
    pixels: list[Tensor] = []
    for done, path in enumerate(paths, start=1):
        image = torch.from_numpy(pixels_of(path))
        if size is not None:
            image = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]
            image.clamp_(0, 1)  # the filter's weights sum to a little more than 1
        pixels.append(image)
        if pixels[-1].shape != pixels[0].shape:
            raise ConfigError(
                f"All images must have one shape; {path} is {tuple(image.shape)}, {paths[0]} "
                f"is {tuple(pixels[0].shape)}. Resize, crop or convert them as the network expects."
            )
        progress(done, len(paths))
    return torch.stack(pixels)


def pictures_digest(path: Path) -> str:
    """A hash of an image's pixels; of a folder, of all below it, with the folders' names, in order.

    How files are packed does not matter, and of a folder their names only by their order.
    """
    hasher = hashlib.sha256()
    folders = (image_folders(path) or [path]) if path.is_dir() else []
    files = [(file, folder) for folder in folders for file in image_files(folder)]
    for file, folder in files or [(path, path)]:
        pixels = (255 * pixels_of(file)).round().astype(np.uint8)
        hasher.update(f"{folder.relative_to(path).as_posix()}{pixels.shape}".encode())
        hasher.update(pixels.tobytes())
    return hasher.hexdigest()


def pixels_of(path: Path) -> np.ndarray:
    """(C, H, W) in [0, 1]: one channel for grey, three for the rest."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):
                return (np.asarray(image, dtype=np.float32) / 65535)[None]
            if image.mode in ("I", "F"):
                raise ConfigError(
                    f"{path} has pixels of mode {image.mode}, whose range is not known. Store it "
                    f"with 8 or 16 bits."
                )
            grey = image.mode in ("1", "L", "LA")
            array = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.float32) / 255
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # as Pillow has it
        raise ConfigError(f"{path} cannot be read as an image: {error}.") from error
    return array[None] if grey else array.transpose(2, 0, 1)


def normalized(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels (..., C, H, W) less the mean, by the deviation; one number, or one per channel."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, x.shape[-3]):
            raise ConfigError(
                f"{name} must be one number or one for each of {x.shape[-3]} channels; got "
                f"{values}."
            )
    if not all(s > 0 for s in std):
        raise ConfigError(f"std must be above 0; got {std}.")
    m, s = (torch.tensor(list(values)).view(-1, 1, 1) for values in (mean, std))
    return (x - m) / s
