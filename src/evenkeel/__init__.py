"""evenkeel keeps neural networks accurate when the arithmetic under them is not."""

from evenkeel import analog as analog
from evenkeel.calibrate import Calibration as Calibration
from evenkeel.calibrate import calibrate_ as calibrate_
