"""Normalizers, and how to give them to a network."""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from evenkeel.norm.batch_kalman import BatchKalmanNorm as BatchKalmanNorm
    from evenkeel.norm.batch_kalman import BatchKalmanNorm1d as BatchKalmanNorm1d
    from evenkeel.norm.batch_kalman import BatchKalmanNorm2d as BatchKalmanNorm2d
    from evenkeel.norm.batch_kalman import BatchKalmanNorm3d as BatchKalmanNorm3d
    from evenkeel.norm.kalman import Kalmanized as Kalmanized
    from evenkeel.norm.kalman import kalmanize as kalmanize

# What needs the graph is imported when it is asked for: an audit does without it.
_LATER = {
    **dict.fromkeys(("Kalmanized", "kalmanize"), "kalman"),
    **dict.fromkeys((f"BatchKalmanNorm{n}" for n in ("", "1d", "2d", "3d")), "batch_kalman"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
