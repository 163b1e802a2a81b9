"""Which layers cost the accuracy, and which few to keep digital."""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from evenkeel.audit.names import resolve
from evenkeel.audit.plan import parse_age
from evenkeel.audit.run import evaluate
from evenkeel.data import as_data
from evenkeel.errors import ConfigError
from evenkeel.protocols import Device, Task


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs, mean over chips, in the task's unit.

    Attributes:
        layer: its path.
        alone: the metric with this layer on the chip and all others digital.
        without: the metric with all layers on the chip but this one.
    """

    layer: str
    alone: float
    without: float


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` returns.

    Attributes:
        metric: what was measured.
        unit: of it, "%" for points of 100.
        digital: the digital network's.
        analog: with all layers on the chip.
        layers: in the order of the network.
        kept: layers to keep digital one after the other, and the metric with all up to each.
        target: what was aimed at; None where nothing was.
    """

    metric: str
    unit: str
    digital: float
    analog: float
    layers: list[LayerCost]
    kept: list[tuple[str, float]]
    target: float | None

    @property
    def smallest(self) -> list[str] | None:
        """The layers to keep digital for the target; None where that is not reached."""
        if self.target is None or self.analog >= self.target:
            return []
        reached = [k for k, (_, value) in enumerate(self.kept) if value >= self.target]
        return [layer for layer, _ in self.kept[: reached[0] + 1]] if reached else None

    @property
    def said(self) -> str:
        """The outcome, in a sentence or two."""
        said = (
            f"{self.metric} {self.digital:.1f} {self.unit} in digital arithmetic, "
            f"{self.analog:.1f} {self.unit} with all layers on the chip."
        )
        if self.target is None:
            return said
        if self.smallest is None:
            return f"{said} {self.target:g} {self.unit} is not reached, with all layers digital."
        if not self.smallest:
            return f"{said} That reaches {self.target:g} {self.unit}; no layer need be digital."
        layers, last = (
            ", ".join(layer or "the network itself" for layer in self.smallest),
            dict(self.kept)[self.smallest[-1]],
        )
        return (
            f"{said} With {len(self.smallest)} of {len(self.layers)} digital it is {last:.1f} "
            f"{self.unit}: {layers}."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "smallest": self.smallest}


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    data: Any,
    *,
    device: str | Device = "pcm",
    age: str | float = "1d",
    task: str | Task = "classify",
    chips: int = 4,
    seed: int = 0,
    target: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Put a network's layers onto chips one at a time, all but one, and all but the worst.

    The chips of all three are the same: a layer's devices depend on the seed and its path alone. No
    remedy is at work. Layers are kept digital in the order of what each brings back alone, until
    the target is reached, so the set is small, and not proved to be the smallest.

    Args:
        model: any network.
        data: as for :func:`evenkeel.audit`; only test samples are used.
        device: one, by name or as an object whose ``program`` takes ``layers=``.
        age: of the chips.
        task: what is measured.
        chips: how many.
        seed: of the first.
        target: metric to reach with as few layers digital as may be.
        progress: called with evaluations done, and at most to do.

    Raises:
        ConfigError: the network does not fit the data, or the device cannot leave layers out.

    Examples:
        >>> import torch, evenkeel as ek
        >>> from evenkeel.audit.sensitivity import sensitivity
        >>> x = torch.randn(200, 4)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
        >>> found = sensitivity(net.eval(), (x, net(x).argmax(1)), device="gaussian:0.3", chips=2)
        >>> [cost.layer for cost in found.layers]
        ['0', '2']
    """
    if chips < 1:
        raise ConfigError(f"chips must be 1 or more; got {chips}.")
    measured: Task = resolve("tasks", task) if isinstance(task, str) else task
    hardware: Any = resolve("devices", device) if isinstance(device, str) else device
    samples, age_s = as_data(data), parse_age(age)
    model = copy.deepcopy(model).eval()
    measured.check(copy.deepcopy(model), samples.test, samples.classes)
    first = hardware.program(model, seed=seed)
    if not hasattr(first, "arrays"):
        raise _cannot_leave_out(hardware)
    paths = [array.path for _, array in first.arrays()]
    total, done = (2 * len(paths) + 1) * chips, 0

    def on_chips(layers: Collection[str]) -> float:
        nonlocal done
        values = []
        for chip_seed in range(seed, seed + chips):
            chip = _programmed(hardware, model, chip_seed, layers)
            chip.age_(age_s)
            chip.rewind_("evaluate")
            values.append(measured.value(evaluate(chip, samples, measured)))
            done += 1
            progress(min(done, total), total)
        return fmean(values)

    digital = measured.value(evaluate(model, samples, measured))
    analog = on_chips(paths)
    costs = [
        LayerCost(path, on_chips([path]), on_chips(set(paths) - {path}) if paths[1:] else digital)
        for path in paths
    ]
    kept = _kept(costs, target, analog, lambda on: on_chips(on) if on else digital)
    unit = getattr(measured, "unit", "%")
    return Sensitivity(measured.metric, unit, digital, analog, costs, kept, target)


def _kept(
    costs: Sequence[LayerCost],
    target: float | None,
    analog: float,
    on_chips: Callable[[set[str]], float],
) -> list[tuple[str, float]]:
    """Layers that go back to the digital side, until the target is reached."""
    order = sorted(costs, key=lambda cost: -cost.without)
    on, kept = {cost.layer for cost in costs}, []
    for k, cost in enumerate(order):
        if target is None or analog >= target:
            break
        on.discard(cost.layer)
        analog = cost.without if k == 0 else on_chips(on)
        kept.append((cost.layer, analog))
    return kept


def _programmed(device: Any, model: nn.Module, seed: int, layers: Collection[str]) -> Any:
    try:
        return device.program(model, seed=seed, layers=sorted(layers))
    except TypeError as error:
        raise _cannot_leave_out(device) from error


def _cannot_leave_out(device: Any) -> ConfigError:
    return ConfigError(
        f"{device.name} must be able to leave layers out: its program(model, seed=) needs layers= "
        f"besides, a list of paths, and its chips arrays()."
    )
