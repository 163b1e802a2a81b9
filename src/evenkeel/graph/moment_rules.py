"""The rule of each kind of operation: how moments pass through it.

A rule gets the node and the operation's own arguments; it returns a step, or None where the moments
do not pass.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from evenkeel.graph import flow
from evenkeel.graph.flow import Gaussian
from evenkeel.graph.trace import name_of, shape_of


@dataclass(frozen=True)
class Step:
    """One operation on moments.

    Attributes:
        inputs: the steps that it reads.
        held: what it reads of the network: its parameters, or what is computed from them.
        work: from both to moments; None for a normalizer, whose moments are measured.
    """

    inputs: tuple[int, ...] = ()
    held: "tuple[Held | None, ...]" = ()
    work: Callable[..., Gaussian] | None = None


class Held:
    """A parameter or buffer, or what an operation makes of some."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._names = path.split(".")

    def __call__(self, network: nn.Module) -> Any:
        """Its value in a network."""
        value: Any = network
        for name in self._names:
            value = getattr(value, name)
        return value


class Computed(Held):
    """What an operation makes of held values."""

    def __init__(self, target: Any, args: Any, kwargs: Any) -> None:
        self._call = target, args, kwargs

    def __call__(self, network: nn.Module) -> Any:
        """Its value in a network."""
        target, args, kwargs = torch.utils._pytree.tree_map(
            lambda v: v(network) if isinstance(v, Held) else v, self._call
        )
        return target(*args, **kwargs)


@dataclass(frozen=True)
class Known:
    """An activation whose moments a step tells."""

    step: int
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Axes of space."""
        return len(self.shape) - 2


def _same(node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Step | None:
    return _step(_itself, x)


def _rectified(node: fx.Node, x: Known) -> Step:
    return _step(flow.rectified, x)


def _clamped(node: fx.Node, x: Known, low: Any = None, high: Any = None, **kwargs: Any) -> Any:
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    return _step(flow.rectified, x) if low == 0 and high is None else None


def _leaky(node: fx.Node, x: Known, slope: float = 0.01) -> Step:
    return _step(flow.rectified, x, slope=float(slope))


def _prelu(node: fx.Node, x: Known, slope: Any) -> Step | None:
    return _step(flow.rectified, x, held=(slope,)) if isinstance(slope, Held) else None


def _convolved(
    node: fx.Node, x: Known, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Step | None:  # fmt: skip
    if not isinstance(weight, Held) or not isinstance(bias, Held | None):
        return None
    kernel = shape_of(node.args[1].meta["val"])[2:]  # type: ignore[union-attr]
    stride, dilation = _each(stride, x.rank), _each(dilation, x.rank)
    if isinstance(padding, str):
        total = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)
        ]
        around = [(t // 2, t - t // 2) for t in total]
    else:
        around = [(p, p) for p in _each(padding, x.rank)]
    how: dict[str, Any] = {
        "stride": stride,
        "padding": around,
        "dilation": dilation,
        "groups": groups,
    }
    return _step(flow.convolved, x, held=(weight, bias), **how)


def _mapped(node: fx.Node, x: Known, weight: Any, bias: Any = None) -> Step | None:
    if x.rank or not isinstance(weight, Held) or not isinstance(bias, Held | None):
        return None
    return _step(flow.mapped, x, held=(weight, bias))


def _added(node: fx.Node, x: Any, y: Any, alpha: float = 1) -> Step | None:
    return _sum(x, y, alpha)


def _subtracted(node: fx.Node, x: Any, y: Any, alpha: float = 1) -> Step | None:
    return _sum(x, y, -alpha)


def _reversed(node: fx.Node, x: Any, y: Any, alpha: float = 1) -> Step | None:
    plain = isinstance(x, Known) and isinstance(y, int | float)
    return _step(flow.scaled, x, factor=-float(alpha), shift=float(y)) if plain else None


def _negated(node: fx.Node, x: Known) -> Step:
    return _step(flow.scaled, x, factor=-1.0)


def _sum(x: Any, y: Any, factor: float) -> Step | None:
    if isinstance(x, Known) and isinstance(y, Known):
        return _step(flow.added, x, y, factor=factor) if x.shape == y.shape else None
    if isinstance(x, Known) and isinstance(y, int | float):
        return _step(flow.scaled, x, factor=1.0, shift=factor * y)
    return None


def _applied(node: fx.Node, x: Known, *args: Any, **kwargs: Any) -> Step | None:
    plain = all(isinstance(a, int | float) for a in args)
    how: dict[str, Any] = {"name": name_of(node.target), "args": args}
    return _step(flow.applied, x, **how) if plain and not kwargs else None


def _repeated(node: fx.Node, x: Known, *args: Any) -> Step | None:
    sizes = list(zip(shape_of(node.meta["val"])[2:], x.shape[2:], strict=True))
    factors: Any = [new // old for new, old in sizes]
    whole = all(new % old == 0 for new, old in sizes)
    return _step(flow.repeated, x, factors=factors) if whole else None


def _multiplied(node: fx.Node, x: Any, y: Any) -> Step | None:
    if isinstance(x, Known) and isinstance(y, Known):
        # A gate, which hardly depends on the element: one with its own sigmoid is not independent.
        gate = x.rank == y.rank and x.shape[:2] == y.shape[:2] and x.shape != y.shape
        return _step(flow.multiplied, x, y) if gate else None
    x, y = (x, y) if isinstance(x, Known) else (y, x)
    return _step(flow.scaled, x, factor=float(y)) if isinstance(y, int | float) else None


def _divided(node: fx.Node, x: Any, y: Any, **kwargs: Any) -> Step | None:
    plain = isinstance(x, Known) and isinstance(y, int | float) and not kwargs
    return _step(flow.scaled, x, factor=1 / y) if plain else None


def _concatenated(node: fx.Node, parts: Any, dim: int = 0) -> Step | None:
    if not all(isinstance(part, Known) for part in parts) or dim % (parts[0].rank + 2) != 1:
        return None
    return _step(flow.concatenated, *parts)


def _dropped(node: fx.Node, x: Known, share: float = 0.5, *_: Any) -> Step | None:
    return _step(flow.dropped, x, share=share) if share < 1 else None


def _max_pooled(
    node: fx.Node, x: Known, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil: bool = False,
) -> Step | None:  # fmt: skip
    sizes = [_each(v, x.rank) for v in (kernel, stride or kernel, padding, dilation)]
    how: dict[str, Any] = dict(zip(("kernel", "stride", "padding", "dilation"), sizes, strict=True))
    return None if ceil else _step(flow.max_pooled, x, **how)


def _average_pooled(
    node: fx.Node, x: Known, kernel: Any, stride: Any = (), padding: Any = 0, ceil: bool = False,
    counted: bool = True, divisor: int | None = None,
) -> Step | None:  # fmt: skip
    around = _each(padding, x.rank)
    if ceil or divisor is not None or (any(around) and not counted):
        return None
    sizes: dict[str, Any] = {
        "kernel": _each(kernel, x.rank),
        "stride": _each(stride or kernel, x.rank),
    }
    return _step(flow.average_pooled, x, padding=around, **sizes)


def _adaptive(node: fx.Node, x: Known, size: Any) -> Step | None:
    return _step(flow.averaged, x) if all(s == 1 for s in _each(size, x.rank)) else None


def _mean(node: fx.Node, x: Known, dims: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    of = {dim % len(x.shape) for dim in _each(dims, 1)}
    if kwargs or of != set(range(2, len(x.shape))):
        return None
    return _step(flow.averaged if keepdim else _averaged_flat, x)


def _viewed(node: fx.Node, x: Known, *args: Any) -> Step | None:
    shape = shape_of(node.meta["val"])
    flat = len(shape) == 2 and shape[0] == x.shape[0]
    return _step(flow.flattened, x) if flat else None


def _itself(x: Gaussian) -> Gaussian:
    return x


def _averaged_flat(x: Gaussian) -> Gaussian:
    return flow.flattened(flow.averaged(x))


def _step(
    work: Callable[..., Gaussian], *inputs: Known, held: tuple[Held | None, ...] = (), **how: Any
) -> Step:
    return Step(tuple(x.step for x in inputs), held, functools.partial(work, **how))


def _each(value: Any, rank: int) -> list[int]:
    """One number for each axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


