"""How scales pass through operations without weights.

A rule gets the tracer, the node, and the operation's own arguments; it returns what the operation
gives, or None to have all of it pinned.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from evenkeel.graph.labels import FIXED, ZERO
from evenkeel.graph.trace import Act, Leaf, Tracer, depth_of, leaves, name_of, shape_of

Rule = Callable[..., Any]

# ---- elements are moved about: the operation itself is run on labels


def moved(tracer: Tracer, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """All data becomes labels; indices stay as they are."""
    depth = depth_of((args, kwargs))
    args, kwargs = torch.utils._pytree.tree_map(
        lambda v: tracer.act(v).labels if _is_data(v) else v, (args, kwargs)
    )
    return torch.utils._pytree.tree_map(
        lambda v: Act(v, depth) if isinstance(v, Tensor) else v,
        _run(node.target, *args, **kwargs),
    )


def viewed(tracer: Tracer, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The same; a view of a parameter is still that parameter."""
    if not isinstance(x, Leaf):
        return moved(tracer, node, x, *args, **kwargs)
    target: Any = node.target
    step, result = (target, args, kwargs), target(x.value, *args, **kwargs)
    if isinstance(result, Tensor):
        return Leaf(x.path, result, (*x.view, step))
    return [Leaf(x.path, part, (*x.view, step, (_item, (i,), {}))) for i, part in enumerate(result)]


