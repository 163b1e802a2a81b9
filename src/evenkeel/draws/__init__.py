"""Keyed random draws: the same key gives the same numbers, in any order, on any device."""

from evenkeel.draws.keyed import Apart as Apart
from evenkeel.draws.keyed import Draws as Draws
from evenkeel.draws.keyed import in_turn as in_turn
from evenkeel.draws.reads import keyed_noise as keyed_noise
from evenkeel.draws.reads import keyed_normal as keyed_normal
from evenkeel.draws.reads import read_key as read_key
