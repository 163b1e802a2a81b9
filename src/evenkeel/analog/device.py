"""What happens to conductances: one physical effect, and several composed on one array."""

import math
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from evenkeel.analog.blocks import unfilled
from evenkeel.draws import Apart, Draws
from evenkeel.errors import ConfigError

if TYPE_CHECKING:
    from evenkeel.analog.chip import Chip
    from evenkeel.analog.periphery import Periphery
    from evenkeel.analog.slices import Slices

State = dict[str, Tensor]
ScalePer = Literal["layer", "column"]


class DeviceModel:
    """One physical effect on the conductances of an array. Derive from it; override what happens.

    The methods get conductances in microsiemens (µS) as tensors of shape (2, outputs, inputs): the
    devices that count positively, then those that count negatively. The defaults change nothing.
    Derived classes are frozen dataclasses, so that their fields identify them in stored results; a
    change of behaviour raises ``version``, so that old results are not mistaken for new ones. An
    effect whose constants belong to a conductance range has a ``g_max``, in µS, and, where its
    lowest state conducts, a ``g_min``.

    Examples:
        A device that loses 5 % of its conductance at each write, give or take 2 %:

        >>> from dataclasses import dataclass
        >>> import torch, evenkeel as ek
        >>> @dataclass(frozen=True)
        ... class Lossy(ek.analog.DeviceModel):
        ...     loss: float = 0.05
        ...     def write(self, g, draws, g_max):
        ...         return g * (1 - self.loss + 0.02 * draws.normal("loss", g.shape)), {}
        >>> chip = ek.analog.program(torch.nn.Linear(4, 2), Lossy(loss=0.1), seed=0)
        >>> chip(torch.ones(1, 4)).shape
        torch.Size([1, 2])
        >>> Lossy(loss=0.1).name
        'Lossy(0.1)'
    """

    version: ClassVar[int] = 1
    permanent: ClassVar[bool] = False
    """Whether it overrides all else for life, as a fault does; such effects come last."""
    ages: ClassVar[bool] = False
    """Whether time changes anything; an audit visits one age only of what does not age."""
    oldest_s: ClassVar[float] = math.inf
    """Age in s up to which it is known what happens."""
    elementwise: ClassVar[bool] = False
    """Whether what lies beside a device does not matter.

    All arrays then go together, in blocks, and every draw is of a number for each device in them.
    """

    def write(self, g: Tensor, draws: Draws, g_max: float) -> tuple[Tensor, State]:
        """Conductances after programming the targets ``g``, and what decides their later life."""
        return g, {}

    def drift(self, g: Tensor, state: State, age_s: float) -> Tensor:
        """Conductances ``age_s`` seconds after programming, from those right after it."""
        return g

    def read_std(self, g: Tensor, programmed: Tensor, state: State, age_s: float) -> Tensor | None:
        """Deviation of one read about ``g``, the conductance at this age; None: reads are exact."""
        return None

    def program(self, model: nn.Module, *, seed: int, layers: Any = None) -> "Chip":
        """A chip on whose arrays this effect is alone."""
        return Device(self).program(model, seed=seed, layers=layers)

    @property
    def name(self) -> str:
        """The class with the settings that differ from their defaults."""
        own = fields(self)  # type: ignore[arg-type]
        changed = [
            (f"{f.name}=" if i else "") + f"{getattr(self, f.name)!r}"
            for i, f in enumerate(own)
            if getattr(self, f.name) != f.default
        ]
        return type(self).__name__ + (f"({', '.join(changed)})" if changed else "")

    @property
    def family(self) -> str:
        """The name that is shared by all levels of one kind."""
        return type(self).__name__

    def to_dict(self) -> dict[str, Any]:
        """Type, version and fields: what identifies the effect in stored results."""
        kind = type(self)
        ours = kind.__module__.startswith("evenkeel.")
        name = kind.__name__ if ours else f"{kind.__module__}:{kind.__qualname__}"
        return {"type": name, "version": self.version, **asdict(self)}  # type: ignore[call-overload]