def picked(tracer: Tracer, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The same, where the indices are not computed from the network's inputs."""
    if any(isinstance(v, Act | Leaf) for v in leaves((args, kwargs))):
        return None
    return moved(tracer, node, x, *args, **kwargs)


def item(tracer: Tracer, node: fx.Node, parts: Any, i: int) -> Any:
    """One of several results."""
    return parts[i] if isinstance(parts, list | tuple) else None


def size(tracer: Tracer, node: fx.Node, x: Any, axis: int) -> Any:
    """A number, not an activation."""
    return (x.value if isinstance(x, Leaf) else x.labels).shape[axis]


def zeros(tracer: Tracer, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A constant of the example's size."""
    return torch.zeros(shape_of(node.meta["val"]))


def ones(tracer: Tracer, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Likewise; the value does not matter as long as it is not zero."""
    return torch.ones(shape_of(node.meta["val"]))


def padded(
    tracer: Tracer, node: fx.Node, x: Any, pads: Any, mode: Any = "constant", value: Any = None
) -> Any:
    """Zeros go with any scale; mirrored and repeated elements with that of their channel."""
    if not isinstance(mode, str):  # constant_pad_nd has its value there
        mode, value = "constant", mode
    if mode != "constant":
        return over_space(len(pads) // 2)(tracer, node, x)
    x = tracer.act(x)
    return Act(F.pad(x.labels, list(pads), value=FIXED if value else ZERO), x.depth)


# ---- f(s x) = s f(x), element by element


def same(tracer: Tracer, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The scale passes."""
    kind = node.meta["val"].dtype
    if not kind.is_floating_point:
        return None
    return x if isinstance(x, Leaf) and x.value.dtype == kind else tracer.act(x)


def clamped(
    tracer: Tracer, node: fx.Node, x: Any, low: Any = None, high: Any = None, **kwargs: Any
) -> Any:
    """A bound at zero, from below, is a ReLU."""
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    replaced = name_of(node.target) == "threshold" and high == 0
    if isinstance(low, int | float) and low == 0 and (high is None or replaced):
        return tracer.act(x)
    return tracer.give_up(node, (x, low, high), "a bound other than 0 lets no scale pass")


def gated(tracer: Tracer, node: fx.Node, x: Any, axis: int = -1) -> Any:
    """The gates are pinned, the values pass."""
    x = tracer.act(x)
    values, gates = x.labels.chunk(2, axis)
    tracer.labels.pin(gates, "gate of a glu")
    return Act(values, x.depth)


def nothing(tracer: Tracer, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """No scale passes."""
    why = f"{name_of(node.target).lstrip('_')} lets no scale pass"
    return tracer.give_up(node, (args, kwargs), why)


# ---- several elements become one


def reduced(
    tracer: Tracer, node: fx.Node, x: Any, axes: Any = None, keepdim: bool = False, **_: Any
) -> Any:
    """What is summed must share a scale."""
    x = tracer.act(x)
    rank = x.labels.dim()
    if not rank:
        return x
    gone = {a % rank for a in ([axes] if isinstance(axes, int) else axes or range(rank))}
    merged = tracer.merged(x.labels, sorted(gone), _together(node))
    if not keepdim:
        merged = merged.reshape([n for axis, n in enumerate(merged.shape) if axis not in gone])
    return Act(merged, x.depth)


def over_space(rank: int) -> Rule:
    """Within each channel, one scale for all positions on the last axes."""

    def rule(tracer: Tracer, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
        x = tracer.act(x)
        axes = range(x.labels.dim() - rank, x.labels.dim())
        merged = tracer.merged(x.labels, axes, _together(node))
        return torch.utils._pytree.tree_map(
            lambda v: Act(merged.expand(*merged.shape[:-rank], *shape_of(v)[-rank:]), x.depth),
            node.meta["val"],
        )

    return rule


# ---- two tensors meet


def added(tracer: Tracer, node: fx.Node, a: Any, b: Any, **kwargs: Any) -> Any:
    """What is added must share a scale."""
    shape = shape_of(node.meta["val"])
    x, y = tracer.act(a, shape), tracer.act(b, shape)
    tracer.labels.tie(x.labels, y.labels, f"added to what has a fixed scale ({node.name})")
    some, other = (x, y) if isinstance(a, Act) else (y, x)
    gap = some.labels == ZERO
    joint = torch.where(gap, other.labels, some.labels) if bool(gap.any()) else some.labels
    return Act(joint, max(x.depth, y.depth))


def chosen(tracer: Tracer, node: fx.Node, condition: Any, a: Any, b: Any) -> Any:
    """As if added, where the choice does not depend on the inputs."""
    return None if isinstance(condition, Act | Leaf) else added(tracer, node, a, b)


def filled(tracer: Tracer, node: fx.Node, x: Any, mask: Any, value: Any) -> Any:
    """Likewise."""
    return None if isinstance(mask, Act | Leaf) else added(tracer, node, x, value)


def copied(tracer: Tracer, node: fx.Node, x: Any, source: Any, *_: Any) -> Any:
    """What is written over is forgotten."""
    return tracer.act(source, shape_of(node.meta["val"]))


def divided(tracer: Tracer, node: fx.Node, a: Any, b: Any, **kwargs: Any) -> Any:
    """The scale of what is divided passes; what divides is pinned."""
    if not isinstance(a, Act) or kwargs.get("rounding_mode") is not None:
        return None
    why = "it divides an activation"
    tracer.fix(b, why)
    if isinstance(b, Act):
        tracer.labels.pin(b.labels, why)
    return tracer.act(a, shape_of(node.meta["val"]))


def product(tracer: Tracer, node: fx.Node, a: Act, b: Act) -> Act:
    """One factor must be pinned; the scale of the other passes."""
    shape, labels = shape_of(node.meta["val"]), tracer.labels
    x, y = tracer.act(a, shape).labels, tracer.act(b, shape).labels
    free_x, free_y = ~labels.is_pinned(x), ~labels.is_pinned(y)
    both = free_x & free_y
    if bool(both.any()):
        for of in (x, y):
            labels.pin(of[both], "a product of two activations")
    one_sided = x if not bool(free_y.any()) else y if not bool(free_x.any()) else None
    passed = torch.where(free_x, x, y) if one_sided is None else one_sided
    return Act(passed, max(a.depth, b.depth))


def matrix_product(tracer: Tracer, node: fx.Node, a: Any, b: Any) -> Any:
    """Likewise, with one scale for all that is summed."""
    if isinstance(a, Leaf) or isinstance(b, Leaf):
        return None
    a, b = tracer.act(a), tracer.act(b)
    if min(a.labels.dim(), b.labels.dim()) < 2:
        return None
    shape, depth = shape_of(node.meta["val"]), max(a.depth, b.depth)
    if bool(tracer.labels.is_pinned(a.labels).all()):
        return Act(tracer.merged(b.labels, [-2], _together(node)).expand(shape), depth)
    if bool(tracer.labels.is_pinned(b.labels).all()):
        return Act(tracer.merged(a.labels, [-1], _together(node)).expand(shape), depth)
    return tracer.give_up(node, (a, b), "a product of two activations")


def attention(tracer: Tracer, node: fx.Node, q: Any, k: Any, v: Any, *args: Any, **kw: Any) -> Any:
    """Queries and keys are pinned; the scale of a value's channel passes."""
    shape, values = shape_of(node.meta["val"]), tracer.act(v)
    if values.labels.shape[:-2] != shape[:-2]:
        return None
    why = "query, key or mask of an attention"
    tracer.fix((q, k, args, kw), why)
    for x in leaves((q, k, args, kw)):
        if isinstance(x, Act):
            tracer.labels.pin(x.labels, why)
    merged = tracer.merged(values.labels, [-2], _together(node))
    return Act(merged.expand(shape), depth_of((q, k, v, args, kw)))


# ---- tools


def _is_data(value: Any) -> bool:
    """Rather than an index."""
    return isinstance(value, Act | Leaf) or (
        isinstance(value, Tensor) and value.is_floating_point()
    )


def _item(parts: Any, i: int) -> Any:
    return parts[i]


def _run(target: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on labels, which are often expanded, as activations are not."""
    try:
        return target(*args, **kwargs)
    except RuntimeError:
        args, kwargs = torch.utils._pytree.tree_map(
            lambda v: v.contiguous() if isinstance(v, Tensor) else v, (args, kwargs)
        )
        return target(*args, **kwargs)


def _together(node: fx.Node) -> str:
    return f"in one {name_of(node.target)} with what has a fixed scale"
