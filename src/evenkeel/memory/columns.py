"""Columns of devices that are written one after the other, and read by driving all rows."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from evenkeel.analog.blocks import Named
from evenkeel.analog.device import Device
from evenkeel.analog.together import at_age, written
from evenkeel.draws import Draws, keyed_normal, read_key
from evenkeel.errors import ConfigError
from evenkeel.layers import restore_precision

NAME = "memory"
TINY = 1e-30
"""Of a variance: the root's slope stays finite."""


class Columns(nn.Module):
    """An array that grows by columns, each with an age of its own.

    Args:
        device: what happens to the conductances.
        rows: devices of a column, of a pair of columns twice as many.
        pairs: whether a column is a pair whose currents are subtracted.
        seed: with the number of the write or access it decides every draw.
    """

    programmed: Tensor
    unit: Tensor
    compensation: Tensor
    written_at: Tensor
    clock: Tensor
    writes: Tensor
    accesses: Tensor
    read_key: Tensor
    fresh: Tensor
    _total: Tensor
    _mean: Tensor
    _variance: Tensor | None

    @torch.inference_mode(False)  # made inside of it, it must also serve outside
    def __init__(self, device: Device, rows: int, *, pairs: bool, seed: int) -> None:
        super().__init__()
        if device.periphery is not None or device.slices is not None:
            raise ConfigError(
                f"A memory's crossbar has a converter of its own (converter=) and no slices; got "
                f"{device.name}. Leave periphery and slices out of its device."
            )
        self.device = device
        self.seed = seed
        self.register_buffer("unit", torch.zeros(0))
        self.register_buffer("compensation", torch.zeros(0))
        self.register_buffer("written_at", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.float64))
        self.register_buffer("writes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("accesses", torch.zeros((), dtype=torch.int64))
        # All devices of a column together, as right after its write: mean and variance of a read.
        self.register_buffer("fresh", torch.zeros(0, 2))
        # Derived, so not saved: the same now, and what a read gives of each component.
        self.register_buffer("read_key", read_key(seed, NAME, "read"), persistent=False)
        self.register_buffer("_total", None, persistent=False)
        self.register_buffer("_mean", None, persistent=False)
        self.register_buffer("_variance", None, persistent=False)
        # Two columns that are thrown away tell what the device's effects keep.
        shape = (1 + pairs, 2, rows)
        (kept,) = written(device, [torch.full(shape, device.g_min)], [Draws(seed, NAME)])
        self._kept = list(kept)
        for name, value in kept.items():
            if value.shape != shape:
                raise ConfigError(
                    f"A memory grows column by column, so {device.name} must keep its state in "
                    f"tensors of the conductances' shape, {shape}; "
                    f"'{name}' has {tuple(value.shape)}."
                )
            self.register_buffer(name, value[:, :0])
        self._derive()

    def __len__(self) -> int:
        """Number of columns."""
        return len(self.written_at)

    @torch.inference_mode(False)
    @torch.no_grad()
    def write_(self, target: Tensor, unit: Tensor) -> None:
        """Program further columns.

        Args:
            target: conductances in µS, (1 or 2, new, rows).
            unit: what a product is multiplied by for each µS, (new,).
        """
        draws = Draws(self.seed, f"{NAME} write {int(self.writes)}")
        (kept,) = written(self.device, [target], [draws])
        mean, variance, total = self._reads(kept, 0.0)
        new: Named = {
            **kept,
            "unit": unit,
            "compensation": torch.ones_like(unit),
            "written_at": self.clock.expand(len(unit)),
            "fresh": total,
        }
        derived = {"_mean": mean, "_variance": variance, "_total": total}
        alike = (variance is None) == (self._variance is None)
        if alike:  # the old ones are as they were: no time has passed
            new |= {name: value for name, value in derived.items() if value is not None}
        for name, value in new.items():
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, value.to(old)], _axis(value)))
        self.writes = self.writes + 1  # not in place: a write that fails puts the old one back
        if not alike:
            self._derive()

    @torch.inference_mode(False)
    @torch.no_grad()
    def keep_(self, order: Tensor) -> None:
        """Keep these columns, in this order, and no others."""
        if torch.equal(order, torch.arange(len(self), device=order.device)):
            return
        for name in self._growing():
            value = getattr(self, name)
            setattr(self, name, value.index_select(_axis(value), order))

    def _growing(self) -> list[str]:
        """Names of what has a part for each column."""
        return [
            k for k, v in self._buffers.items() if v is not None and v.dim() and k != "read_key"
        ]

    def age_(self, seconds: float) -> None:
        """Set the clock."""
        last = float(self.written_at.max()) if len(self) else 0.0
        if not last <= seconds < math.inf:
            raise ConfigError(
                f"A memory's age must be finite and not before its last write, at {last:g} s; got "
                f"{seconds!r}."
            )
        self.device.require_age(seconds - float(self.written_at.min()) if len(self) else seconds)
        self.clock.fill_(seconds)
        self._derive()

    @torch.no_grad()
    def compensate_(self) -> None:
        """Scale each column by how much all its devices have faded together, as read."""
        fresh, now = self._as_read(self.fresh), self._as_read(self._total)
        self.compensation.copy_(torch.where(now > 0, fresh / now, 1.0))

    def currents(self, x: Tensor) -> Tensor:
        """Current of each column, (..., columns), where x (..., rows) drives the rows; in µS."""
        with torch.autocast(x.device.type, enabled=False):  # it is physics, not a layer
            current = x @ self._mean.T
            if self._variance is None:
                return current
            variance = x.square() @ self._variance.T
            std = torch.where(variance > 0, variance.clamp_min(TINY).sqrt(), 0)
        return current + std * self._noise(current.detach())

    def _noise(self, like: Tensor) -> Tensor:
        noise: Tensor = keyed_normal(like, self.read_key, self.accesses)
        self.accesses += 1
        return noise

    def _as_read(self, total: Tensor) -> Tensor:
        mean, variance = total.unbind(1)
        return mean if self._variance is None else mean + variance.sqrt() * self._noise(mean)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _derive(self) -> None:
        """What a read gives now; columns of one age are taken together."""
        times = self.written_at.unique().tolist()
        if len(times) < 2:
            age_s = float(self.clock) - (times or [0.0])[0]
            everything = self._reads(self._devices(slice(None)), age_s)
            self._mean, self._variance, self._total = everything
            return
        groups = [(self.written_at == time).nonzero().flatten() for time in times]
        parts = [
            self._reads(self._devices(rows), float(self.clock) - time)
            for rows, time in zip(groups, times, strict=True)
        ]
        back = torch.cat(groups).argsort()
        self._mean = torch.cat([mean for mean, _, _ in parts])[back]
        self._total = torch.cat([total for _, _, total in parts])[back]
        noisy = [torch.zeros_like(mean) if v is None else v for mean, v, _ in parts]
        exact = all(variance is None for _, variance, _ in parts)
        self._variance = None if exact else torch.cat(noisy)[back]

    def _devices(self, rows: Any) -> Named:
        return {name: getattr(self, name)[:, rows] for name in self._kept}

    def _reads(self, devices: Named, age_s: float) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of columns of one age: mean and variance of a read of each component, and of all at once.

        The variance is None where reads are exact.
        """
        (now,) = at_age(self.device, [devices], age_s, moments=True)
        mean, variance = cast(Tensor, now["mean"]), now["spread"]
        all_mean = mean.sum((0, 2))
        all_variance = torch.zeros_like(all_mean) if variance is None else variance.sum((0, 2))
        total = torch.stack([all_mean, all_variance], 1)
        mean = mean[0] if len(mean) == 1 else mean[0] - mean[1]
        return mean, None if variance is None else variance.sum(0), total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Columns":
        # Moved to half precision it keeps its physics in float32: only the device may change.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_precision(self, before, before)
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        # It takes the size of what was kept.
        for name, own in self._buffers.items():
            given = state.get(prefix + name)
            if own is None or given is None or name not in self._growing():
                continue
            axis = _axis(own)
            size = list(own.shape)
            size[axis : axis + 1] = given.shape[axis : axis + 1]
            setattr(self, name, own.new_empty(size))
        super()._load_from_state_dict(state, prefix, *args)
        self._derive()

    def extra_repr(self) -> str:
        """Columns, rows, device and age."""
        halves, columns, rows = self.programmed.shape
        pairs = " pairs" if halves == 2 else ""
        return f"{columns} x {rows}{pairs}, {self.device.name}, age={float(self.clock):g} s"


def _axis(of_columns: Tensor) -> int:
    return max(0, of_columns.dim() - 2)
