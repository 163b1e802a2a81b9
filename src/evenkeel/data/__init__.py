"""Data as an audit needs it: samples to calibrate with, and others to test on."""

from evenkeel.data.dataset import Data as Data
from evenkeel.data.dataset import as_data as as_data
from evenkeel.data.digits import digits as digits
from evenkeel.data.folder import image_folder as image_folder
