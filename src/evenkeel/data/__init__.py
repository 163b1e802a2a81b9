"""Data as an audit needs it: samples to calibrate with, and others to test on."""

from evenkeel.data.coco import coco_detection as coco_detection
from evenkeel.data.dataset import Data as Data
from evenkeel.data.dataset import as_data as as_data
from evenkeel.data.digits import digits as digits
from evenkeel.data.fetch import fetch as fetch
from evenkeel.data.folder import image_folder as image_folder
from evenkeel.data.labelled import LabelledImages as LabelledImages
from evenkeel.data.labelled import labelled_folder as labelled_folder
from evenkeel.data.labelled import omniglot as omniglot
from evenkeel.data.masks import image_masks as image_masks
from evenkeel.data.sets import SETS as SETS
from evenkeel.data.sets import check as check
from evenkeel.data.sets import folder_of as folder_of
from evenkeel.data.sets import read_set as read_set
from evenkeel.data.sets import read_training_set as read_training_set
