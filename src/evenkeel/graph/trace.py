"""A captured network run on labels instead of numbers."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from evenkeel.graph.capture import Captured
from evenkeel.graph.labels import FIXED, ZERO, Labels, compact

View = tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...]


@dataclass(frozen=True)
class Act:
    """An activation: the label of each element's scale.

    Attributes:
        labels: of the activation's shape.
        depth: layers with weights before it, along the longest way.
    """

    labels: Tensor
    depth: int = 0


@dataclass(frozen=True)
class Leaf:
    """A parameter, or a view of one.

    Attributes:
        path: of the parameter.
        value: the view itself.
        view: the operations from the parameter to it.
    """

    path: str
    value: Tensor
    view: View = ()


@dataclass(frozen=True)
class Use:
    r"""Where a parameter works: element $w$ may become $w\,e^{z_\mathrm{row} - z_\mathrm{column}}$.

    Attributes:
        leaf: the parameter, or the view of it that is used.
        rows: labels of what the elements feed, broadcast against the view.
        columns: labels of what they read; 0 for a bias, which reads nothing.
        depth: of the layer.
        bias: whether it is added rather than multiplied by.
    """

    leaf: Leaf
    rows: Tensor
    columns: Tensor
    depth: int
    bias: bool = False


class Tracer:
    """Runs a captured network on labels. Rules, one for each kind of operation, call its methods.

    Attributes:
        labels: all scales.
        uses: what has been found of the parameters.
        unknown: operations without a rule, whose inputs and outputs were pinned.
    """

    def __init__(self, captured: Captured, rules: Mapping[str, Callable[..., Any]]) -> None:
        self.labels = Labels()
        self.uses: list[Use] = []
        self.unknown: Counter[str] = Counter()
        self._captured = captured
        self._rules = rules
        self._names = {id(p): name for name, p in captured.model.named_parameters()}
        self._fixed: dict[str, str] = {}  # parameters that must stay as they are

    def run(self) -> None:
        """Follow the network from its inputs to its outputs."""
        known: dict[fx.Node, Any] = {}
        for node in self._captured.graph.nodes:
            if node.op == "placeholder":
                known[node] = self._placeholder(node.name)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = self._call(node, args, kwargs)
            elif node.op == "output":
                for value in leaves(fx.map_arg(node.args, known.__getitem__)):
                    if isinstance(value, Act | Leaf):
                        self.labels.pin(self.act(value).labels, "output of the network")
            else:  # a subgraph, of an operator that takes one
                known[node] = getattr(node.graph.owning_module, node.target)
        self._settle_shared()

    def _placeholder(self, name: str) -> Any:
        model, held = self._captured.model, self._captured.held
        if name in held:
            what = held[name]
            value = what if isinstance(what, Tensor) else _reach(model, what)
            if isinstance(value, nn.Parameter):
                return Leaf(self._names[id(value)], value.detach())
            return value.cpu()  # where the labels are
        example = self._captured.inputs[name]
        if isinstance(example, Tensor):
            return Act(torch.tensor(FIXED).expand(example.shape))
        return example

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(node.target)
        if name.startswith(("_assert", "sym_constrain")):
            return None
        if not any(isinstance(v, Act | Leaf) for v in leaves((args, kwargs))):
            here = {"device": torch.device("cpu")} if "device" in kwargs else {}
            return node.target(*args, **kwargs | here)  # type: ignore[operator]
        rule = self._rules.get(name)
        done = rule(self, node, *args, **kwargs) if rule is not None else None
        return self.give_up(node, (args, kwargs)) if done is None else done

    # ---- what rules say

    def act(self, value: Any, shape: Sequence[int] | None = None) -> Act:
        """Anything as an activation; a parameter is then a layer that reads nothing."""
        if isinstance(value, Leaf):
            rows = self.labels.fresh(value.value.numel()).view(value.value.shape)
            self.use(value, rows, torch.tensor(FIXED), 0, bias=True)
            value = Act(rows)
        elif not isinstance(value, Act):
            value = Act(torch.where(torch.as_tensor(value) == 0, ZERO, FIXED))
        if shape is not None:
            value = Act(value.labels.expand(shape), value.depth)
        return value  # type: ignore[no-any-return]

    def use(
        self, leaf: Leaf, rows: Tensor, columns: Tensor, depth: int, *, bias: bool = False
    ) -> None:
        """Note what a parameter feeds and reads."""
        self.uses.append(Use(leaf, rows, columns, depth, bias))

    def fix(self, value: Any, why: str) -> None:
        """A parameter, or all in a structure of values, must stay as it is."""
        for leaf in leaves(value):
            if isinstance(leaf, Leaf):
                self._fixed.setdefault(leaf.path, why)

    def merged(self, labels: Tensor, axes: Sequence[int], why: str) -> Tensor:
        """Tie labels along axes; those axes become 1."""
        axes = sorted(axis % labels.dim() for axis in axes)
        kept = [axis for axis in range(labels.dim()) if axis not in axes]
        shape = [1 if axis in axes else labels.shape[axis] for axis in range(labels.dim())]
        if 0 in labels.shape:
            return torch.full(shape, ZERO)
        few = compact(labels).permute(*kept, *axes)
        few = few.reshape(*few.shape[: len(kept)], -1)
        first = few.amax(-1, keepdim=True)  # one that is not zero, where there is one
        self.labels.tie(few, first, why)
        first = first.expand(*(labels.shape[axis] for axis in kept), 1)
        return first.reshape(shape)

    def vector(self, labels: Tensor, axis: int, why: str) -> Tensor:
        """The labels along one axis, tied along all others."""
        axis %= labels.dim()
        others = [other for other in range(labels.dim()) if other != axis]
        return self.merged(labels, others, why).reshape(-1)

    def give_up(self, node: fx.Node, values: Any, why: str | None = None) -> Any:
        """Pin all that an operation takes and gives."""
        if why is None:
            name = name_of(node.target)
            why = f"there is no rule for this use of {name}"
            self.unknown[name] += 1
        self.fix(values, why)
        for value in leaves(values):
            if isinstance(value, Act):
                self.labels.pin(value.labels, why)
        depth = depth_of(values)
        return torch.utils._pytree.tree_map(
            lambda v: (
                Act(torch.tensor(FIXED).expand(shape_of(v)), depth) if isinstance(v, Tensor) else v
            ),
            node.meta["val"],
        )

    def _settle_shared(self) -> None:
        """A parameter at work in several places is scaled by one factor."""
        by_path: dict[str, list[Use]] = {}
        for use in self.uses:
            by_path.setdefault(use.leaf.path, []).append(use)
        self.uses = []
        for path, uses in by_path.items():
            why = self._fixed.get(path)
            if why is None and not _alike(uses) and self._overlap(path, uses):
                why = f"{path} is used in several ways"
            if why is not None:
                for use in uses:
                    self.labels.pin(use.rows, why)
                    self.labels.pin(use.columns, why)
            self.uses += [self._joint(uses)] if why is None and _alike(uses) else uses

    def _joint(self, uses: Sequence[Use]) -> Use:
        """One use for several that are alike."""
        rows, columns = uses[0].rows, uses[0].columns
        for use in uses[1:]:  # a place that reads zeros says nothing of the scale
            columns = torch.where(columns == ZERO, use.columns, columns)
        for use in uses:
            why = f"{use.leaf.path} is used in several places"
            self.labels.tie(rows, use.rows, why)
            self.labels.tie(columns, use.columns, why)
        return replace(uses[0], columns=columns, depth=max(use.depth for use in uses))

    def _overlap(self, path: str, uses: Sequence[Use]) -> bool:
        """Whether some element is in more than one of the views."""
        parameter = _reach(self._captured.model, path)
        elements = torch.arange(parameter.numel()).view(parameter.shape)
        seen = torch.cat([viewed(elements, use.leaf.view).reshape(-1) for use in uses])
        return len(seen.unique()) < len(seen)


def _alike(uses: Sequence[Use]) -> bool:
    """Whether all use a parameter in the same way."""
    first = uses[0]
    return all(
        (u.leaf.view, u.rows.shape, u.columns.shape)
        == (first.leaf.view, first.rows.shape, first.columns.shape)
        for u in uses
    )


def viewed(parameter: Tensor, view: View) -> Tensor:
    """The view of a parameter, or of a tensor like it."""
    for operation, args, kwargs in view:
        parameter = operation(parameter, *args, **kwargs)
    return parameter


def _reach(model: nn.Module, path: str) -> Any:
    """A parameter or buffer by its path."""
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def name_of(target: Any) -> str:
    """Of an operation, without overload and the underscore of those in place."""
    packet = getattr(target, "_overloadpacket", target)
    name: str = getattr(packet, "__name__", str(packet))
    return name if name.startswith("_") else name.rstrip("_")


def shape_of(value: Any) -> tuple[int, ...]:
    """Of a captured tensor, with the sizes of the example."""
    return tuple(d if isinstance(d, int) else int(d.node.hint) for d in value.shape)


def depth_of(values: Any) -> int:
    """The largest among the activations in any structure."""
    return max((v.depth for v in leaves(values) if isinstance(v, Act)), default=0)


def leaves(values: Any) -> list[Any]:
    """What is in any structure of values."""
    found: list[Any] = torch.utils._pytree.tree_leaves(values)
    return found
