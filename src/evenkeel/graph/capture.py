"""A user's own network as a graph of operations, for analysis only."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from evenkeel.errors import GraphError
from evenkeel.layers import being_captured, in_eval


@dataclass(frozen=True)
class Captured:
    """A network's operations in eval mode, in the order in which they run.

    Attributes:
        graph: of ATen operations, composite ones as they were called.
        held: what each placeholder is: the path of a parameter or buffer, or a constant.
        inputs: the placeholders that are inputs of the network, with the example of each.
        model: the network itself.
    """

    graph: fx.Graph
    held: Mapping[str, "str | Tensor"]
    inputs: Mapping[str, Any]
    model: nn.Module


@torch.no_grad()
def capture(model: nn.Module, example_inputs: Any) -> Captured:
    """Trace a network with ``torch.export``; it is left in the mode that it was in.

    Args:
        model: any network that torch can export.
        example_inputs: a tensor, or the tuple of the network's positional arguments.

    Raises:
        GraphError: it cannot be exported; the message tells where and why.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    from torch.export.graph_signature import InputKind  # the exporter is slow to import

    try:
        with in_eval(model), being_captured(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nn.RNN notes its own attributes
            program = torch.export.export(model, args, dynamic_shapes=_free_batch(args))
    except Exception as error:  # torch raises many kinds, of which few have a common parent
        raise GraphError(
            f"{type(model).__name__} cannot be captured by torch.export: {_first_line(error)}\n"
            f"Usual causes are branches on the values of tensors, and calls out of torch. Make the "
            f"branch a torch.where, or hand over the part of the network without it; "
            f"torch.export.export(model.eval(), example_inputs) shows the whole trace."
        ) from error
    if _changes_others(program.graph):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own doing
            program = program.run_decompositions({})  # none, but nothing is in place afterwards
    held: dict[str, str | Tensor] = {}
    inputs: list[str] = []
    for spec in program.graph_signature.input_specs:
        name: str = spec.arg.name
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(name)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            held[name] = spec.target
        else:
            held[name] = program.constants[spec.target]
    leaves = torch.utils._pytree.tree_leaves((args, {}))
    return Captured(program.graph, held, dict(zip(inputs, leaves, strict=True)), model)


def _free_batch(args: tuple[Any, ...]) -> Any:
    """Leave the first axis open, where the network does; one of 1 cannot be."""
    shapes = torch.export.ShapesCollection()
    for leaf in torch.utils._pytree.tree_leaves(args):
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] > 1:
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    return shapes


def _changes_others(graph: fx.Graph) -> bool:
    """Whether an operation in place changes what is read under another name afterwards."""
    same_memory: dict[fx.Node, list[fx.Node]] = {}  # by node, all that share its memory so far
    for node in graph.nodes:
        target = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        known = same_memory[target] if target is not None and _is_alias(node) else []
        if _is_in_place(node) and any(u > node for m in known for u in m.users if u is not node):
            return True
        same_memory[node] = known
        known.append(node)
    return False


def _is_in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _is_alias(node: fx.Node) -> bool:
    """Whether the result may be the memory of the first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
