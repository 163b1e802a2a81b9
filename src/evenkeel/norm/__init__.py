"""Normalizers, and how to give them to a network."""

from evenkeel.norm.convert import Conversion as Conversion
from evenkeel.norm.convert import convert_ as convert_
from evenkeel.norm.noise_aware import NoiseAwareBatchNorm as NoiseAwareBatchNorm
from evenkeel.norm.noise_aware import NoiseAwareBatchNorm1d as NoiseAwareBatchNorm1d
from evenkeel.norm.noise_aware import NoiseAwareBatchNorm2d as NoiseAwareBatchNorm2d
from evenkeel.norm.noise_aware import NoiseAwareBatchNorm3d as NoiseAwareBatchNorm3d
