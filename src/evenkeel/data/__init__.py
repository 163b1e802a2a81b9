"""Data as an audit needs it: samples to calibrate with, and others to test on."""

import importlib
from typing import TYPE_CHECKING, Any

from evenkeel.data.dataset import Data as Data
from evenkeel.data.dataset import as_data as as_data
from evenkeel.data.digits import digits as digits
from evenkeel.data.fetch import fetch as fetch
from evenkeel.data.folder import image_folder as image_folder
from evenkeel.data.labelled import LabelledImages as LabelledImages
from evenkeel.data.labelled import labelled_folder as labelled_folder
from evenkeel.data.labelled import omniglot as omniglot
from evenkeel.data.sets import SETS as SETS
from evenkeel.data.sets import check as check
from evenkeel.data.sets import folder_of as folder_of
from evenkeel.data.sets import read_set as read_set
from evenkeel.data.sets import read_training_set as read_training_set

if TYPE_CHECKING:
    from evenkeel.data.coco import coco_detection as coco_detection
    from evenkeel.data.masks import image_masks as image_masks

_READERS = {"coco_detection": "coco", "image_masks": "masks"}


def __getattr__(name: str) -> Any:
    if name in _READERS:  # an import of evenkeel is cheap: much does without them
        return getattr(importlib.import_module(f"evenkeel.data.{_READERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_READERS})
