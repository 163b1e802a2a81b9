"""From similarities to attention, and from attention to classes."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from evenkeel.errors import ConfigError, nearest

Sharpening = Literal["softabs", "abs", "softmax", "identity"]
STIFFNESS = 10.0


def softabs(alpha: Tensor, stiffness: float = STIFFNESS) -> Tensor:
    r"""A smooth absolute value that is small between -1/2 and 1/2.

    $$ \varepsilon(\alpha) = \sigma(\beta(\alpha - \tfrac12)) + \sigma(\beta(-\alpha - \tfrac12)) $$

    Least where vectors are orthogonal, so that training makes those of different classes so, as
    random vectors of many dimensions are; softmax would make them opposite.

    Examples:
        >>> softabs(torch.tensor([0.0, 0.5, -0.5, 1.0]))
        tensor([0.0134, 0.5000, 0.5000, 0.9933])

    References:
        Karunaratne et al., "Robust high-dimensional memory-augmented neural networks", Nature
        Communications 12, 2468 (2021).
    """
    return torch.sigmoid(stiffness * (alpha - 0.5)) + torch.sigmoid(stiffness * (-alpha - 0.5))


SHARPENINGS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "softabs": softabs,
    "abs": lambda alpha, stiffness: alpha.abs(),
    "softmax": lambda alpha, stiffness: (
        stiffness * (alpha - alpha.amax(-1, keepdim=True).detach())
    ).exp(),
    # What is opposite gets none.
    "identity": lambda alpha, stiffness: alpha.clamp_min(0),
}
"""By name, from similarity to what attention is in proportion to."""


def attention(alpha: Tensor, sharpening: str = "softabs", stiffness: float = STIFFNESS) -> Tensor:
    r"""The share of each support, $w_i = \varepsilon(\alpha_i) / \sum_j \varepsilon(\alpha_j)$.

    Args:
        alpha: similarities (..., n).
        sharpening: one of :data:`SHARPENINGS`.
        stiffness: $\beta$ of softabs and softmax.

    Returns:
        (..., n), which sum to 1; all alike where there is nothing to choose by.
    """
    if sharpening not in SHARPENINGS:
        raise ConfigError(f"Unknown sharpening {sharpening!r}. {nearest(sharpening, SHARPENINGS)}")
    sharp = SHARPENINGS[sharpening](alpha, stiffness)
    total = sharp.sum(-1, keepdim=True)
    alike = torch.full_like(sharp, 1 / max(1, sharp.shape[-1]))
    return torch.where(total > 0, sharp / torch.where(total > 0, total, 1), alike)


def summed(weights: Tensor, owners: Tensor, classes: int) -> Tensor:
    """The attention of each class, (..., classes): that of all its supports (n,) together."""
    return weights.new_zeros(*weights.shape[:-1], classes).index_add(-1, owners, weights)


def nearest_support(weights: Tensor, owners: Tensor, classes: int) -> Tensor:
    """The attention of each class, (..., classes): that of its best support."""
    best = weights.new_zeros(*weights.shape[:-1], classes)
    return best.scatter_reduce(-1, owners.expand(weights.shape), weights, "amax")
