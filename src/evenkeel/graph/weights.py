"""How scales begin and end at layers with weights, and at normalizers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from evenkeel.graph.labels import FIXED
from evenkeel.graph.passing import Rule, matrix_product, product
from evenkeel.graph.trace import Act, Leaf, Tracer, name_of, shape_of

NO_INPUT = torch.tensor(FIXED)
"""What a bias reads."""


def linear(tracer: Tracer, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Any:
    """(..., I) -> (..., O)."""
    x = tracer.act(x)
    columns = tracer.vector(x.labels, -1, "a feature of linear with what has a fixed scale")
    outputs = shape_of(_value(weight))[0]
    rows = torch.arange(outputs).view(-1, 1)
    fresh = _layer(tracer, node, weight, bias, rows, columns.view(1, -1), x.depth + 1)
    return Act(fresh.expand(*x.labels.shape[:-1], outputs), x.depth + 1)


def multiplied_matrices(tracer: Tracer, node: fx.Node, a: Any, b: Any) -> Any:
    """A linear layer written as a product, or a product of activations."""
    if isinstance(b, Leaf) and b.value.dim() == 2 and isinstance(a, Act):
        return linear(tracer, node, a, _transposed(b))
    return matrix_product(tracer, node, a, b)


def addmm(tracer: Tracer, node: fx.Node, bias: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    """A linear layer of the same kind, with a bias."""
    if kwargs or not isinstance(b, Leaf) or not isinstance(a, Act):
        return None
    return linear(tracer, node, a, _transposed(b), bias)


def conv(rank: int) -> Rule:
    """(..., I, *space) -> (..., O, *space), with weights (O, I / groups, *kernel)."""

    def rule(
        tracer: Tracer, node: fx.Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Any:  # fmt: skip
        x, kernel = tracer.act(x), (1,) * rank
        outputs = shape_of(_value(weight))[0]
        channels = _channel_vector(tracer, node, x, rank)
        columns = channels.view(groups, -1)
        columns = columns.repeat_interleave(outputs // groups if groups > 1 else 1, 0)
        rows = torch.arange(outputs).view(-1, 1, *kernel)
        columns = columns.view(*columns.shape, *kernel)
        fresh = _layer(tracer, node, weight, bias, rows, columns, x.depth + 1)
        return Act(fresh.view(-1, *kernel).expand(shape_of(node.meta["val"])), x.depth + 1)

    return rule


def conv_transpose(rank: int) -> Rule:
    """(..., I, *space) -> (..., O, *space), with weights (I, O / groups, *kernel)."""

    def rule(
        tracer: Tracer, node: fx.Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1,
        padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Any:  # fmt: skip
        x, kernel = tracer.act(x), (1,) * rank
        inputs, outputs = shape_of(_value(weight))[:2]
        channels = _channel_vector(tracer, node, x, rank)
        rows = torch.arange(outputs * groups).view(groups, outputs)
        rows = rows.repeat_interleave(inputs // groups if groups > 1 else 1, 0)
        rows, columns = rows.view(*rows.shape, *kernel), channels.view(-1, 1, *kernel)
        fresh = _layer(tracer, node, weight, bias, rows, columns, x.depth + 1)
        return Act(fresh.view(-1, *kernel).expand(shape_of(node.meta["val"])), x.depth + 1)

    return rule


@dataclass(frozen=True)
class Quaternions(Act):
    """A real matrix that is made of quaternions; to what has no rule for it, fixed numbers.

    Attributes:
        leaf: the quaternions, (4, outputs, inputs, ...).
    """

    leaf: Leaf | None = None


def quaternions(tracer: Tracer, node: fx.Node, weight: Any) -> Any:
    """Known again by the layer that it is the weight of."""
    if not isinstance(weight, Leaf):
        return None
    return Quaternions(torch.tensor(FIXED).expand(shape_of(node.meta["val"])), leaf=weight)


def embedding(tracer: Tracer, node: fx.Node, weight: Any, index: Any, *_: Any) -> Any:
    """One scale for each feature, whatever the row."""
    if not isinstance(weight, Leaf):
        return None
    fresh = tracer.labels.fresh(weight.value.shape[1])
    tracer.use(weight, fresh.view(1, -1), NO_INPUT, 1)
    return Act(fresh.expand(shape_of(node.meta["val"])), 1)


def rnn(
    tracer: Tracer, node: fx.Node, x: Any, hidden: Any, weights: Any, has_biases: Any,
    layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool = False,
) -> Any:  # fmt: skip
    """One scale for each unit, at every step."""
    if not isinstance(has_biases, bool) or not all(isinstance(w, Leaf) for w in weights):
        return None  # packed sequences have their own signature
    each, directions = 4 if has_biases else 2, 2 if bidirectional else 1
    why = "a state of rnn_relu with what has a fixed scale"
    x, start = tracer.act(x), tracer.act(hidden).labels  # start: (layers * directions, N, H)
    columns, states = tracer.vector(x.labels, -1, why), []
    for layer in range(layers):
        outputs, depth = [], x.depth + layer + 1
        for k in range(layer * directions, (layer + 1) * directions):
            of_input, of_state, *biases = weights[k * each : (k + 1) * each]
            fresh = tracer.labels.fresh(of_state.value.shape[0])
            tracer.use(of_input, fresh.view(-1, 1), columns.view(1, -1), depth)
            tracer.use(of_state, fresh.view(-1, 1), fresh.view(1, -1), depth)
            for bias in biases:
                tracer.use(bias, fresh, NO_INPUT, depth, bias=True)
            tracer.labels.tie(start[k], fresh.expand(start[k].shape), why)
            outputs.append(fresh)
            states.append(fresh.expand(start[k].shape))
        columns = torch.cat(outputs)
    everything = columns.expand(*x.labels.shape[:-1], len(columns))
    return [Act(everything, depth), Act(torch.stack(states), depth)]


def prelu(tracer: Tracer, node: fx.Node, x: Any, slopes: Any) -> Any:
    """The scale passes; slopes have none."""
    tracer.fix(slopes, "slopes of a PReLU have no scale")
    return tracer.act(x)


def multiplied(tracer: Tracer, node: fx.Node, a: Any, b: Any) -> Any:
    """A constant lets the scale pass; a parameter is a layer with one input for each output."""
    if isinstance(a, Leaf):
        a, b = b, a
    if isinstance(a, Leaf):
        return None
    if isinstance(a, Act) and isinstance(b, Act):
        return product(tracer, node, a, b)
    shape = shape_of(node.meta["val"])
    if isinstance(b, Leaf):
        layer = _diagonal(tracer, tracer.act(a, shape), b)
        if layer is not None:
            return layer
        tracer.fix(b, "it multiplies channels of unlike scales")
    return tracer.act(a if isinstance(a, Act) else b, shape)


def normalized_channels(
    tracer: Tracer, node: fx.Node, x: Any, weight: Any, bias: Any, *_: Any, **__: Any
) -> Any:
    """Batch and instance norm: the channels are the second axis."""
    x = tracer.act(x)
    done = _normalized(tracer, node, x, weight, bias, x.labels.dim() - 2)
    return done if isinstance(node.meta["val"], Tensor) else [done]


def normalized_groups(
    tracer: Tracer, node: fx.Node, x: Any, groups: int, weight: Any = None, bias: Any = None,
    *_: Any,
) -> Any:  # fmt: skip
    """Group norm: likewise."""
    x = tracer.act(x)
    return _normalized(tracer, node, x, weight, bias, x.labels.dim() - 2)


def normalized_features(
    tracer: Tracer, node: fx.Node, x: Any, shape: Any, weight: Any = None, bias: Any = None, *_: Any
) -> Any:  # fmt: skip
    """Layer norm: the weight is of the shape of the last axes."""
    return _normalized(tracer, node, tracer.act(x), weight, bias, 0)


def normalized_squares(
    tracer: Tracer, node: fx.Node, x: Any, shape: Any, weight: Any = None, eps: Any = None
) -> Any:
    """RMS norm: likewise, without a bias."""
    return _normalized(tracer, node, tracer.act(x), weight, None, 0)


# ---- tools


def _layer(
    tracer: Tracer, node: fx.Node, weight: Any, bias: Any, rows: Tensor, columns: Tensor, depth: int
) -> Tensor:  # fmt: skip
    """Labels of a layer's outputs; ``rows`` says which of them each weight feeds."""
    name, number = name_of(node.target), int(rows.max()) + 1
    if isinstance(weight, Quaternions):  # each of its numbers stands in all four parts
        fresh, weight = tracer.labels.fresh(number // 4).repeat(4), weight.leaf
        rows, (columns, *others) = _parts(rows)[0], _parts(columns)
        for part in others:
            tracer.labels.tie(part, columns, "the parts of a quaternion have one scale")
    else:
        fresh = tracer.labels.fresh(number)
    if isinstance(weight, Leaf):
        tracer.use(weight, fresh[rows], columns, depth)
    else:
        for labels in (columns, fresh):
            tracer.labels.pin(labels, f"weights of {name} are computed")
        if isinstance(weight, Act):
            tracer.labels.pin(weight.labels, f"weights of {name} are computed")
    if isinstance(bias, Leaf):
        tracer.use(bias, fresh, NO_INPUT, depth, bias=True)
    elif bias is not None:
        tracer.labels.tie(fresh, tracer.act(bias).labels, f"the bias of {name} is no parameter")
    return fresh


def _parts(labels: Tensor) -> tuple[Tensor, ...]:
    """The four parts, along the axis that has them."""
    return labels.chunk(4, 0 if labels.shape[0] > 1 else 1)


def _diagonal(tracer: Tracer, x: Act, leaf: Leaf) -> Act | None:
    """One new label for each element of a parameter, if all that it multiplies shares a scale."""
    shape = x.labels.shape
    own = (1,) * (len(shape) - leaf.value.dim()) + tuple(leaf.value.shape)
    axes = [axis for axis, size in enumerate(own) if size == 1]
    roots = tracer.labels.roots(x.labels)
    least, most = (
        (roots.amin(axes, keepdim=True), roots.amax(axes, keepdim=True)) if axes else (roots,) * 2
    )
    if not torch.equal(least, most):
        return None
    rows = tracer.labels.fresh(leaf.value.numel()).view(own)
    tracer.use(leaf, rows.view(leaf.value.shape), most.view(leaf.value.shape), x.depth + 1)
    return Act(rows.expand(shape), x.depth + 1)


def _normalized(tracer: Tracer, node: fx.Node, x: Act, weight: Any, bias: Any, space: int) -> Act:
    """What comes has no scale; what goes has that of weight and bias, which are a layer."""
    name, shape, depth = name_of(node.target).lstrip("_"), x.labels.shape, x.depth + 1
    tracer.labels.pin(x.labels, f"input of {name}")
    if not isinstance(weight, Leaf):
        tracer.fix(bias, f"bias of {name} without a weight that goes with it")
        return Act(torch.tensor(FIXED).expand(shape), depth)
    rows = tracer.labels.fresh(weight.value.numel()).view(weight.value.shape)
    tracer.use(weight, rows, NO_INPUT, depth)
    if isinstance(bias, Leaf):
        tracer.use(bias, rows, NO_INPUT, depth, bias=True)
    elif bias is not None:
        tracer.labels.tie(rows, tracer.act(bias).labels, f"the bias of {name} is no parameter")
    return Act(rows.view(*rows.shape, *(1,) * space).expand(shape), depth)


def _channel_vector(tracer: Tracer, node: fx.Node, x: Act, rank: int) -> Tensor:
    why = f"a channel of {name_of(node.target)} with what has a fixed scale"
    return tracer.vector(x.labels, -rank - 1, why)


def _transposed(leaf: Leaf) -> Leaf:
    return Leaf(leaf.path, leaf.value.t(), (*leaf.view, (torch.t, (), {})))


def _value(weight: Any) -> Any:
    """What has the weight's shape."""
    return weight.value if isinstance(weight, Leaf) else getattr(weight, "labels", weight)
