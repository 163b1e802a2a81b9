"""Means and variances of activations, taken in one read, and what normalizers make of them."""

from evenkeel.moments import processes as processes
from evenkeel.moments.barrier import barrier as barrier
from evenkeel.moments.batch import BatchMoments as BatchMoments
from evenkeel.moments.engine import Moments as Moments
from evenkeel.moments.engine import Program as Program
from evenkeel.moments.engine import measure as measure
from evenkeel.moments.engine import normalize as normalize
from evenkeel.moments.engine import normalize_and_tell as normalize_and_tell
