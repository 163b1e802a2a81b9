"""Batch norm's own kernels on the CPU, made to serve for other things.

Contiguous rows (N * C, P, 1) are channels of a batch of one image; a channels-last sample (1, P, C)
is a batch of one image too. In eval mode batch norm is an affine pass; the gradients of its bias
and weight are the two sums that a backward pass reduces to.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

TOLERANCE = 1e-7
"""Squared error of a mean, in variances, beyond which a reduction is done again."""


def affine(rows: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``scale * x + offset`` of contiguous rows, by batch norm in eval mode."""
    scale, offset = scale.view(-1), offset.view(-1)
    kept = torch.zeros_like(scale), torch.ones_like(scale)  # mean and variance, in eval mode
    batch = rows.view(1, -1, rows.shape[1])
    return torch.native_batch_norm(batch, scale, offset, *kept, False, 0.0, 0.0)[0].view(rows.shape)


def sums(dy: Tensor, rows: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Of contiguous rows, the sums of the gradient and of it times the deviation."""
    one = torch.ones_like(mean.view(-1))
    batch = (1, -1, rows.shape[1])
    return _reduced(dy.view(batch).to(rows.dtype), rows.view(batch), mean.view(-1), one)


def _reduced(dy: Tensor, x: Tensor, mean: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
    """Of one sample of many channels, by the kernel that gives bias and weight their gradients."""
    only = [False, True, True]
    _, product, total = torch.ops.aten.native_batch_norm_backward(
        dy, x, one, None, None, mean, one, True, 0.0, only
    )
    return total, product


def large_moments(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of channels-last rows, by batch norm's own reduction, one sample a call.

    Its sums lose digits where the mean is large, which ``torch.mean`` does not: where the two
    differ, there is nothing to be had from it.
    """
    mean = rows.mean(1)  # (N, C)
    found = [torch.batch_norm_update_stats(t, None, None, 0.0) for t in _as_images(rows)]
    means, variances = (torch.stack(each) for each in zip(*found, strict=True))
    if bool(((means - mean).square_() > TOLERANCE * variances).any()):
        return None
    return mean, variances


def large_sums(dy: Tensor, rows: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Of channels-last rows, the same sums, one sample a call."""
    one = torch.ones_like(mean[0, 0])
    samples = zip(_as_images(dy), _as_images(rows), mean[:, 0], strict=True)
    totals, products = zip(*(_reduced(g, t, m, one) for g, t, m in samples), strict=True)
    return torch.stack(totals), torch.stack(products)


def _as_images(rows: Tensor) -> Iterator[Tensor]:
    return (t.t()[None, :, :, None] for t in rows)  # (1, C, P, 1), channels last
