"""Fixed ranges for a chip's converters, from a few inputs."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.analog.chip import Chip
from evenkeel.analog.layer import AnalogLayer
from evenkeel.errors import CalibrationError, ConfigError


@torch.no_grad()
def calibrate_ranges_(
    chip: Chip,
    batches: Iterable[Any],
    *,
    quantile: float = 0.999,
    forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(
        batch[0] if isinstance(batch, tuple | list) else batch
    ),
) -> dict[str, tuple[float, float]]:
    """Fix the ranges of every layer's converters at a quantile of what comes, in place.

    Until then a converter's range follows the largest value of each sample, which hardware can only
    do with a second pass. What is beyond a fixed range is clipped.

    Args:
        chip: with a :class:`Periphery`.
        batches: a few, unlabelled; of (inputs, ...) the first item is the input.
        quantile: share of absolute inputs, and of absolute currents, that are not clipped; the
            largest over batches and tiles is taken.
        forward: how to run a batch.

    Returns:
        By layer, the range of inputs and, in µS times the unit of inputs, of currents.

    Raises:
        ConfigError: a quantile that is none, or a chip without a periphery.
        CalibrationError: a layer saw nothing that is not zero; all ranges are then as they were.

    Examples:
        >>> import torch, evenkeel as ek
        >>> from evenkeel.analog import Converter, Device, PCM, Periphery
        >>> device = Device(PCM(), periphery=Periphery(dac=Converter(8), adc=Converter(8)))
        >>> chip = ek.analog.program(torch.nn.Linear(64, 8), device, seed=0)
        >>> ranges = ek.analog.calibrate_ranges_(chip, [torch.randn(100, 64)], quantile=0.99)
        >>> 2.3 < ranges[""][0] < 2.8  # of normal inputs
        True
    """
    if not 0 < quantile <= 1:
        raise ConfigError(f"quantile must be above 0 and at most 1; got {quantile!r}.")
    if not isinstance(chip, Chip):
        raise ConfigError(
            f"Ranges are those of one chip; got {type(chip).__name__}. Of many, take chips[k]."
        )
    if chip.device.periphery is None:
        raise ConfigError(
            "Ranges are those of converters, and this chip's device has no periphery: "
            "Device(..., periphery=Periphery(dac=Converter(8), adc=Converter(8)))."
        )
    seen = {path: _Seen(quantile) for path, _ in chip.arrays()}
    before = {
        path: array.ranges.clone() if array.has_ranges else None for path, array in chip.arrays()
    }
    for path, array in chip.arrays():
        array.watch = seen[path]
        array.fix_ranges_(None)
    try:
        for batch in batches:
            forward(chip, batch)
        found = {path: (saw.inputs, saw.currents) for path, saw in seen.items()}
        for path, pair in found.items():
            if not all(map(math.isfinite, pair)):
                raise CalibrationError(f"Inputs or currents of '{path}' are NaN or infinite.")
            if not pair[0] > 0:
                raise CalibrationError(
                    f"The layer '{path}' has seen no input, or nothing but zeros, so its range is "
                    f"not known. Give batches that reach every layer."
                )
            found[path] = pair[0], pair[1] or 1.0  # weights of zero: any range will do
    except BaseException:
        _put(chip, before)
        raise
    _put(chip, {path: torch.tensor(pair) for path, pair in found.items()})
    return found


class _Seen:
    """What has come to one layer."""

    def __init__(self, quantile: float) -> None:
        self.quantile, self.inputs, self.currents = quantile, 0.0, 0.0

    def take_inputs(self, x: Tensor) -> None:
        self.inputs = max(self.inputs, self._of(x))

    def take_currents(self, y: Tensor) -> None:
        self.currents = max(self.currents, self._of(y))

    def _of(self, values: Tensor) -> float:
        flat = values.detach().abs().flatten().float()
        if not len(flat):
            return 0.0
        if not bool(torch.isfinite(flat).all()):
            return math.inf
        return float(flat.kthvalue(max(1, math.ceil(self.quantile * len(flat)))).values)


def _put(chip: Chip, ranges: dict[str, Tensor | None]) -> None:
    arrays: dict[str, AnalogLayer] = dict(chip.arrays())
    for path, array in arrays.items():
        array.watch = None
        array.fix_ranges_(ranges[path])
