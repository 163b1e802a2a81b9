r"""A layer's Hamilton products as one real matrix, or as eight real products instead of sixteen.

The real matrix of $x \mapsto w \otimes x$ has each of the four real numbers of w four times, with
signs. With the real part of the product negated it is $K - 2S$: K has the same pattern without
signs, and S one entry in each row. $K = \tfrac14 H^T \mathrm{diag}(Hw) H$ with Hadamard's H of size
4, in which all such patterns are diagonal. So four products of sums and four of single components
give all sixteen; as none of it changes the order of factors, the products may be convolutions.

Howell and Lafon, "The complexity of the quaternion product", 1975 (eight are also necessary);
Cariow and Cariowa, "Fast algorithms for quaternion-valued convolutional neural networks", IEEE
Transactions on Neural Networks and Learning Systems 32, 2021.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_PART = ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))
_SIGN = ((1, -1, -1, -1), (1, 1, -1, 1), (1, 1, 1, -1), (1, -1, 1, 1))


def assembled(weight: Tensor) -> Tensor:
    """The real weight (4 O, 4 I, ...) of quaternions (4, O, I, ...)."""
    rows = [
        torch.cat(
            [weight[p] if s > 0 else -weight[p] for p, s in zip(parts, signs, strict=True)], 1
        )
        for parts, signs in zip(_PART, _SIGN, strict=True)
    ]
    return torch.cat(rows)


torch.library.define("evenkeel::quaternion_matrix", "(Tensor weight) -> Tensor")
torch.library.impl("evenkeel::quaternion_matrix", "CompositeImplicitAutograd", assembled)
named: Callable[[Tensor], Tensor] = torch.ops.evenkeel.quaternion_matrix
"""The same by a name that stands in a captured graph."""


def taken_apart(matrix: Tensor) -> Tensor:
    """The quaternions (4, O, I, ...) that are nearest to a real weight (4 O, 4 I, ...)."""
    rows, columns = matrix.shape[:2]
    blocks = matrix.view(4, rows // 4, 4, columns // 4, *matrix.shape[2:]).transpose(1, 2)
    found = [
        sum(_SIGN[r][c] * blocks[r, c] for r in range(4) for c in range(4) if _PART[r][c] == p) / 4
        for p in range(4)
    ]
    return torch.stack(found)  # type: ignore[arg-type]


def eight(weight: Tensor) -> Tensor:
    """What the eight products have on the side of the weights: (4, ...) -> (8, ...)."""
    a, b, c, d = weight
    s, t, u, v = a + b, c + d, a - b, c - d
    quarters = [(s + t) / 4, (u + v) / 4, (s - t) / 4, (u - v) / 4]
    return torch.stack([*quarters, 2 * a, -2 * c, -2 * d, -2 * b])


def in_eight(
    x: Tensor, kernels: Tensor, bias: Tensor | None, product: Product, axis: int = 1
) -> Tensor:
    """The quaternions w * x + b by eight products.

    Sums are taken in place and in the order in which least memory is held: in a small layer, asking
    for memory takes longer than adding.

    Args:
        x: its parts lie one after the other along ``axis``.
        kernels: (8, ...) from :func:`eight`.
        bias: a real number for each output, in the order of the results; or None.
        product: of a part or a sum of parts with one of the kernels, and a bias added, as a new
            tensor.
        axis: also that of the results' parts.
    """
    a, b, c, d = x.chunk(4, axis)
    of_r, of_i, of_j, of_k = (None,) * 4 if bias is None else bias.chunk(4)
    r, k = product(a, kernels[4], of_r), product(b, kernels[5], of_k)
    i, j = product(c, kernels[6], of_i), product(d, kernels[7], of_j)
    s, t = a + b, c + d
    y0, y2 = product(s + t, kernels[0], None), product(s.sub_(t), kernels[2], None)
    s, t = a - b, c - d
    y1, y3 = product(s + t, kernels[1], None), product(s.sub_(t), kernels[3], None)
    s, t = y0 + y1, y2 + y3
    r.sub_(s).sub_(t)
    j.add_(s).sub_(t)
    s, t = y0.sub_(y1), y2.sub_(y3)
    i.add_(s).add_(t)
    k.add_(s).sub_(t)
    return torch.cat([r, i, j, k], axis)
