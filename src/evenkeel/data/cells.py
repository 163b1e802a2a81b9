"""Two sets of cells under the microscope: blood, with boxes, and nuclei, with masks."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from evenkeel.data.coco import coco_detection, training_pictures
from evenkeel.data.dataset import Data
from evenkeel.data.masks import image_masks

SIZE = (240, 320)
"""Of the 480 x 640 pixels that the blood's pictures have; padded to 256 x 320 in an audit."""


def blood_cells(folder: Path) -> Data:
    """72 pictures to test on, the 205 of the training set to calibrate with."""
    note = (
        "Many red cells that lie in clumps have no box in BCCD, so their average precision cannot "
        "reach 100 %; white cells are the clean class."
    )
    return replace(coco_detection(folder, size=SIZE), note=note)


def blood_cells_train(folder: Path) -> tuple[Tensor, Tensor]:
    """205 pictures as bytes (205, 3, 240, 320), and their boxes."""
    return training_pictures(folder, SIZE)


def nuclei(folder: Path) -> Data:
    """110 pictures to test on, 256 of the training set to calibrate with."""
    note = (
        "The split of the nuclei is evenkeel's own, by a hash of the name: fields of one "
        "experiment are on both sides, so it is easier than the test of the Data Science Bowl."
    )
    return replace(image_masks(folder), note=note)
