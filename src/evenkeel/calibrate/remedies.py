"""Calibration on each chip, and statistics pooled over chips, as an audit knows them."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import nn

from evenkeel.batches import first
from evenkeel.calibrate.calibration import calibrate_
from evenkeel.calibrate.estimate import ESTIMATORS, Shrinkage
from evenkeel.calibrate.match import NothingToMatchError, match_
from evenkeel.calibrate.pool import pool_statistics_
from evenkeel.calibrate.statistics import missing_normalizers
from evenkeel.errors import ConfigError, nearest
from evenkeel.protocols import Bench


@dataclass(frozen=True)
class Calibrate:
    """:func:`evenkeel.calibrate_` on each chip, with its options.

    ``samples`` limits how many inputs each chip is shown, to learn how few will do; ``layers`` is a
    path or pattern of the normalizers to fit.
    """

    estimator: str = "pooled"
    samples: int | None = None
    shrinkage: Shrinkage = "auto"
    gate: bool = True
    reads: int = 1
    layers: str | None = None
    title: ClassVar[str] = "calibration"
    advice: ClassVar[str] = (
        "On each chip, at the age it is used at, run some unlabelled inputs and fit the "
        "normalizers: `ek.calibrate_(chip, batches)`, where `chip` is any PyTorch module that "
        "drives the hardware. Keep what it returns: `ek.save(calibration, path)`; "
        "`calibration.undo()` goes back."
    )
    version: ClassVar[int] = 2
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ConfigError(
                f"Unknown estimator {self.estimator!r}. {nearest(self.estimator, ESTIMATORS)}"
            )
        object.__setattr__(self, "layers", _path(self.layers))
        for count in ("samples", "reads"):
            value = getattr(self, count)
            if value is not None and (value < 1 or value != int(value)):
                raise ConfigError(f"calibrate needs a whole number of {count}; got {value}.")
            if value is not None:  # as text it may have come as 8.0
                object.__setattr__(self, count, int(value))

    @property
    def name(self) -> str:
        """With the settings that are not the default."""
        changed = [
            ("" if f.name == "estimator" else f"{f.name}=") + _short(getattr(self, f.name))
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return ":".join(["calibrate", *changed])

    def why_not(self, model: nn.Module) -> str | None:
        """It needs normalizers with running statistics."""
        return missing_normalizers(model)

    def mend_(self, chip: nn.Module, bench: Bench) -> dict[str, Any]:
        """Fit the chip's statistics; the certificate is the record."""
        done = calibrate_(
            chip,
            bench.batches if self.samples is None else first(bench.batches, int(self.samples)),
            estimator=self.estimator,
            shrinkage=self.shrinkage,
            gate=self.gate,
            layers=None if self.layers is None else [self.layers],
            reads=self.reads,
            forward=bench.forward,
        )
        return {"calibration": done.to_dict()}

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""
        return {"type": "Calibrate", "version": self.version, **asdict(self)}


@dataclass(frozen=True)
class Match:
    """:func:`match_` before programming; what it puts in is fitted by a calibration on each chip.

    ``layers`` is a path or pattern; by default all layers that no normalizer follows, which on a
    network with batch norm is the classifier. Stands before what changes weights, as it records
    the network's outputs.
    """

    layers: str | None = None
    title: ClassVar[str] = "output matching"
    advice: ClassVar[str] = (
        "Deploy the network of `mended.safetensors`: behind layers that no normalizer follows it "
        "has a scale and an offset per channel, which do nothing until calibration fits them."
    )
    enables: ClassVar[tuple[str, ...]] = ("calibrate",)
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _path(self.layers))

    @property
    def name(self) -> str:
        """With the setting, where it is not the default."""
        return "match" if self.layers is None else f"match:{self.layers}"

    def prepare_(self, model: nn.Module, bench: Bench) -> None:
        """Record the digital network's moments; where nothing wants matching, leave it be."""
        layers = None if self.layers is None else [self.layers]
        try:
            match_(model, bench.batches, layers=layers, forward=bench.forward)
        except NothingToMatchError:
            if missing_normalizers(model):  # then calibration has nothing to fit either
                raise

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""
        return {"type": "Match", "version": self.version, **asdict(self)}


@dataclass(frozen=True)
class PoolOverChips:
    """:func:`evenkeel.calibrate.pool_statistics_` over simulated chips of the device."""

    title: ClassVar[str] = "pooled statistics"
    advice: ClassVar[str] = (
        "Deploy the network of `mended.safetensors`: its running statistics are those of an "
        "average chip of this device, over all the ages audited."
    )
    version: ClassVar[int] = 1
    name: ClassVar[str] = "pooled"

    def why_not(self, model: nn.Module) -> str | None:
        """It needs normalizers with running statistics."""
        return missing_normalizers(model)

    def prepare_(self, model: nn.Module, bench: Bench) -> None:
        """Give the network the statistics that hold on average over chips and ages."""
        pool_statistics_(model, bench.chips(model), bench.batches, forward=bench.forward)

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""
        return {"type": "PoolOverChips", "version": self.version}


def _path(layers: str | float | None) -> str | None:
    """A path as text: one that is a number, as in ``nn.Sequential``, comes as one by name."""
    return f"{layers:g}" if isinstance(layers, int | float) else layers


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
