"""Scaling parameters, and all that goes with them, in place."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evenkeel.balance.optimizer_state import require_rule, transport_
from evenkeel.errors import ConfigError
from evenkeel.graph import Leaf, Scaled, viewed


@dataclass(frozen=True)
class Move:
    """By parameter, the views of it that are scaled, and by what."""

    factors: Mapping[str, Sequence[tuple[Leaf, Tensor]]]

    @torch.no_grad()
    def rescale_(self, path: str, tensor: Tensor, power: int = 1) -> None:
        """Scale a tensor like the parameter at ``path``, by its factors to a power."""
        for leaf, factor in self.factors.get(path, ()):
            view = viewed(tensor.detach(), leaf.view)
            wide = torch.promote_types(view.dtype, torch.float32)
            view.mul_(factor.pow(power).to(view.device, wide))


def steps(z: Tensor, *, exact: bool = False) -> Tensor:
    """The scales themselves."""
    return (z / math.log(2)).round().exp2() if exact else z.exp()


def move(places: Sequence[Scaled], z: Tensor, *, exact: bool = False) -> Move:
    """The way to log scales ``z`` (n + 1,), of which the last is 0.

    ``exact`` rounds scales to powers of two, by which multiplication is exact.
    """
    factors: dict[str, list[tuple[Leaf, Tensor]]] = {}
    by = steps(z, exact=exact)
    for place in places:
        factor = by[place.rows] / by[place.columns]
        if bool((factor != 1).any()):
            factors.setdefault(place.leaf.path, []).append((place.leaf, factor))
    return Move(factors)


@dataclass(frozen=True)
class Carried:
    """What goes along with the parameters of a network.

    Attributes:
        model: the network.
        optimizer: whose state is scaled with the parameters.
        copies: networks with the same parameters.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    copies: Sequence[nn.Module]

    def __post_init__(self) -> None:
        if self.optimizer is not None:
            require_rule(self.optimizer)
        object.__setattr__(self, "copies", [_like(self.model, copy) for copy in self.copies])

    def rescale_(self, by: Move, *, back: bool = False) -> None:
        """Go where the parameters have gone, or back."""
        sign = -1 if back else 1
        paths = {p: path for path, p in self.model.named_parameters() if path in by.factors}
        if self.optimizer is not None:
            transport_(
                self.optimizer, paths, lambda p, t, power: by.rescale_(paths[p], t, sign * power)
            )
        for copy in self.copies:
            for path, parameter in copy.named_parameters():
                by.rescale_(path, parameter, sign)


def _like(model: nn.Module, copy: nn.Module) -> nn.Module:
    """The copy, or what it holds, that has the model's parameters."""
    names = [name for name, _ in model.named_parameters()]
    for candidate in (copy, getattr(copy, "module", None)):
        if candidate is not None and [name for name, _ in candidate.named_parameters()] == names:
            return candidate
    raise ConfigError(
        f"copies must be networks with the same parameters as {type(model).__name__}; "
        f"{type(copy).__name__} has others."
    )
