"""What a chip takes: tiles, devices, conversions, and the share of the work that it does."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.analog.chip import Chip
from evenkeel.analog.layer import AnalogLayer
from evenkeel.analog.periphery import tiles
from evenkeel.batches import size
from evenkeel.errors import ConfigError
from evenkeel.layers import Wrapper

_WITH_WEIGHTS = {"mm", "addmm", "convolution"}
"""Operations by which layers multiply with weights; products of activations have others."""


@dataclass(frozen=True)
class Counts:
    """Of one inference, which is one sample.

    Attributes:
        tiles: arrays, with a layer's rows cut as the periphery says.
        devices: that hold weights.
        dac: conversions of inputs: each row of each tile, for every product; slices share them.
        adc: conversions of currents: each column of each tile, for every product.
        analog: multiplications with a weight, by layer on the chip.
        digital: likewise, by layer that stayed digital, as far as torch can count it.
    """

    tiles: int
    devices: int
    dac: float
    adc: float
    analog: dict[str, float]
    digital: dict[str, float]

    @property
    def analog_share(self) -> float:
        """Of all multiplications with a weight, from 0 to 1."""
        on_chip, beside = sum(self.analog.values()), sum(self.digital.values())
        return on_chip / (on_chip + beside)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "analog_share": self.analog_share}


@torch.no_grad()
def count(chip: Chip, *inputs: Any) -> Counts:
    """Run a chip once, and count what it takes.

    Args:
        chip: whose periphery says how layers are cut into tiles.
        inputs: of the network; the first tensor's first axis is that of samples.

    Raises:
        ConfigError: no layer of the chip was reached.

    Examples:
        >>> import torch, evenkeel as ek
        >>> chip = ek.analog.program(torch.nn.Conv2d(3, 8, 3), ek.analog.PCM(), seed=0)
        >>> counts = ek.analog.count(chip, torch.randn(5, 3, 10, 10))
        >>> counts.devices, counts.adc, counts.analog_share
        (432, 512.0, 1.0)
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    samples = size(inputs)
    if not samples:
        raise ConfigError("Counting needs inputs with one sample or more; got none.")
    seen: dict[str, list[float]] = {}  # products, multiplications
    reads = {path: array.reads.clone() for path, array in chip.arrays()}
    with contextlib.ExitStack() as after, FlopCounterMode(display=False) as flops:
        for path, array in chip.arrays():
            after.callback(array.register_forward_hook(_counting(seen, path)).remove)
            after.callback(array.reads.copy_, reads[path])
        chip(*inputs)
    if not seen:
        raise ConfigError("The inputs reach no layer of the chip, so there is nothing to count.")
    arrays = dict(chip.arrays())
    cut = {path: len(list(tiles(array, _rows(array)))) for path, array in arrays.items()}
    by_module = flops.get_flop_counts()
    return Counts(
        tiles=sum(cut[path] * _slices(array) for path, array in arrays.items()),
        devices=sum(array.programmed.numel() for array in arrays.values()),
        dac=sum(seen[path][0] * arrays[path].programmed.shape[2] for path in seen) / samples,
        adc=sum(seen[path][0] * arrays[path].programmed.shape[1] * cut[path] for path in seen)
        / samples,
        analog={path: multiplied / samples for path, (_, multiplied) in seen.items()},
        digital={path: _own(chip.model, path, by_module) / samples for path in chip.digital},
    )


def _slices(array: AnalogLayer) -> int:
    """Arrays that hold a weight of the layer together."""
    return array.programmed.shape[1] // array.outputs


def _rows(array: AnalogLayer) -> int | None:
    return array.device.periphery.rows if array.device.periphery else None


def _counting(seen: dict[str, list[float]], path: str) -> Any:
    def hook(array: AnalogLayer, args: tuple[Any, ...], y: Tensor) -> None:
        outputs, inputs = array.outputs, array.programmed.shape[2]
        products = y.numel() / outputs
        multiplied = products * outputs * inputs
        if getattr(array.layer, "transposed", False):  # most of a row meets zeros
            channels: Any = array.layer.in_channels
            multiplied = args[0].numel() / channels * outputs * inputs
        at = seen.setdefault(path, [0.0, 0.0])
        at[0] += products
        at[1] += multiplied

    return hook


def _own(model: nn.Module, path: str, by_module: dict[str, dict[Any, int]]) -> float:
    """Multiplications of a module itself, without those of the modules in it."""
    name, module = f"Chip.model.{path}".rstrip("."), model.get_submodule(path)
    while isinstance(module, Wrapper):  # what goes by the layer's path
        name, module = f"{name}.layer", module.layer
    parts = [f"{name}.{part}" for part, _ in module.named_children()]
    whole, *inside = (_of_weights(by_module.get(at, {})) for at in (name, *parts))
    return (whole - sum(inside)) / 2


def _of_weights(operations: dict[Any, int]) -> float:
    names = {op: getattr(op, "__name__", str(op)).split(".")[-1] for op in operations}
    return float(sum(n for op, n in operations.items() if names[op] in _WITH_WEIGHTS))