RULES: Mapping[str, Callable[..., Step | None]] = {
    "relu": _rectified,
    **dict.fromkeys(("clamp", "clamp_min"), _clamped),
    "leaky_relu": _leaky,
    "prelu": _prelu,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolved),
    "linear": _mapped,
    "add": _added,
    "sub": _subtracted,
    "rsub": _reversed,
    "neg": _negated,
    **dict.fromkeys(("mul", "multiply"), _multiplied),
    "div": _divided,
    **dict.fromkeys(("gelu", "silu", "mish", "elu", "celu", "selu"), _applied),
    **dict.fromkeys(("hardswish", "hardsigmoid", "hardtanh", "relu6"), _applied),
    **dict.fromkeys(("sigmoid", "tanh", "softplus"), _applied),
    **dict.fromkeys((f"upsample_nearest{n}d" for n in (1, 2, 3)), _repeated),
    "cat": _concatenated,
    **dict.fromkeys(("dropout", "feature_dropout"), _dropped),
    **dict.fromkeys((f"max_pool{n}d" for n in (1, 2, 3)), _max_pooled),
    **dict.fromkeys((f"avg_pool{n}d" for n in (1, 2, 3)), _average_pooled),
    **dict.fromkeys((f"adaptive_avg_pool{n}d" for n in (1, 2, 3)), _adaptive),
    "mean": _mean,
    **dict.fromkeys(("flatten", "view", "reshape", "_unsafe_view"), _viewed),
    **dict.fromkeys(("contiguous", "clone", "alias", "to", "_to_copy", "type_as"), _same),
}
"""By the name of the ATen operation, as in :mod:`evenkeel.graph.rules`."""
