"""How close the units of a network are to being off for every input."""

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evenkeel.batches import size
from evenkeel.errors import ConfigError
from evenkeel.moments import BatchMoments
from evenkeel.norm.batch_channel import BatchChannelNorm
from evenkeel.norm.convert import followed_by, is_normalizer

DEAD = 0.01
"""A unit that is on for less than this share of inputs and positions counts as dead."""
_RELUS = {
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
    torch.ops.aten.threshold.default,
    torch.ops.aten.hardtanh.default,
    torch.ops.aten.hardtanh_.default,
    torch.ops.aten.leaky_relu.default,
    torch.ops.aten.leaky_relu_.default,
}


@dataclass(frozen=True)
class Row:
    """One normalizer, or one ReLU that something else than a normalizer feeds.

    Attributes:
        layer: path of the normalizer; of the module that calls the ReLU, with a count.
        kind: class of the normalizer, or "relu".
        relu: whether a ReLU takes its output as it is.
        channels: number of channels.
        dead: share of channels that are on for less than 1 % of inputs and positions.
        mean_distance: mean over channels of $|m_c|$, with $m_c$ the mean of what the normalizer
            gives before its affine parameters; batch norm's is 0. Of batch-channel norm it is the
            batch part's. None for a ReLU.
        std_distance: mean over channels of $|s_c - 1|$, with $s_c$ its deviation, likewise.
        margin: smallest mean over deviation of any channel's output; at -2.3 a normal one is on for
            1 % of inputs.
    """

    layer: str
    kind: str
    relu: bool
    channels: int
    dead: float
    mean_distance: float | None
    std_distance: float | None
    margin: float


