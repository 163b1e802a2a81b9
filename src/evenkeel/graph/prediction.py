"""From the moments of normalizers to those of the ones behind them: a plan, made once."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from evenkeel.graph import flow
from evenkeel.graph.capture import Captured
from evenkeel.graph.flow import Gaussian
from evenkeel.graph.trace import leaves, name_of, shape_of


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


@dataclass(frozen=True)
class Place:
    """Where a normalizer works.

    Attributes:
        path: of the normalizer.
        step: that its moments go into.
        prior: the step that predicts its input; None where that cannot be.
        why: why not.
    """

    path: str
    step: int
    prior: int | None
    why: str | None


@dataclass(frozen=True)
class Prediction:
    """How moments flow from normalizer to normalizer, in any mode and for any batch.

    Attributes:
        steps: each after those that it reads.
        places: normalizers in the order in which they run; one that runs twice is there twice.
    """

    steps: tuple[Step, ...]
    places: tuple[Place, ...]

    def evaluate(
        self, step: int, known: dict[int, Gaussian], network: nn.Module
    ) -> Gaussian | None:
        """The moments of a step, from those known, to which all on the way are added.

        None where they need those of a normalizer that has not told.
        """
        if step in known:
            return known[step]
        what = self.steps[step]
        if what.work is None:
            return None
        inputs = [self.evaluate(i, known, network) for i in what.inputs]
        given = [x for x in inputs if x is not None]
        if len(given) < len(inputs) or len({len(x.mean) for x in given}) > 1:
            return None
        held = [None if of is None else of(network) for of in what.held]
        known[step] = what.work(*given, *held)
        return known[step]

    def sources(self, step: int) -> list[int]:
        """The steps of the normalizers that a step reads, over any way, in order."""
        found, left = set(), [step]
        while left:
            of = left.pop()
            if self.steps[of].work is None:
                found.add(of)
            left += self.steps[of].inputs
        return sorted(found)


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
class _Known:
    """An activation whose moments a step tells."""

    step: int
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape) - 2


@dataclass(frozen=True)
class _Unknown:
    """An activation whose moments nothing tells."""

    why: str


def plan(captured: Captured, normalizers: Sequence[str]) -> Prediction:
    """Follow a network from its inputs to its outputs.

    Args:
        captured: the network.
        normalizers: paths of the batch norms whose moments will be told.
    """
    steps: list[Step] = []
    places: list[Place] = []
    values: dict[fx.Node, Any] = {}

    def add(step: Step, node: fx.Node) -> _Known:
        steps.append(step)
        return _Known(len(steps) - 1, shape_of(node.meta["val"]))

    def normalizer(node: fx.Node, x: Any) -> Any:
        held = values.get(node.args[3])  # type: ignore[arg-type]
        path = held.path.rpartition(".")[0] if isinstance(held, Held) else ""
        if path not in normalizers:
            return _Unknown("a normalizer before it is none of those that are fused")
        known = add(Step(), node)
        prior, why = (x.step, None) if isinstance(x, _Known) else (None, x.why)
        places.append(Place(path, known.step, prior, why))
        return known

    for node in captured.graph.nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(captured, node.name)
        elif node.op == "get_attr":
            values[node] = getattr(node.graph.owning_module, node.target)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if name_of(node.target) in BATCH_NORM and isinstance(args[0], _Known | _Unknown):
                values[node] = normalizer(node, args[0])
            else:
                made = _made(node, args, kwargs)
                values[node] = add(made, node) if isinstance(made, Step) else made
    return Prediction(tuple(steps), tuple(places))


BATCH_NORM = ("batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")


def _placeholder(captured: Captured, name: str) -> Any:
    if name in captured.held:
        what = captured.held[name]
        return what if isinstance(what, Tensor) else Held(what)
    example = captured.inputs[name]
    return _Unknown("it reads the network's input") if isinstance(example, Tensor) else example


def _made(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What an operation gives: a step, an unknown activation, or a value that is no activation."""
    given = leaves((args, kwargs))
    result = node.meta.get("val")
    if not any(isinstance(v, _Known | _Unknown) for v in given):
        if any(isinstance(v, Held) for v in given):
            return Computed(node.target, args, kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if isinstance(result, torch.SymInt):
        return int(result.node.hint)
    unknown = next((v for v in given if isinstance(v, _Unknown)), None)
    if unknown is not None:
        return unknown
    name = name_of(node.target)
    rule = RULES.get(name)
    made = rule(node, *args, **kwargs) if rule is not None and isinstance(result, Tensor) else None
    return made or _Unknown(f"{name} is on the way, which has no closed form here")


# ---- rules: a step from an operation's own arguments, or None where there is no closed form


def _same(node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Step | None:
    return _step(_itself, x)


def _rectified(node: fx.Node, x: _Known) -> Step:
    return _step(flow.rectified, x)


def _clamped(node: fx.Node, x: _Known, low: Any = None, high: Any = None, **kwargs: Any) -> Any:
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    return _step(flow.rectified, x) if low == 0 and high is None else None


def _leaky(node: fx.Node, x: _Known, slope: float = 0.01) -> Step:
    return _step(flow.rectified, x, slope=float(slope))


def _prelu(node: fx.Node, x: _Known, slope: Any) -> Step | None:
    return _step(flow.rectified, x, held=(slope,)) if isinstance(slope, Held) else None


def _convolved(
    node: fx.Node, x: _Known, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
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


def _mapped(node: fx.Node, x: _Known, weight: Any, bias: Any = None) -> Step | None:
    if x.rank or not isinstance(weight, Held) or not isinstance(bias, Held | None):
        return None
    return _step(flow.mapped, x, held=(weight, bias))


def _added(node: fx.Node, x: Any, y: Any, alpha: float = 1) -> Step | None:
    return _sum(x, y, alpha)


def _subtracted(node: fx.Node, x: Any, y: Any, alpha: float = 1) -> Step | None:
    return _sum(x, y, -alpha)


def _reversed(node: fx.Node, x: Any, y: Any, alpha: float = 1) -> Step | None:
    plain = isinstance(x, _Known) and isinstance(y, int | float)
    return _step(flow.scaled, x, factor=-float(alpha), shift=float(y)) if plain else None


def _negated(node: fx.Node, x: _Known) -> Step:
    return _step(flow.scaled, x, factor=-1.0)


def _sum(x: Any, y: Any, factor: float) -> Step | None:
    if isinstance(x, _Known) and isinstance(y, _Known):
        return _step(flow.added, x, y, factor=factor) if x.shape == y.shape else None
    if isinstance(x, _Known) and isinstance(y, int | float):
        return _step(flow.scaled, x, factor=1.0, shift=factor * y)
    return None


def _applied(node: fx.Node, x: _Known, *args: Any, **kwargs: Any) -> Step | None:
    plain = all(isinstance(a, int | float) for a in args)
    how: dict[str, Any] = {"name": name_of(node.target), "args": args}
    return _step(flow.applied, x, **how) if plain and not kwargs else None


def _repeated(node: fx.Node, x: _Known, *args: Any) -> Step | None:
    sizes = list(zip(shape_of(node.meta["val"])[2:], x.shape[2:], strict=True))
    factors: Any = [new // old for new, old in sizes]
    whole = all(new % old == 0 for new, old in sizes)
    return _step(flow.repeated, x, factors=factors) if whole else None


def _multiplied(node: fx.Node, x: Any, y: Any) -> Step | None:
    if isinstance(x, _Known) and isinstance(y, _Known):
        # A gate, which hardly depends on the element: one with its own sigmoid is not independent.
        gate = x.rank == y.rank and x.shape[:2] == y.shape[:2] and x.shape != y.shape
        return _step(flow.multiplied, x, y) if gate else None
    x, y = (x, y) if isinstance(x, _Known) else (y, x)
    return _step(flow.scaled, x, factor=float(y)) if isinstance(y, int | float) else None


def _divided(node: fx.Node, x: Any, y: Any, **kwargs: Any) -> Step | None:
    plain = isinstance(x, _Known) and isinstance(y, int | float) and not kwargs
    return _step(flow.scaled, x, factor=1 / y) if plain else None


def _concatenated(node: fx.Node, parts: Any, dim: int = 0) -> Step | None:
    if not all(isinstance(part, _Known) for part in parts) or dim % (parts[0].rank + 2) != 1:
        return None
    return _step(flow.concatenated, *parts)


def _dropped(node: fx.Node, x: _Known, share: float = 0.5, *_: Any) -> Step | None:
    return _step(flow.dropped, x, share=share) if share < 1 else None


def _max_pooled(
    node: fx.Node, x: _Known, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil: bool = False,
) -> Step | None:  # fmt: skip
    sizes = [_each(v, x.rank) for v in (kernel, stride or kernel, padding, dilation)]
    how: dict[str, Any] = dict(zip(("kernel", "stride", "padding", "dilation"), sizes, strict=True))
    return None if ceil else _step(flow.max_pooled, x, **how)


def _average_pooled(
    node: fx.Node, x: _Known, kernel: Any, stride: Any = (), padding: Any = 0, ceil: bool = False,
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


def _adaptive(node: fx.Node, x: _Known, size: Any) -> Step | None:
    return _step(flow.averaged, x) if all(s == 1 for s in _each(size, x.rank)) else None


def _mean(node: fx.Node, x: _Known, dims: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    of = {dim % len(x.shape) for dim in _each(dims, 1)}
    if kwargs or of != set(range(2, len(x.shape))):
        return None
    return _step(flow.averaged if keepdim else _averaged_flat, x)


def _viewed(node: fx.Node, x: _Known, *args: Any) -> Step | None:
    shape = shape_of(node.meta["val"])
    flat = len(shape) == 2 and shape[0] == x.shape[0]
    return _step(flow.flattened, x) if flat else None


def _itself(x: Gaussian) -> Gaussian:
    return x


def _averaged_flat(x: Gaussian) -> Gaussian:
    return flow.flattened(flow.averaged(x))


def _step(
    work: Callable[..., Gaussian], *inputs: _Known, held: tuple[Held | None, ...] = (), **how: Any
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
