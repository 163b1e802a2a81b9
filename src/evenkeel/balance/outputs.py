"""Whether a network still gives the outputs that it gave."""

from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import GraphError


def numbers_in(output: Any) -> list[Tensor]:
    """The tensors of floating-point numbers in a network's output."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def largest_change(then: list[Tensor], now: list[Tensor]) -> float:
    """Largest change, relative to the largest value."""
    changes = [
        float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))
        for a, b in zip(then, now, strict=True)
        if a.numel()
    ]
    return max(changes, default=0.0)


def is_same(error: float, model: nn.Module) -> bool:
    """Whether a change of outputs is no more than rounding."""
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    return error <= max(1e-3, 32 * eps)


def require_same(error: float, model: nn.Module) -> None:
    """Refuse a change of outputs beyond rounding."""
    if not is_same(error, model):
        raise GraphError(
            f"The outputs of {type(model).__name__} must stay the same; they changed by "
            f"{error:.1e} of the largest, and the network is as it was. Either its outputs are "
            f"random or not finite in eval mode, or an operation does not do what its rule says: "
            f"please report it, with what evenkeel.graph.capture(model, inputs).graph prints."
        )