@dataclass(frozen=True)
class Singularity:
    """What :func:`singularity` found, layer by layer.

    Attributes:
        rows: in the order in which the network runs through them.
        samples: inputs that were looked at.
    """

    rows: list[Row]
    samples: int

    @property
    def dead(self) -> float:
        """Share of dead units among all units that are followed by a ReLU."""
        units = [(r.dead * r.channels, r.channels) for r in self.rows if r.relu]
        total = sum(count for _, count in units)
        return sum(dead for dead, _ in units) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "samples": self.samples,
            "dead": self.dead,
            "rows": [asdict(row) for row in self.rows],
        }

    def cells(self) -> list[list[str]]:
        """The table, head first, as text."""
        head = ["layer", "kind", "relu", "channels", "dead %", "|mean|", "|std-1|", "margin"]
        return [head] + [
            [
                row.layer,
                row.kind,
                "yes" if row.relu else "no",
                str(row.channels),
                f"{100 * row.dead:.1f}",
                _number(row.mean_distance),
                _number(row.std_distance),
                _number(row.margin),
            ]
            for row in self.rows
        ]

    def table(self) -> str:
        """A line for each layer."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        )

    def plot(self) -> Any:
        """Dead units and distances over the depth of the network, as an altair chart."""
        import altair as alt

        measures: dict[str, Callable[[Row], float | None]] = {
            "dead units, %": lambda row: 100 * row.dead if row.relu else None,
            "distance of means": lambda row: row.mean_distance,
            "distance of deviations": lambda row: row.std_distance,
        }
        points = [
            {"layer": f"{k:02d} {row.layer}", "what": what, "value": value}
            for what, of in measures.items()
            for k, row in enumerate(self.rows)
            if (value := of(row)) is not None
        ]
        base: Any = alt.Chart(alt.Data(values=points), height=110)
        chart = base.mark_line(point=True).encode(
            x=alt.X("layer:O", title=None, axis=alt.Axis(labelAngle=-60, labelLimit=160)),
            y=alt.Y("value:Q", title=None, axis=alt.Axis(tickCount=4)),
            row=alt.Row("what:N", title=None, header=alt.Header(labelOrient="top")),
        )
        return chart.resolve_scale(y="independent")

    def _repr_html_(self) -> str:
        head, *lines = self.cells()
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>"
            for line in lines
        )
        return f"<table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{rows}</table>"


@torch.no_grad()
def singularity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Singularity:
    r"""How close a network's units are to elimination, layer by layer.

    A ReLU unit that is off for every input gets no gradient, and stays off. Behind batch norm every
    channel has mean 0 and deviation 1, so that it is on for half of the inputs until its affine
    parameters move far; channel normalization (group, layer norm) holds only whole groups there. A
    channel with mean $m_c$ and deviation $s_c$ before the affine parameters is at distance $|m_c|$
    and $|s_c - 1|$ from batch norm's point; the average of these over channels is the statistical
    difference of Qiao et al.

    Args:
        model: any network; it runs in eval mode, and is left as it was.
        batches: inputs, a few hundred samples or more: tensors, tuples whose first item is one, or
            what ``forward`` takes.
        forward: how to run the model on a batch.

    Returns:
        A row for every normalizer, and for every ReLU that something else feeds.

    Raises:
        ConfigError: there is neither a normalizer nor a ReLU, or no batch.

    Examples:
        >>> import torch, evenkeel as ek
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.ReLU())
        >>> images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> [(row.layer, row.relu, row.channels) for row in ek.norm.singularity(net, [images]).rows]
        [('1', True, 8)]

    References:
        Qiao et al., "Rethinking Normalization and Elimination Singularity in Neural Networks",
        arXiv 1911.09738, as told in the abstract; shares, thresholds and margins are evenkeel's.
    """
    forward = forward or _run
    watch = _Watch(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    tracking = [m for m in modes if getattr(m, "tracking", None) is True]
    for module in tracking:
        module.tracking = False  # type: ignore[assignment]
    samples = 0
    try:
        with watch:
            for batch in batches:
                samples += size(batch)
                watch.start()
                forward(model, batch)
    finally:
        for module in tracking:
            module.tracking = True  # type: ignore[assignment]
        for module, mode in modes.items():
            module.training = mode
    if not watch.seen:
        raise ConfigError(
            "singularity needs a network with normalizers or ReLUs, and at least one batch; "
            f"{type(model).__name__} showed none on {samples} samples."
        )
    return Singularity([unit.row() for unit in watch.seen.values()], samples)


def _run(model: nn.Module, batch: Any) -> Any:
    return model(batch if isinstance(batch, Tensor) else batch[0])


@dataclass
class _Unit:
    """What has been seen of one row."""

    layer: str
    module: nn.Module | None
    channel_dim: int
    relu: bool = False
    moments: list[BatchMoments] = field(default_factory=list)
    inputs: list[BatchMoments] = field(default_factory=list)
    on: Tensor | None = None
    places: int = 0

    def add(self, y: Tensor) -> None:
        y = y.detach().movedim(self.channel_dim, 1)
        self.moments.append(BatchMoments.of(y))
        on = (y > 0).transpose(0, 1).flatten(1).sum(1)  # (C,)
        self.on = on if self.on is None else self.on + on
        self.places += y.numel() // y.shape[1]

    def row(self) -> Row:
        whole = BatchMoments.pool(self.moments)
        assert self.on is not None
        mean, std = whole.mean, whole.var.sqrt()
        distances: tuple[float | None, float | None] = (None, None)
        if self.module is not None:
            before, spread = self._normalized(mean, std)
            if len(before):
                distances = float(before.abs().mean()), float((spread - 1).abs().mean())
        return Row(
            layer=self.layer,
            kind="relu" if self.module is None else type(self.module).__name__,
            relu=self.relu,
            channels=len(mean),
            dead=float((self.on / self.places < DEAD).double().mean()),
            mean_distance=distances[0],
            std_distance=distances[1],
            margin=float((mean / std.clamp_min(1e-12)).min()),
        )

    def _normalized(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Means and deviations of the channels before the affine parameters."""
        assert self.module is not None
        if isinstance(self.module, BatchChannelNorm):  # its first affine comes before the groups
            whole = BatchMoments.pool(self.inputs)
            center, var = (t.to(mean) for t in self.module._running())
            scale = (var + self.module.eps).rsqrt()
            return (whole.mean - center) * scale, whole.var.sqrt() * scale
        gain, bias = (_affine(self.module, name, mean) for name in ("weight", "bias"))
        fit = gain.abs() > 1e-6 * gain.abs().max().clamp_min(1e-30)
        return ((mean - bias) / gain)[fit], (std / gain.abs())[fit]


