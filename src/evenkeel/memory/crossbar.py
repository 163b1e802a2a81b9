"""The memory on a crossbar: one column of devices for each support."""

import math
import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evenkeel.analog.converter import Converter
from evenkeel.analog.device import Device, DeviceModel, as_device
from evenkeel.memory.codes import of_products
from evenkeel.memory.columns import Columns
from evenkeel.memory.key_value import KeyValueMemory


class CrossbarMemory(KeyValueMemory):
    r"""A key-value memory whose keys are conductances; made by ``KeyValueMemory.program``.

    A key is a column; a query drives the rows, and the column's current is the inner product:

    | code | devices of a component | targets | current |
    |---|---|---|---|
    | binary | one | $G_i = a_i\,G_{\max}$ | $\sum_i q_i G_i$ |
    | complement | one, for a and one for 1 - a | $G_i = a_i\,G_{\max}$ | $\sum_i q_i G_i$ |
    | bipolar | a pair | $G^\pm_i = \max(\pm x_i, 0)\,G_{\max}$ | $\sum_i q_i (G^+_i - G^-_i)$ |
    | real | a pair | as bipolar, with $x$ in units of its largest component | as bipolar |

    Each write programs new columns, with noise of its own that is frozen from then on; what was
    written later is younger. A query is one access, with read noise of its own through its effect
    on the current: mean and variance of the clamped devices, Gaussian by the central limit. The
    seed and the number of the write or access decide all draws; the global generator does not move.

    The digital keys are kept beside the columns; recall does not look at them.

    Args:
        dim: of the vectors, d.
        device: what happens to the conductances.
        seed: which crossbar.
        converter: digitizes each column's current, of a pair the difference; None: exact. The
            largest that can come is that of a column of devices at ``g_max``, driven by a query.
        options: of :class:`KeyValueMemory`.

    Examples:
        >>> import torch, evenkeel as ek
        >>> memory = ek.memory.KeyValueMemory(512, code="bipolar")
        >>> memory.write(torch.randn(3, 512), ["cat", "dog", "owl"])
        >>> chip = memory.program(ek.analog.PCM(), seed=0).age_(86_400)
        >>> chip.read(memory.keys).labels, chip.devices
        (['cat', 'dog', 'owl'], 3072)

    References:
        Karunaratne et al., "Robust high-dimensional memory-augmented neural networks", Nature
        Communications 12, 2468 (2021).
    """

    def __init__(
        self,
        dim: int,
        device: Device | DeviceModel,
        *,
        seed: int,
        converter: Converter | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, **options)
        self.converter = converter
        self.paired = self.code in ("bipolar", "real")
        self.columns = Columns(
            as_device(device), self.keys.shape[1], pairs=self.paired, seed=operator.index(seed)
        )

    @property
    def devices(self) -> int:
        """Number of devices that hold the keys."""
        return self.columns.programmed.numel()

    @property
    def age_s(self) -> float:
        """Seconds since it was made."""
        return float(self.columns.clock)

    def age_(self, seconds: float) -> "CrossbarMemory":
        """Set the time since it was made, in seconds, not before the last write.

        A column's age runs from its own write. Each device is on one trajectory, so the way does
        not matter.
        """
        self.columns.age_(seconds)
        return self

    def compensate_(self) -> "CrossbarMemory":
        """Scale each column's output by how much it has faded, as read with all rows driven.

        Codes whose attention does not ask for a common factor, binary and bipolar, need it least;
        the complement code, from whose current a constant is taken off, most.
        """
        self.columns.compensate_()
        return self

    def similarities(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities by the columns' currents, (..., columns), and the class of each column."""
        columns = self.columns
        x = queries.to(columns.unit.dtype)
        length = x.norm(dim=-1, keepdim=True)
        if self.code == "real":  # rows are driven by a vector of length 1
            x = F.normalize(x, dim=-1)
        current = columns.currents(x)
        if self.converter is not None:
            on = math.sqrt(self.dim) if self.code == "real" else self.dim
            current = self.converter(current, on * columns.device.g_max, signed=self.paired)
        products = current * (columns.unit * columns.compensation)
        if columns.device.g_min and not self.paired:  # what rows at the lowest state conduct
            products = products - columns.unit * (columns.device.g_min * x.sum(-1, keepdim=True))
        if self.code == "real" and self.measure == "dot":
            products = products * length
        elif self.code == "binary" and self.measure == "cosine":
            products = products / length.clamp_min(1)
        owners = self.owners
        if self.prototypes:
            owners = torch.arange(len(self.classes), device=owners.device)
        width = self.keys.shape[1]
        return of_products(products, width, self.code, self.measure), owners

    def _bits(self) -> None:
        """None: currents are no distances of bits."""
        return

    def _become(self, classes: list[Hashable], kept: Tensor, keys: Tensor, owners: Tensor) -> None:
        before = self.classes, self.keys, self.owners
        columns = dict(self.columns._buffers)
        rows = self.rows()[0] if self.prototypes else self.keys
        super()._become(classes, kept, keys.detach(), owners)
        try:
            self._program(before[0], rows, kept)
        except BaseException:
            self.classes, self.keys, self.owners = before
            self.columns._buffers.update(columns)
            raise

    def _program(self, classes: list[Hashable], rows: Tensor, kept: Tensor) -> None:
        """Bring the columns, which held ``rows``, to what is kept now; write only what is new."""
        now = self.rows()[0].detach() if self.prototypes else self.keys.detach()
        if self.prototypes:  # one column for each class, written anew where it has changed
            old = {label: i for i, label in enumerate(classes)}
            stay = [old.get(label, -1) for label in self.classes]
            stay = [
                i if i >= 0 and torch.equal(rows[i], now[k]) else -1 for k, i in enumerate(stay)
            ]
            order = self.owners.new_tensor(stay)
        else:
            old_ones = kept.nonzero().flatten()
            order = torch.cat([old_ones, old_ones.new_full((len(now) - len(old_ones),), -1)])
        fresh = order < 0
        order[fresh] = len(self.columns) + torch.arange(int(fresh.sum()), device=order.device)
        if fresh.any():
            self.columns.write_(*self._targets(now[fresh].float()))
        self.columns.keep_(order)

    def _targets(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Target conductances of keys (n, width), and what a µS stands for in each (n,)."""
        device = self.columns.device
        if self.code == "real":
            rows = F.normalize(rows, dim=-1) if self.measure == "cosine" else rows
        # A real column is scaled by its own largest, whatever it is written together with.
        largest = rows.abs().amax(-1) if self.code == "real" else rows.new_ones(len(rows))
        share = rows / torch.where(largest > 0, largest, 1).unsqueeze(1)
        signs = (share, -share) if self.paired else (share,)
        span = device.g_max - device.g_min
        target = torch.stack([sign.clamp_min(0) for sign in signs]) * span
        if device.g_min:
            target += device.g_min
        unit = largest / span
        if self.code == "binary" and self.measure == "cosine":
            unit = unit / rows.norm(dim=-1).clamp_min(1)
        return target, unit

    def extra_repr(self) -> str:
        """What it was made with, what it holds, and the converter."""
        converter = f", {self.converter}" if self.converter else ""
        return super().extra_repr() + converter
