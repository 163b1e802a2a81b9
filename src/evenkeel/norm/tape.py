"""What the normalizers of one forward tell each other."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError
from evenkeel.graph.flow import Gaussian
from evenkeel.graph.prediction import Place, Prediction

Propagate = Literal["raw", "observed", "normalized"]
Pair = tuple[Tensor, Tensor]
Listener = Callable[[str, Pair | None, Pair, Pair], None]
"""Hears path, prior, fused and observed moments, each of mean and variance (K, C)."""


class Tapes:
    """One tape for each forward that is under way; threads do not see each other's.

    Attributes:
        network: whose layers write on them.
        prediction: how moments flow in it.
        propagate: what a layer tells, as for :func:`evenkeel.norm.kalmanize`.
        listener: hears what every layer finds in train mode.
    """

    def __init__(self, network: nn.Module, prediction: Prediction, propagate: Propagate) -> None:
        self.network = network
        self.prediction = prediction
        self.propagate = propagate
        self.listener: Listener | None = None
        self._places: dict[str, list[Place]] = {}
        for place in prediction.places:
            self._places.setdefault(place.path, []).append(place)
        self._local = threading.local()

    def open(self) -> "Tape | None":
        """Open one; what was open before, to be given to :meth:`close`."""
        before = getattr(self._local, "tape", None)
        self._local.tape = Tape({}, Counter())
        return before

    def close(self, before: "Tape | None") -> None:
        """Go on with the one before."""
        self._local.tape = before

    def visit(self, path: str) -> "Visit | None":
        """A layer comes by; None where no tape is open, or the plan does not know of this time."""
        tape: Tape | None = getattr(self._local, "tape", None)
        if tape is None:
            return None
        places = self._places.get(path, [])
        time = tape.calls[path]
        tape.calls[path] += 1
        return Visit(self, places[time], tape.known) if time < len(places) else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: of for name, of in vars(self).items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = threading.local()


@dataclass(frozen=True)
class Tape:
    """The moments of one forward.

    Attributes:
        known: by step of the plan.
        calls: how often each layer has come by.
    """

    known: dict[int, Gaussian]
    calls: Counter[str]


@dataclass(frozen=True)
class Visit:
    """A layer at its place.

    Attributes:
        tapes: of the network.
        place: in the plan.
        known: the moments of this forward.
    """

    tapes: Tapes
    place: Place
    known: dict[int, Gaussian]

    def prior(self, transition: "LinearTransition | None") -> "tuple[Pair | None, Repeat]":
        """Predicted mean and variance (K, C), None for none; and what it takes to repeat this."""
        step, before = self.place.prior, set(self.known)
        if step is None:
            return None, Repeat(self.tapes, self.place, {}, True)
        plan = self.tapes.prediction
        kind = next((x.mean.device.type for x in self.known.values()), "cpu")
        wide = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if wide else contextlib.nullcontext():
            if transition is None:
                found = plan.evaluate(step, self.known, self.tapes.network)
                prior = None if found is None else found.pooled()
                new = self.known.keys() - before
                read = {step, *(i for of in new for i in plan.steps[of].inputs)} & before
            else:
                sources = plan.sources(step)
                read = set(sources) & before
                told = [self.known[i].pooled() for i in sources if i in read]
                prior = transition(told) if len(told) == len(sources) else None
        kept = {i: self.known[i].detached() for i in read}
        return prior, Repeat(self.tapes, self.place, kept, torch.is_grad_enabled())

    def tell(self, layer: Any, fused: Sequence[Tensor], seen: Sequence[Tensor], size: Any) -> None:
        """What the layer found, (K, C): fused mean and variance, and observed ones."""
        mean, var = _told(self.tapes.propagate, layer, fused, seen)
        self.known[self.place.step] = Gaussian.alike(mean, var, size)


@dataclass(frozen=True)
class Repeat:
    """What it takes to repeat a visit when activation checkpointing does the forward again.

    Attributes:
        tapes: of the network.
        place: in the plan.
        read: the moments that the prior was made of, and whether they need gradients.
        recorded: whether gradients were recorded.
    """

    tapes: Tapes
    place: Place
    read: dict[int, tuple[Gaussian, bool]]
    recorded: bool

    def visit(self) -> Visit:
        """As the one before: gradients go where they went, through the graph made then."""
        if not self.recorded:
            raise ConfigError(
                f"'{self.place.path}' has a prior from outside of the part that is checkpointed; "
                f"gradients reach it with torch.utils.checkpoint.checkpoint(use_reentrant=False) "
                f"only; got use_reentrant=True."
            )
        return Visit(
            self.tapes, self.place, {i: x.leaf(needs) for i, (x, needs) in self.read.items()}
        )


def _told(
    propagate: Propagate, layer: Any, fused: Sequence[Tensor], seen: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The moments that a layer's output is taken to have."""
    if propagate == "raw":
        return fused
    weight, bias = (p.to(fused[0].dtype) for p in layer.affine_of(fused[0]))
    if propagate == "normalized":
        return bias.expand_as(fused[0]), weight.square().expand_as(fused[1])
    scale = weight * (fused[1] + layer.eps).rsqrt()
    return torch.addcmul(bias, scale, seen[0] - fused[0]), scale.square() * seen[1]


class LinearTransition(nn.Module):
    r"""The paper's transition, learned: $m = \sum_s A_s m_s$, $v = \sum_s A_s^2 v_s + R$.

    Covariances are diagonal. Where several normalizers are read, each has its own $A_s$. It begins
    at $A_s = I$ over the number of them, and $R = 1$; the paper's beginning is not known to us.

    Args:
        sources: channels of the normalizers that are read.
        channels: of the one that is predicted.
    """

    def __init__(self, sources: Sequence[int], channels: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.eye(channels, n) / len(sources) for n in sources)
        self.log_noise = nn.Parameter(torch.zeros(channels))

    def forward(self, told: Sequence[Pair]) -> Pair:
        """From the moments (K, C_s) of each source to those predicted, (K, C)."""
        wide = told[0][0].dtype
        mean, var = torch.zeros((), dtype=wide), self.log_noise.to(wide).exp()
        for weight, (m, v) in zip(self.weights, told, strict=True):
            mean = mean + m @ weight.t().to(wide)
            var = var + v @ weight.square().t().to(wide)
        return mean, var
