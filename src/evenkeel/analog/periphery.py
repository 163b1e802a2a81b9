"""What stands between an array and the digital side: converters, tiles, wires, reads."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from evenkeel.analog.converter import Converter
from evenkeel.draws import keyed_noise
from evenkeel.errors import ConfigError, nearest

if TYPE_CHECKING:
    from evenkeel.analog.layer import AnalogLayer

Reads = Literal["shared", "each"]
Run = Callable[[Tensor, Tensor], Tensor]
TINY = 1e-30


@dataclass(frozen=True)
class Periphery:
    r"""Converters, tiles and wires around an array; all of it is ideal unless asked for.

    With inputs $x$ and conductances $G$ in µS, each tile of so many rows gives

    $$ I_i = \sum_j G_{ij}\,\mathrm{DAC}(x_j) - \mathrm{drop}_i + \text{noise}, \qquad
       y_i = s_i \sum_{\text{tiles}} \mathrm{ADC}(I_i) + b_i $$

    with the digital scale $s_i$ of a layer or column.

    Args:
        dac: of the inputs. Its range is the largest input of each sample, or what
            :func:`evenkeel.analog.calibrate_ranges_` has found, times its ``limit``.
        serial: inputs enter as signed bits, one after the other, of which each is converted on its
            own and shifted digitally; the bits are those of ``dac``.
        adc: of each tile's currents. Its range is, likewise, their largest in each sample, or what
            was found; with ``bound`` it is fixed.
        bound: range of the ADC, in products of the largest input and the largest conductance.
        rows: inputs of a tile; currents of different tiles are converted one by one and added
            digitally. A convolution's tile holds whole channels. Default: one tile for each layer.
        reads: "shared": a forward pass reads each device once. "each": every product with an input
            vector has read noise of its own, through its effect on the current: mean and variance
            of the clamped devices, Gaussian by the central limit.
        output_noise: deviation of each current, in products of the largest input and conductance.
        wire_ohm: resistance of the wire between two rows, for which the drop along it is

            $$ \mathrm{drop}_i = c_i \sum_j G_{ij} x_j \big(1 - (1 - j/n)^2\big), \quad
               c_i = a_i\,(0.05\,a_i^2 - 0.2\,a_i + 0.5), \quad
               a_i = n\,R\,G_{\max} \sum_j |g_{ij}|\,|x_j| $$

            with $g$ and $x$ in shares of the largest, for n rows.

    Raises:
        ConfigError: numbers that are out of range.

    Examples:
        >>> import torch, evenkeel as ek
        >>> from evenkeel.analog import Converter, Device, Gain, Periphery
        >>> eight = Periphery(dac=Converter(8), adc=Converter(8), rows=4)
        >>> layer, x = torch.nn.Linear(16, 3), torch.randn(2, 16)
        >>> chip = ek.analog.program(layer, Device(Gain(1.0), periphery=eight), seed=0)
        >>> bool(0 < (chip(x) - layer(x)).abs().max() < 0.05)
        True

    References:
        The drop is the analytic law of aihwkit 1.1.0; the read, as by Le Gallo et al., "Using the
        IBM analog in-memory hardware acceleration kit", APL Machine Learning 1, 041102 (2023).
    """

    dac: Converter | None = None
    serial: bool = False
    adc: Converter | None = None
    bound: float | None = None
    rows: int | None = None
    reads: Reads = "shared"
    output_noise: float = 0.0
    wire_ohm: float = 0.0

    def __post_init__(self) -> None:
        if self.reads not in get_args(Reads):
            raise ConfigError(
                f"Unknown reads {self.reads!r}. {nearest(self.reads, get_args(Reads))}"
            )
        if self.serial and self.dac is None:
            raise ConfigError("serial inputs have the bits of a dac; got none: dac=Converter(8).")
        if self.rows is not None and (not isinstance(self.rows, int) or self.rows < 1):
            raise ConfigError(f"rows must be a whole number, 1 or more; got {self.rows!r}.")
        if self.bound is not None and not 0 < self.bound < math.inf:
            raise ConfigError(f"bound must be above 0 and finite; got {self.bound!r}.")
        for name in ("output_noise", "wire_ohm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} must be 0 or more and finite; got {getattr(self, name)!r}."
                )

    def to_dict(self) -> dict[str, Any]:
        """All settings, as they identify it in stored results."""
        return asdict(self)

    @property
    def needs_peak(self) -> bool:
        """Whether anything is in units of the largest input."""
        return bool(
            self.dac or self.output_noise or self.wire_ohm or (self.adc and self.bound is not None)
        )

    def __str__(self) -> str:
        """What is not ideal."""
        parts = [
            f"{self.dac.bits}{' serial bits' if self.serial else '-bit DAC'}" if self.dac else "",
            f"{self.adc.bits}-bit ADC" if self.adc else "",
            f"{self.rows} rows" if self.rows else "",
            "reads of their own" if self.reads == "each" else "",
            f"output noise {self.output_noise:g}" if self.output_noise else "",
            f"{self.wire_ohm:g} ohm" if self.wire_ohm else "",
        ]
        return ", ".join(part for part in parts if part)


def through(array: "AnalogLayer", x: Tensor) -> Tensor:
    """A layer's output through its array and the periphery around it."""
    around = array.device.periphery
    assert around is not None
    if x.dtype == torch.float16:  # which has no room for currents
        return through(array, x.float()).half()
    ranges, peak = array.ranges if array.has_ranges else None, x.new_zeros(())
    if array.watch is not None:
        array.watch.take_inputs(x)
    if around.needs_peak:
        peak = _peak(array, x) if ranges is None else ranges[0].to(x.dtype)
    driven = x if around.dac is None else converted(x, around.dac, peak)
    mean, variance = array.currents()
    total: Tensor | None = None
    for shift, inputs in _in_turn(driven, around, peak):
        for share, at, run in _arrays(array, around.rows):
            g, power = mean[at].to(x.dtype), None
            if variance is not None:
                power = variance[at].to(x.dtype)
            y = _tile(array, run, inputs, g, power, peak)
            y = y if shift * share == 1 else y * (shift * share)
            total = y if total is None else total + y
    assert total is not None
    return _scaled(array, total)