def _channel_dim(module: nn.Module, y: Tensor) -> int:
    """Layer norms of torch over one axis have their channels last."""
    one = len(getattr(module, "normalized_shape", ())) == 1
    plain = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    dim: int = getattr(module, "channel_dim", 1)
    return -1 if one and plain and y.dim() > 2 else dim


def _affine(module: nn.Module, name: str, like: Tensor) -> Tensor:
    """The affine parameter that a normalizer applies, for each channel; 1 or 0 without."""
    value = getattr(module, name, None)
    if isinstance(value, Tensor) and value.dim() > 1:
        value = value.flatten(1).mean(1)
    if not isinstance(value, Tensor):
        return torch.full_like(like, float(name == "weight"))
    return value.detach().to(like).flatten().repeat_interleave(len(like) // value.numel())


class _Watch(TorchDispatchMode):
    """Sees what normalizers give, and what reaches ReLUs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.seen: dict[str, _Unit] = {}
        self.hooks = contextlib.ExitStack()
        self.inside: list[str] = []
        self.given: list[tuple[Tensor, str]] = []
        self.count: dict[str, int] = {}

    def start(self) -> None:
        """Before each batch."""
        self.given.clear()
        self.count.clear()

    def __enter__(self) -> "_Watch":
        for path, module in self.model.named_modules():
            before = module.register_forward_pre_hook(
                lambda *_, path=path: self.inside.append(path)
            )
            if isinstance(module, BatchChannelNorm):
                came = module.register_forward_pre_hook(
                    lambda m, args, path=path: self._unit(path, m, 1).inputs.append(
                        BatchMoments.of(args[0])
                    )
                )
                self.hooks.callback(came.remove)
            if after_it := followed_by(module):
                handle = after_it[0].register_forward_pre_hook(
                    lambda _, args, path=path, module=module: self._given(path, module, args[0])
                )
                self.hooks.callback(handle.remove)
            after = module.register_forward_hook(
                lambda m, _, y, path=path: self._after(path, m, y), always_call=True
            )
            for handle in (before, after):
                self.hooks.callback(handle.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.hooks.close()

    def _after(self, path: str, module: nn.Module, y: Any) -> None:
        self.inside.pop()
        if isinstance(y, Tensor) and is_normalizer(module) and followed_by(module) is None:
            self._given(path, module, y)

    def _given(self, path: str, module: nn.Module, y: Tensor) -> None:
        self._unit(path, module, _channel_dim(module, y)).add(y)
        self.given.append((y, path))

    def _unit(self, path: str, module: nn.Module, channel_dim: int) -> _Unit:
        return self.seen.setdefault(path, _Unit(path, module, channel_dim))

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if op in _RELUS and args[0].dim() > 1:
            self._relu(args[0])
        if op._schema.is_mutable:
            self._forget(op, args)
        return op(*args, **(kwargs or {}))

    def _forget(self, op: Any, args: tuple[Any, ...]) -> None:
        """What is written over is no longer what a normalizer gave."""
        for told, value in zip(op._schema.arguments, args, strict=False):
            if told.alias_info and told.alias_info.is_write and isinstance(value, Tensor):
                place = value.untyped_storage().data_ptr()
                self.given = [
                    (y, path) for y, path in self.given if y.untyped_storage().data_ptr() != place
                ]

    def _relu(self, x: Tensor) -> None:
        for y, path in self.given:
            if y is x or (y.data_ptr() == x.data_ptr() and y.shape == x.shape):
                self.seen[path].relu = True
                return
        where = self.inside[-1] if self.inside else ""
        k = self.count[where] = self.count.get(where, 0) + 1
        name = f"{where or type(self.model).__name__} (relu {k})"
        self.seen.setdefault(name, _Unit(name, None, 1, relu=True)).add(x)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}"
