"""The analog side's remedies, as an audit knows them."""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils import parametrize

from evenkeel.analog.chip import Chip
from evenkeel.analog.clip import clip_weights_
from evenkeel.analog.compensation import CompensatePer, compensate_drift_
from evenkeel.analog.distil import harden_, why_not_harden
from evenkeel.errors import ConfigError
from evenkeel.layers import is_composite, weight_layer
from evenkeel.protocols import Bench


@dataclass(frozen=True)
class DriftCompensation:
    """One factor for each array, or for each output column; no data needed."""

    per: CompensatePer = "layer"
    title: ClassVar[str] = "drift compensation"
    advice: ClassVar[str] = (
        "Right after programming, read each array with one input line on at a time and keep the "
        "mean absolute output. At any later age read it again, and multiply the array's digital "
        "output by the first figure over the second. On a simulated chip: "
        "`ek.analog.compensate_drift_(chip)`."
    )
    version: ClassVar[int] = 1
    needs_data: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """With the setting, where it is not the default."""
        return "drift" if self.per == "layer" else f"drift:{self.per}"

    def mend_(self, chip: Chip, bench: Bench) -> dict[str, Any]:
        """Read every array and rescale it."""
        compensate_drift_(chip, self.per)
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""
        return {"type": "DriftCompensation", "version": self.version, **asdict(self)}


@dataclass(frozen=True)
class Harden:
    """A short training under noise, towards what the network gives without; no labels needed.

    Args:
        level: of the noise, as a share of the layer's largest weight.
        passes: over the inputs to calibrate with.
    """

    level: float = 0.1
    passes: int = 10
    title: ClassVar[str] = "hardening"
    advice: ClassVar[str] = (
        "Train the network for some passes over unlabelled inputs, with fresh Gaussian noise on "
        "its weights at each step and its own undisturbed outputs as the aim; "
        "`mended.safetensors` holds the result. By hand: "
        "`ek.analog.harden_(model, batches, level)`."
    )
    version: ClassVar[int] = 1
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.level < math.inf or self.passes < 1 or self.passes != int(self.passes):
            raise ConfigError(
                f"Harden needs a level of 0 or more and a whole number of passes, 1 or more; got "
                f"{self.level!r} and {self.passes!r}."
            )
        object.__setattr__(self, "passes", int(self.passes))  # from a name it is a float

    @property
    def name(self) -> str:
        """With the settings, where they are not the defaults."""
        passes = "" if self.passes == type(self).passes else f":passes={self.passes}"
        return "harden" + ("" if self.level == type(self).level else f":{self.level:g}") + passes

    def why_not(self, model: nn.Module) -> str | None:
        """The noise must reach all weights that a chip would hold."""
        for path, module in model.named_modules():
            if is_composite(module):
                return (
                    f"'{path}' holds several matrices; take it apart first: "
                    f"evenkeel.layers.take_apart_."
                )
            if weight_layer(module) is None:
                continue
            if parametrize.is_parametrized(module, "weight") or "weight" in vars(module):
                return f"The weight of '{path}' is made of other parameters."
        return why_not_harden(model)

    def prepare_(self, model: nn.Module, bench: Bench) -> None:
        """Train it."""
        harden_(model, bench.batches, self.level, passes=self.passes, forward=bench.forward)

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""
        return {"type": "Harden", "version": self.version, **asdict(self)}


@dataclass(frozen=True)
class ClipWeights:
    """Clip weights to a number of their standard deviations before they are mapped."""

    deviations: float = 2.5
    title: ClassVar[str] = "weight clipping"
    advice: ClassVar[str] = (
        "Clip the weights before they are mapped; `mended.safetensors` holds them clipped. By "
        "hand: `ek.analog.clip_weights_(model)`."
    )
    version: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """With the setting, where it is not the default."""
        return "clip" if self.deviations == type(self).deviations else f"clip:{self.deviations:g}"

    def why_not(self, model: nn.Module) -> str | None:
        """It must be able to set the weights."""
        for path, module in model.named_modules():
            if weight_layer(module) is not None and parametrize.is_parametrized(module, "weight"):
                steps = module.parametrizations["weight"]
                if not all(hasattr(step, "right_inverse") for step in steps):
                    return f"The weight of '{path}' is parametrized in a way that cannot be set."
        return None

    def prepare_(self, model: nn.Module, bench: Bench) -> None:
        """Clip every layer that can be programmed."""
        clip_weights_(model, self.deviations)

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""
        return {"type": "ClipWeights", "version": self.version, **asdict(self)}
