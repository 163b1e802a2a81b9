"""From the moments of normalizers to those of the ones behind them: a plan, made once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from evenkeel.graph.capture import Captured
from evenkeel.graph.flow import Gaussian
from evenkeel.graph.moment_rules import RULES, Computed, Held, Known, Step
from evenkeel.graph.trace import leaves, name_of, shape_of

BATCH_NORM = ("batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")


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

    def add(step: Step, node: fx.Node) -> Known:
        steps.append(step)
        return Known(len(steps) - 1, shape_of(node.meta["val"]))

    def normalizer(node: fx.Node, x: Any) -> Any:
        held = values.get(node.args[3])  # type: ignore[arg-type]
        path = held.path.rpartition(".")[0] if isinstance(held, Held) else ""
        if path not in normalizers:
            return _Unknown("a normalizer before it is none of those that are fused")
        known = add(Step(), node)
        prior, why = (x.step, None) if isinstance(x, Known) else (None, x.why)
        places.append(Place(path, known.step, prior, why))
        return known

    for node in captured.graph.nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(captured, node.name)
        elif node.op == "get_attr":
            values[node] = getattr(node.graph.owning_module, node.target)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if name_of(node.target) in BATCH_NORM and isinstance(args[0], Known | _Unknown):
                values[node] = normalizer(node, args[0])
            else:
                made = _made(node, args, kwargs)
                values[node] = add(made, node) if isinstance(made, Step) else made
    return Prediction(tuple(steps), tuple(places))


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
    if not any(isinstance(v, Known | _Unknown) for v in given):
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
