"""One layer of a network on an analog array."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evenkeel.analog.blocks import Found, Named
from evenkeel.analog.device import Device, State
from evenkeel.analog.periphery import through
from evenkeel.analog.together import at_age, states_of, written
from evenkeel.draws import Draws, keyed_normal, read_key
from evenkeel.errors import ConfigError
from evenkeel.layers import (
    FORWARD_HOOKS,
    WeightLayer,
    called,
    deepcopied,
    require_own_weight,
    restore_precision,
)

DERIVED = ("_conductance", "_read_std", "_matrix", "_variance")
"""Not saved: with read noise the first two, without it the finished matrix."""


class AnalogLayer(nn.Module):
    """A layer whose weights are conductance pairs; bias and all options stay digital.

    It keeps what programming left behind (``programmed`` and the effects' states) and derives from
    it, for the present age, the conductances and the deviation of a read. Both devices of a pair
    are kept for life, so that a chip has one trajectory.

    Args:
        layer: the digital layer; it is copied, and the copy loses its weight.
        weights: how this kind of layer shows its weights.
        device: what happens to the conductances.
        path: the layer's path in its network; with the seed it decides every draw.
        keep_target: for :func:`write_` to be called again.
    """

    programmed: Tensor
    unit: Tensor
    compensation: Tensor
    age: Tensor
    read_key: Tensor
    reads: Tensor
    ranges: Tensor
    target: Tensor | None
    bare: nn.Module
    watch: Any = None
    """Told of inputs and currents while ranges are calibrated."""
    _conductance: Tensor | None
    _read_std: Tensor | None
    _matrix: Tensor | None
    _variance: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        weights: WeightLayer,
        device: Device,
        path: str,
        *,
        keep_target: bool = False,
    ) -> None:
        super().__init__()
        self.keep_target = keep_target
        require_own_weight(layer, path)
        if parametrize.is_parametrized(layer):
            layer = copy.deepcopy(layer).eval()  # in training, reading may change it
        matrix = weights.matrix(layer)
        if not matrix.numel():
            raise ConfigError(f"'{path}' must have weights to be programmed; it has none.")
        self.target, unit = device.convert(matrix)  # (2, outputs, inputs), (outputs or 1, 1)
        if not bool(torch.isfinite(unit).all()):
            raise ConfigError(
                f"The weights of '{path}' must be finite to be programmed; they hold NaN or "
                "infinity. Check the checkpoint this network was loaded from."
            )
        self.outputs = len(matrix)
        self.layer = _without_weight(layer)
        for hooks in FORWARD_HOOKS:  # they belong to the call, and that is now this module's
            vars(self)[hooks] = vars(self.layer)[hooks]
            vars(self.layer)[hooks] = OrderedDict()
        self.register_forward_hook(called)  # or torch's transformer layers would compute past it
        # For what is digital only: not a module of this one, as it has nothing of its own.
        object.__setattr__(self, "bare", _without_bias(self.layer))
        self.dtype = matrix.dtype
        self.weights = weights
        self.device = device
        self.path = path
        self.register_buffer("unit", unit)
        self.has_ranges = False  # of inputs and currents, once they are calibrated
        if device.periphery is not None:
            self.register_buffer("ranges", torch.zeros(2))
        self._buffers.update(dict.fromkeys(DERIVED))
        self._non_persistent_buffers_set.update(DERIVED)

    @property
    def states(self) -> list[State]:
        """What the device's effects keep for each conductance."""
        return states_of(self.devices, len(self.device.models))

    @property
    def devices(self) -> Named:
        """What programming left behind, by the names of the buffers."""
        states = {k: v for k, v in self._buffers.items() if v is not None and k[:6] == "state_"}
        return {"programmed": self.programmed, **states}

    def _begin(self, seed: int, written: Named) -> None:
        """Be the array of a chip on which that has been written; it then has to be read."""
        self.seed = seed
        if not self.keep_target:
            self.target = None  # of a large array it is worth it
        self._buffers.update(
            compensation=self.unit.new_ones(self.outputs, 1),
            age=torch.zeros((), dtype=torch.float64),
            read_key=read_key(seed, self.path, "read", ""),
            reads=torch.zeros((), dtype=torch.int64),
        )
        for name, value in written.items():
            self.register_buffer(name, value)

    def _settle(self, mean: Tensor, spread: Tensor | None) -> None:
        """Keep what a forward pass needs of the devices as they are now."""
        if spread is not None and not _own_reads(self.device):
            self._buffers.update(_conductance=mean, _read_std=spread)
        elif self.device.periphery is None:
            self._matrix = self._weights_of(mean)
        else:
            self._matrix = mean[0] - mean[1]
            self._variance = None if spread is None else spread.sum(0)

    def _weights_of(self, conductance: Tensor) -> Tensor:
        # The compensation belongs to the digital output; on the matrix it is the same and cheaper.
        return self._together(conductance[0] - conductance[1]).mul_(self.unit * self.compensation)

    def _together(self, difference: Tensor) -> Tensor:
        slices = self.device.slices
        return difference if slices is None else slices.together(difference)

    def read(self) -> Tensor:
        """The weights (outputs, inputs) as one read finds them; each read has its own noise."""
        if self.device.periphery is not None:
            mean, _ = self.currents()
            return self._together(mean) * (self.unit * self.compensation)
        if self._matrix is not None:
            return self._matrix
        return self._weights_of(self._one_read())

    def currents(self) -> tuple[Tensor, Tensor | None]:
        """Differences of the pairs in µS, as read; the variance, where each product has its own."""
        if self._matrix is not None:
            return self._matrix, self._variance
        conductance = self._one_read()
        return conductance[0] - conductance[1], None

    def _one_read(self) -> Tensor:
        assert self._conductance is not None
        assert self._read_std is not None
        noise = keyed_normal(self._conductance, self.read_key, self.reads)
        self.reads.add_(1)
        return torch.addcmul(self._conductance, self._read_std, noise).clamp_min_(0)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output through its array."""
        if self.device.periphery is not None:
            return through(self, x)
        return self.weights.forward(self.layer, x, self.read().to(x.dtype))

    @property
    def weight(self) -> Tensor:
        """One read in the digital layer's shape, for code that asks a layer for its weight."""
        return self.weights.weight(self.layer, self.read().to(self.dtype))

    @torch.no_grad()
    def digital_twin(self) -> nn.Module:
        """The digital layer with one read as its weight."""
        layer = copy.deepcopy(self.layer)
        layer.weight = nn.Parameter(self.weight.clone())
        return layer

    @property
    def bias(self) -> Tensor | None:
        """The digital bias."""
        return self.layer.bias  # type: ignore[return-value]

    def age_(self, seconds: float) -> None:
        """Set the time since programming, in seconds."""
        self.device.require_age(seconds)
        self.age.fill_(seconds)
        derive_([self])

    def rewind_(self, stream: str) -> None:
        """Start the read noise anew, at the beginning of the stream of that name."""
        self.read_key.copy_(read_key(self.seed, self.path, "read", stream))
        self.reads.zero_()

    def fix_ranges_(self, ranges: Tensor | None) -> None:
        """Largest input, and largest current, that the converters take; None: as they come."""
        self.ranges.copy_(torch.zeros(2) if ranges is None else ranges)
        self.has_ranges = ranges is not None

    def compensate_(self, factor: Tensor) -> None:
        """Multiply the digital output by ``factor``, (outputs or 1, 1), in place of any before."""
        self.compensation.copy_(factor)
        derive_([self])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AnalogLayer":
        # A chip moved to half precision keeps its physics in float32: only the device may change.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_precision(self, before, before)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.has_ranges = self.device.periphery is not None and bool(self.ranges.any())
        derive_([self])

    def extra_repr(self) -> str:
        """Array size, device and age."""
        outputs, inputs = self.programmed.shape[1:]
        return f"{outputs}x{inputs} pairs, {self.device.name}, age={float(self.age):g} s"


@torch.inference_mode(False)
@torch.no_grad()
def write_(arrays: Sequence[AnalogLayer], seeds: Sequence[int]) -> list[list[Found]]:
    """Program the arrays' targets onto the devices of chips; given back are the buffers of each.

    The arrays then are those of the last one, which :func:`derive_` makes ready.
    """
    targets = [cast(Tensor, array.target) for array in arrays]
    draws = [Draws(seed, array.path) for seed in seeds for array in arrays]
    left = iter(written(arrays[0].device, targets * len(seeds), draws))
    chips = []
    for seed in seeds:
        for array in arrays:
            array._begin(seed, next(left))
        chips.append([dict(array._buffers) for array in arrays])
    return chips


@torch.inference_mode(False)  # what is kept must also serve outside of it
@torch.no_grad()
def derive_(arrays: Sequence[AnalogLayer]) -> None:
    """Make the arrays of one chip ready to be read at their age."""
    for array in arrays:
        array._buffers.update(dict.fromkeys(DERIVED))  # makes room
    device, age_s = arrays[0].device, float(arrays[0].age)
    devices = [array.devices for array in arrays]
    now = at_age(device, devices, age_s, moments=_own_reads(device))
    for array, found in zip(arrays, now, strict=True):
        array._settle(cast(Tensor, found["mean"]), found["spread"])


def _own_reads(device: Device) -> bool:
    return device.periphery is not None and device.periphery.reads == "each"


def _without_bias(layer: nn.Module) -> nn.Module:
    """The layer's options, with neither weight nor bias."""
    bare = copy.copy(layer)
    vars(bare)["_parameters"] = dict.fromkeys(layer._parameters)
    return bare


def _without_weight(layer: nn.Module) -> nn.Module:
    """A copy that keeps bias and options and has no weight."""
    stripped = deepcopied(layer, {id(layer._parameters.get("weight")): None})
    if parametrize.is_parametrized(stripped):
        # Not remove_parametrizations: it changes the class, which the copy shares with its model.
        bias = layer.bias
        stripped.__class__ = type(layer).__bases__[0]
        del stripped._modules["parametrizations"]
        if "bias" not in stripped._parameters:
            stripped.register_parameter("bias", nn.Parameter(cast(Tensor, bias).detach().clone()))
    stripped.register_parameter("weight", None)
    return stripped
