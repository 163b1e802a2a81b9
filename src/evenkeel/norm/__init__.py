"""Normalizers, and how to give them to a network."""

from evenkeel.norm import functional as functional
from evenkeel.norm.activation import NormAct as NormAct
from evenkeel.norm.activation import norm_act as norm_act
from evenkeel.norm.batch_channel import BatchChannelNorm as BatchChannelNorm
from evenkeel.norm.batch_channel import BatchChannelNorm1d as BatchChannelNorm1d
from evenkeel.norm.batch_channel import BatchChannelNorm2d as BatchChannelNorm2d
from evenkeel.norm.batch_channel import BatchChannelNorm3d as BatchChannelNorm3d
from evenkeel.norm.convert import Conversion as Conversion
from evenkeel.norm.convert import convert_ as convert_
from evenkeel.norm.ghost import GhostBatchNorm2d as GhostBatchNorm2d
from evenkeel.norm.noise_aware import NoiseAwareBatchNorm as NoiseAwareBatchNorm
from evenkeel.norm.noise_aware import NoiseAwareBatchNorm1d as NoiseAwareBatchNorm1d
from evenkeel.norm.noise_aware import NoiseAwareBatchNorm2d as NoiseAwareBatchNorm2d
from evenkeel.norm.noise_aware import NoiseAwareBatchNorm3d as NoiseAwareBatchNorm3d
from evenkeel.norm.singularity import Singularity as Singularity
from evenkeel.norm.singularity import singularity as singularity
from evenkeel.norm.weight_standard import Standardization as Standardization
from evenkeel.norm.weight_standard import WeightStandardization as WeightStandardization
from evenkeel.norm.weight_standard import WeightStandardizedConv1d as WeightStandardizedConv1d
from evenkeel.norm.weight_standard import WeightStandardizedConv2d as WeightStandardizedConv2d
from evenkeel.norm.weight_standard import WeightStandardizedConv3d as WeightStandardizedConv3d
from evenkeel.norm.weight_standard import standardize_weights_ as standardize_weights_