class Device:
    r"""Effects that act on one array in the order given, and how weights become conductances.

    $$ G^{\pm}_{ij} = G_{\min} + (G_{\max} - G_{\min})
       \,\frac{\max(\pm w_{ij},\,0)}{\max_{\text{scale}} |w|} $$

    Each weight is a pair of devices, of which one is set and the other left at ``g_min``, zero for
    most; the largest weight of the layer, or of the output column, is set to ``g_max``.

    Args:
        models: effects, each applied to what the one before has left.
        scale_per: "layer": one scale for all of a layer's weights. "column": one for each output,
            which uses the range better and needs one digital multiplier per output.
        g_max: largest conductance in µS; default: that of the first effect that has one, else 1.
        periphery: converters, tiles and wires around the array; default: ideal ones.
        slices: digits of a weight that are held by arrays of their own; default: one holds it all.

    Examples:
        >>> from evenkeel.analog import PCM, StuckAt
        >>> Device(PCM(), StuckAt(low=0.01)).name
        'PCM + StuckAt(0.01)'
    """

    version: ClassVar[int] = 1

    def __init__(
        self,
        *models: DeviceModel,
        scale_per: ScalePer = "layer",
        g_max: float | None = None,
        periphery: "Periphery | None" = None,
        slices: "Slices | None" = None,
    ) -> None:
        if not models or not all(isinstance(m, DeviceModel) for m in models):
            got = ", ".join(type(m).__name__ for m in models) or "none"
            raise ConfigError(f"Device needs at least one DeviceModel, such as PCM(); got: {got}.")
        if scale_per not in get_args(ScalePer):
            raise ConfigError(f"scale_per must be 'layer' or 'column'; got {scale_per!r}.")
        first = next((i for i, m in enumerate(models) if m.permanent), len(models))
        if late := [m.name for m in models[first:] if not m.permanent]:
            raise ConfigError(
                f"{models[first].name} holds for life, so it must come after {', '.join(late)}."
            )
        own = next((m for m in models if getattr(m, "g_max", None)), None)
        if periphery is not None and not hasattr(periphery, "needs_peak"):
            raise ConfigError(
                f"periphery must be a Periphery, such as Periphery(adc=Converter(8)); got "
                f"{type(periphery).__name__}."
            )
        self.models = models
        self.periphery = periphery
        self.scale_per = scale_per
        if slices is not None and not hasattr(slices, "digits"):
            raise ConfigError(f"slices must be Slices, such as Slices(4, bits=2); got {slices!r}.")
        self.slices = slices
        self.g_max = float(getattr(own, "g_max", 1.0) if g_max is None else g_max)
        self.g_min = float(getattr(own, "g_min", 0.0))
        if not self.g_min < self.g_max < math.inf:
            raise ConfigError(f"g_max must be above {self.g_min:g} µS and finite; got {g_max!r}.")

    @property
    def name(self) -> str:
        """The effects' names, and the mapping where it is not the default."""
        return " + ".join(m.name for m in self.models) + self._mapping

    @property
    def family(self) -> str:
        """The name that is shared by all levels of one kind."""
        return " + ".join(m.family for m in self.models) + self._mapping

    @property
    def _mapping(self) -> str:
        default = next((g for m in self.models if (g := getattr(m, "g_max", None))), 1.0)
        range_ = "" if self.g_max == default else f", g_max={self.g_max:g}"
        around = f", {self.periphery}" if self.periphery and str(self.periphery) else ""
        per = ", per column" if self.scale_per == "column" else ""
        cut = f", {self.slices.number} slices of {self.slices.bits} bits" if self.slices else ""
        return range_ + per + cut + around

    @property
    def level(self) -> float | None:
        """Strength of the first effect that has one; a chart may be drawn against it."""
        return next(
            (lv for m in self.models if (lv := getattr(m, "level", None)) is not None), None
        )

    @property
    def ages(self) -> bool:
        """Whether any of the effects ages."""
        return any(m.ages for m in self.models)

    @property
    def oldest_s(self) -> float:
        """Age in s up to which it is known what happens."""
        return min(m.oldest_s for m in self.models)

    def require_age(self, age_s: float) -> None:
        """Refuse an age that is none, or beyond what was measured."""
        if not 0 <= age_s < math.inf:
            raise ConfigError(f"A chip's age must be finite and 0 s or more; got {age_s!r}.")
        if age_s > self.oldest_s:
            raise ConfigError(
                f"{self.name} was measured up to {self.oldest_s:g} s after programming; got "
                f"{age_s:g} s. Ask for earlier ages, or give the device extrapolate=True."
            )

    def to_dict(self) -> dict[str, Any]:
        """Effects and mapping, as they identify the device in stored results."""
        return {
            "type": "Device",
            "version": self.version,
            "models": [m.to_dict() for m in self.models],
            "scale_per": self.scale_per,
            "g_max": self.g_max,
            **({"periphery": self.periphery.to_dict()} if self.periphery else {}),
            **({"slices": self.slices.to_dict()} if self.slices else {}),
        }

    def program(self, model: nn.Module, *, seed: int, layers: Any = None) -> "Chip":
        """A chip of this device that holds ``model``; see :func:`evenkeel.analog.program`."""
        from evenkeel.analog.program import program

        return program(model, self, seed=seed, layers=layers)

    # What an array needs: the effects one after the other.

    def convert(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Target conductances (2, outputs, inputs), and weight per µS (outputs or 1, 1).

        With slices there are as many times more outputs.
        """
        w = matrix.detach().float()
        axes = 1 if self.scale_per == "column" else (0, 1)
        w_max = torch.maximum(w.amax(axes, keepdim=True), -w.amin(axes, keepdim=True))
        span = self.g_max - self.g_min
        unit = w_max / span  # 0 for an array of zeros, which then stays at zero
        top = w_max + (w_max == 0)
        if self.slices is not None:
            above = w / top
            above = self.slices.digits(above.abs()) * above.sign().repeat(self.slices.number, 1)
            target = unfilled(w, 2, *above.shape)
            torch.mul(above, span, out=target[0])
        else:
            target = unfilled(w, 2, *w.shape)
            torch.div(w, top, out=target[0]).mul_(span)
        torch.neg(target[0], out=target[1])
        target.clamp_min_(0)
        return target.add_(self.g_min) if self.g_min else target, unit

    def write(self, target: Tensor, draws: Draws) -> tuple[Tensor, list[State]]:
        """Conductances after programming, and each effect's state; no two effects share numbers."""
        g, states = target, []
        taken: set[str] = set()
        for i, model in enumerate(self.models):
            own = Apart(draws, taken, f"effect {i}")
            g, state = model.write(g, own, self.g_max)
            taken = taken | own.used
            states.append(state)
        return g, states

    def drift(self, programmed: Tensor, states: list[State], age_s: float) -> Tensor:
        """Conductances at an age."""
        g = programmed
        for model, state in zip(self.models, states, strict=True):
            g = model.drift(g, state, age_s)
        return g

    def read_std(
        self, g: Tensor, programmed: Tensor, states: list[State], age_s: float
    ) -> Tensor | None:
        """Deviation of one read: the effects' read noises are independent."""
        stds = [
            std
            for model, state in zip(self.models, states, strict=True)
            if (std := model.read_std(g, programmed, state, age_s)) is not None
        ]
        if len(stds) < 2:
            return stds[0] if stds else None
        return torch.stack(stds).square().sum(0).sqrt()


def as_device(device: "Device | DeviceModel") -> Device:
    """A single effect as the device that has it alone."""
    if isinstance(device, DeviceModel):
        return Device(device)
    if not isinstance(device, Device):
        raise ConfigError(
            f"device must be a Device or a DeviceModel such as PCM() or Gaussian(0.05); "
            f"got {type(device).__name__}."
        )
    return device
