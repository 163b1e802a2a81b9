"""From what a user names to data."""

from pathlib import Path

from evenkeel import data as datasets
from evenkeel.data import Data
from evenkeel.data.coco import annotation_file
from evenkeel.data.masks import is_mask_folder
from evenkeel.errors import ConfigError, nearest


def samples_from(name: str, root: Path | None = None, mean: str = "0", std: str = "1") -> Data:
    """The data of "digits", a published set, a folder, or ``module:function``.

    A folder's layout tells what it is of: images and masks, boxes in COCO's files, or classes.

    Args:
        name: one of these.
        root: where published sets lie; default $EVENKEEL_DATA.
        mean: taken off the pixels of a folder of images; numbers joined by commas.
        std: what these are divided by then.
    """
    from evenkeel.audit.names import import_from

    shift, scale = _numbers(mean, "--mean"), _numbers(std, "--std")
    if name == "digits":
        return datasets.digits()
    if name in datasets.SETS:
        return datasets.read_set(name, root)
    if (folder := Path(name)).is_dir() and is_mask_folder(folder):
        return datasets.image_masks(folder, mean=shift, std=scale)
    if folder.is_dir() and annotation_file(folder, "test", "val") is not None:
        return datasets.coco_detection(folder, mean=shift, std=scale)
    if folder.is_dir():
        return datasets.image_folder(name, mean=shift, std=scale)
    if ":" in name:
        return datasets.as_data(import_from(name)())
    raise ConfigError(
        f"No data set or folder {name!r}. {nearest(name, ['digits', *datasets.SETS])} Otherwise "
        f"give a folder, or module:function; in a folder are test/CLASS/*.png and "
        f"train/CLASS/*.png, or {{test,train}}/{{images,masks}}/*.png, or "
        f"instances_{{test,train}}.json and images."
    )


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} needs numbers joined by commas; got {text!r}.") from None
