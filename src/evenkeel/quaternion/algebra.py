"""Quaternions in a tensor: four blocks of channels, all real parts first."""

import torch
from torch import Tensor

from evenkeel.errors import ShapeError


def components(x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real, i, j and k parts: four equal blocks along ``dim``."""
    if not x.dim() or x.shape[dim] % 4 or not x.shape[dim]:
        got = tuple(x.shape)
        raise ShapeError(
            f"Quaternions need a multiple of 4 along axis {dim}, as [all r | all i | all j | all "
            f"k]; got shape {got}. Images are turned into quaternions by to_quaternion."
        )
    r, i, j, k = x.chunk(4, dim)
    return r, i, j, k


def hamilton(p: Tensor, q: Tensor, dim: int = 1) -> Tensor:
    r"""The Hamilton product $p \otimes q$, with $i^2 = j^2 = k^2 = ijk = -1$.

    Args:
        p: quaternions, four blocks along ``dim``.
        q: likewise; all other axes broadcast.
        dim: the axis of the blocks.

    Raises:
        ShapeError: an axis that is no multiple of 4.

    Examples:
        >>> i, j = torch.tensor([0.0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 0])
        >>> hamilton(i, j, dim=0).tolist(), hamilton(j, i, dim=0).tolist()
        ([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, -1.0])
    """
    a, b, c, d = components(p, dim)
    e, f, g, h = components(q, dim)
    return torch.cat(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ],
        dim,
    )


def conjugate(q: Tensor, dim: int = 1) -> Tensor:
    """The same real part, and the negative of the others."""
    r, i, j, k = components(q, dim)
    return torch.cat([r, -i, -j, -k], dim)


def modulus(q: Tensor, dim: int = 1) -> Tensor:
    """Lengths, a quarter as many along ``dim``."""
    lengths: Tensor = torch.linalg.vector_norm(torch.stack(components(q, dim)), dim=0)
    return lengths


def rotated(q: Tensor, by: Tensor, dim: int = 1) -> Tensor:
    r"""$w \otimes q \otimes w^* / |w|^2$: the i, j, k parts turned as a vector in space.

    Args:
        q: what is turned.
        by: w, of any length but 0; its axis is that of the turn, and the tangent of half the angle
            is the length of its i, j, k parts over its real part.
        dim: the axis of the blocks.
    """
    unit = by / torch.cat([modulus(by, dim)] * 4, dim)
    return hamilton(hamilton(unit, q, dim), conjugate(unit, dim), dim)
