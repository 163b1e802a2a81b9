"""Noise-aware normalization: fit the running statistics to the hardware the network runs on."""

from evenkeel.calibrate.calibration import Calibration as Calibration
from evenkeel.calibrate.calibration import calibrate_ as calibrate_
from evenkeel.calibrate.collect import collect as collect
from evenkeel.calibrate.estimate import ESTIMATORS as ESTIMATORS
from evenkeel.calibrate.match import Matched as Matched
from evenkeel.calibrate.match import Matching as Matching
from evenkeel.calibrate.match import OutputMatch as OutputMatch
from evenkeel.calibrate.match import match_ as match_
from evenkeel.calibrate.pool import pool_statistics_ as pool_statistics_
from evenkeel.calibrate.statistics import Statistics as Statistics
