"""Which scales of a network may be moved without changing what it computes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.graph.capture import capture
from evenkeel.graph.rules import RULES
from evenkeel.graph.trace import Leaf, Tracer, Use

PINNED = -1
"""The variable of what may not be moved."""
DEAD = "dead: it never fires, or is never read"


@dataclass(frozen=True)
class Scaled:
    r"""Where a parameter works: element $w$ may become $w\,e^{z_\mathrm{row} - z_\mathrm{column}}$.

    Attributes:
        leaf: the parameter, or the view of it that is used.
        rows: variables of what the elements feed, broadcast against the view; -1 for none.
        columns: variables of what they read.
        channels: variables of the outputs, one each.
        pinned: why outputs may not be moved, and how many for each reason.
        depth: of the layer: layers with weights up to it, along the longest way.
        bias: whether it is added rather than multiplied by.
    """

    leaf: Leaf
    rows: Tensor
    columns: Tensor
    channels: Tensor
    pinned: dict[str, int]
    depth: int
    bias: bool


@dataclass(frozen=True)
class Coverage:
    """What is free in one layer.

    Attributes:
        layer: path of its weight.
        channels: outputs.
        free: those whose scale may be moved.
        pinned: why the others may not, and how many for each reason.
    """

    layer: str
    channels: int
    free: int
    pinned: dict[str, int]


@dataclass(frozen=True)
class Scales:
    """The scales of a network that may be moved.

    Attributes:
        number: of variables: scales that may be moved independently.
        places: where parameters work, each element of a parameter once.
        unknown: operations without a rule, and how often each occurs.
    """

    number: int
    places: Sequence[Scaled]
    unknown: dict[str, int]

    @property
    def coverage(self) -> list[Coverage]:
        """By layer."""
        return self.covered(torch.ones(self.number, dtype=torch.bool))

    def covered(self, live: Tensor) -> list[Coverage]:
        """By layer, where only some variables (number,) are alive."""
        layers: dict[str, Coverage] = {}
        for place in self.places:
            if place.bias:
                continue
            free = place.channels[place.channels != PINNED]
            dead = int((~live[free]).sum())
            why = Counter(place.pinned) + Counter({DEAD: dead})
            path = place.leaf.path
            before = layers.get(path, Coverage(path, 0, 0, {}))
            layers[path] = Coverage(
                path,
                before.channels + len(place.channels),
                before.free + len(free) - dead,
                dict((Counter(before.pinned) + why).most_common()),
            )
        return list(layers.values())


def find_scales(model: nn.Module, example_inputs: Any) -> Scales:
    r"""Find every per-channel scale that can be moved from one layer to the next.

    The network is captured and run on labels, one for each scale: what only moves elements about
    moves labels, addition ties them, ReLU and pooling let them pass, layers with weights give fresh
    ones, and what is not homogeneous pins them to 1. Nothing in it depends on the architecture.

    Args:
        model: any network that torch can export; left as it is.
        example_inputs: a tensor, or the tuple of the network's positional arguments.

    Raises:
        GraphError: it cannot be exported.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> find_scales(net, torch.zeros(2, 4)).number
        8
        >>> net[1] = nn.GELU()
        >>> find_scales(net, torch.zeros(2, 4)).coverage[0].pinned
        {'gelu lets no scale pass': 8}
    """
    tracer = Tracer(capture(model, example_inputs), RULES)
    tracer.run()
    labels = tracer.labels
    every = torch.arange(len(labels))
    roots, pinned = labels.roots(every), labels.is_pinned(every)
    free, numbers = roots[~pinned].unique(), torch.full((len(labels),), PINNED)
    numbers[free] = torch.arange(len(free))
    numbers = numbers[roots]
    numbers[pinned] = PINNED

    def variables(of: Tensor) -> Tensor:
        return torch.where(of < 0, PINNED, numbers[of.clamp_min(0)])

    def scaled(use: Use) -> Scaled:
        outputs = use.rows.unique()  # labels go up with the channels
        reasons = Counter(why for label in outputs.tolist() if (why := labels.reason(label)))
        return Scaled(
            use.leaf,
            variables(use.rows),
            variables(use.columns),
            variables(outputs),
            dict(reasons),
            use.depth,
            use.bias,
        )

    return Scales(len(free), [scaled(use) for use in tracer.uses], dict(tracer.unknown))