def _tile(
    array: "AnalogLayer", run: Run, x: Tensor, g: Tensor, power: Tensor | None, peak: Tensor
) -> Tensor:
    """What one tile gives to the digital side."""
    around, device = array.device.periphery, array.device
    assert around is not None
    y = run(x, g)
    full = _like(peak * device.g_max, y)
    if power is not None:
        deviation = run(x.square(), power).clamp_min_(TINY).sqrt_()
        y = y.addcmul_(deviation, _noise(array, y))
    if around.wire_ohm:
        y = _with_drop(y, run, x, g, peak, around.wire_ohm * 1e-6)
    if around.output_noise:
        y = y + around.output_noise * full * _noise(array, y)
    if array.watch is not None:
        array.watch.take_currents(y)
    if around.adc is None:
        return y
    if around.bound is not None:
        limit = around.bound * full
    else:
        limit = array.ranges[1].to(y.dtype) if array.has_ranges else _peak(array, y)
    return converted(y, around.adc, limit)


def _in_turn(x: Tensor, around: Periphery, peak: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Inputs as they enter, and by what their products are multiplied digitally."""
    if not around.serial or around.dac is None:
        yield 1.0, x
        return
    step = step_of(around.dac, peak)
    codes = (x / step).round()
    top = 2 ** (around.dac.bits - 1) - 1  # which rounding may go beyond
    magnitude, sign = codes.abs().to(torch.int64).clamp_max(top), codes.sign()
    for bit in range(around.dac.bits - 1):
        # Each bit drives a row as far as all bits together would.
        far = 2 ** (around.dac.bits - 1)
        yield 2**bit / far, (magnitude >> bit & 1).to(x.dtype) * sign * (step * far)


def _arrays(
    array: "AnalogLayer", rows: int | None
) -> Iterator[tuple[float, tuple[slice, slice], Run]]:
    """Of each slice and tile: what its outputs count, where its devices are, and its product."""
    slices, n = array.device.slices, array.outputs
    for s, share in enumerate([1.0] if slices is None else slices.shares):
        for columns, run in tiles(array, rows):
            yield share, (slice(s * n, (s + 1) * n), columns), run


def tiles(array: "AnalogLayer", rows: int | None) -> Iterator[tuple[slice, Run]]:
    """Columns of the matrix that one tile holds, and the product of inputs with such a block.

    A block of a kind of layer that does not say how it is cut runs among zeros.
    """
    weights: Any = array.weights
    layer, number = array.bare, array.programmed.shape[2]
    grain = weights.grain(layer) if hasattr(weights, "grain") else None
    each = number if rows is None else max(grain or 1, rows // (grain or 1) * (grain or 1))
    if each >= number:
        yield slice(0, number), functools.partial(weights.forward, layer)
        return
    for start in range(0, number, each):
        stop = min(start + each, number)

        def run(x: Tensor, block: Tensor, start: int = start, stop: int = stop) -> Tensor:
            y: Tensor = (
                weights.forward(layer, x, F.pad(block, (start, number - stop)))
                if grain is None
                else weights.block(layer, x, block, start)
            )
            return y

        yield slice(start, stop), run


def converted(x: Tensor, converter: Converter, largest: Tensor) -> Tensor:
    """What a converter makes of values in a range; their gradient passes where it does not clip."""
    levels, step = 2 ** (converter.bits - 1) - 1, step_of(converter, largest)
    q: Tensor = (x / step).round_().clamp_(-levels, levels).mul_(step)
    if not x.requires_grad:
        return q
    inside: Tensor = x.clamp(-step * levels, step * levels)
    return inside + (q - inside).detach()


def step_of(converter: Converter, largest: Tensor) -> Tensor:
    """Between two codes, for a range on both sides of zero."""
    step: Tensor = largest * (converter.limit / (2 ** (converter.bits - 1) - 1))
    return step.clamp_min(TINY)


def _peak(array: "AnalogLayer", x: Tensor) -> Tensor:
    """Largest of each sample, to be multiplied with it; of one alone a single number."""
    if not x.numel():
        return x.new_zeros(())
    rows = x.detach()
    rows = rows.reshape(1, -1) if x.dim() < 2 + _rank(array) else rows.flatten(1)
    peak = torch.maximum(rows.amax(1), -rows.amin(1))  # many times faster than aminmax
    return peak.view(-1, *[1] * (x.dim() - 1)) if x.dim() >= 2 + _rank(array) else peak[0]


def _rank(array: "AnalogLayer") -> int:
    """Axes of an output behind its channels."""
    return len(getattr(array.layer, "kernel_size", ()))


def _like(value: Tensor, y: Tensor) -> Tensor:
    """A number for each sample, for outputs of other axes."""
    return value if value.dim() == 0 else value.reshape(-1, *[1] * (y.dim() - 1))


def _noise(array: "AnalogLayer", like: Tensor) -> Tensor:
    noise: Tensor = keyed_noise(like.detach(), array.read_key, array.reads)
    array.reads.add_(1)
    return noise


def _with_drop(y: Tensor, run: Run, x: Tensor, g: Tensor, peak: Tensor, wire: float) -> Tensor:
    """Less the drop along wires of that resistance, in MΩ, between rows."""
    n = g.shape[1]
    j = torch.arange(n, device=g.device, dtype=g.dtype) / n
    far = run(x, g * (1 - (1 - j).square()))
    a = run(x.abs(), g.abs()) * (n * wire / _like(peak, y).clamp_min(TINY))
    c = (a * 0.05).sub_(0.2).mul_(a).add_(0.5).mul_(a)
    return y.addcmul_(c, far, value=-1)


def _scaled(array: "AnalogLayer", current: Tensor) -> Tensor:
    """Digital: weights per µS, and the bias."""
    scale, shape = (array.unit * array.compensation).to(current.dtype), [-1, *[1] * _rank(array)]
    y = current * scale.view(shape)
    bias = array.bias
    return y if bias is None else y + bias.to(y.dtype).view(shape)
