"""Analog in-memory chips: devices, and networks programmed onto them."""

from evenkeel.analog.chip import Chip as Chip
from evenkeel.analog.chips import Chips as Chips
from evenkeel.analog.clip import clip_weights_ as clip_weights_
from evenkeel.analog.compensation import compensate_drift_ as compensate_drift_
from evenkeel.analog.converter import Converter as Converter
from evenkeel.analog.counts import Counts as Counts
from evenkeel.analog.counts import count as count
from evenkeel.analog.device import Device as Device
from evenkeel.analog.device import DeviceModel as DeviceModel
from evenkeel.analog.faults import StuckAt as StuckAt
from evenkeel.analog.harden import hardening as hardening
from evenkeel.analog.hermes import HERMES as HERMES
from evenkeel.analog.layer import AnalogLayer as AnalogLayer
from evenkeel.analog.measured import Measured as Measured
from evenkeel.analog.pcm import PCM as PCM
from evenkeel.analog.pcm import StateIndependent as StateIndependent
from evenkeel.analog.periphery import Periphery as Periphery
from evenkeel.analog.program import program as program
from evenkeel.analog.ranges import calibrate_ranges_ as calibrate_ranges_
from evenkeel.analog.reram import CMOHfOx as CMOHfOx
from evenkeel.analog.reram import MiloReRAM as MiloReRAM
from evenkeel.analog.reram import WanReRAM as WanReRAM
from evenkeel.analog.statistical import Gain as Gain
from evenkeel.analog.statistical import Gaussian as Gaussian
from evenkeel.analog.statistical import LogNormal as LogNormal
from evenkeel.analog.statistical import Spread as Spread
