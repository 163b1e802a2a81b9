"""The passes over activations that every normalizer is made of, without a compiler.

Two reduce, to numbers per sample and channel, and two write. Each reads its activations from memory
once: what takes torch several operations is done on tiles that stay in the cache from one to the
next. Contiguous and channels-last activations are read as they lie, as rows of shape (A, P, D):
positions P in the middle, and (A, D) is (N * C, 1) for contiguous ones, (N, C) for channels last.
"""

import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from evenkeel.moments import native

TILE = 2**20
"""Elements of a tile: a few MB, which stay in the cache."""
HEAD = 8
"""One part in so many of the positions is looked at for a first guess of the mean."""
LARGE = 2**16
"""Elements of a channels-last sample from which on torch's own reductions are worth a call each."""

_kept = threading.local()


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Statistics are taken in float32, and in float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sample_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and variance over the positions of every sample and channel.

    $$ \mu = k + \overline{x - k}, \qquad \sigma^2 = \overline{(x-k)^2} - (\overline{x-k})^2 $$

    with $k$ the mean of the first eighth of the positions. Whatever the input,
    $(k - \mu)^2 \le 7\sigma^2$, so that the difference never loses more than three bits.

    Args:
        x: (N, C, *spatial), of any floating dtype.

    Returns:
        Mean and (biased) variance, (N, C), in float32 or better. Zero where there are no positions.
    """
    dtype = statistics_dtype(x)
    if x.numel() == 0:
        nothing = torch.zeros(x.shape[:2], dtype=dtype, device=x.device)
        return nothing, nothing.clone()
    rows = _rows(readable(x))
    if kernels := _kernels(x):
        mean, var = kernels.sample_moments(rows, dtype)
    elif _is_large(rows, dtype) and (found := native.large_moments(rows)) is not None:
        mean, var = found
    else:
        mean, var = _tiled_moments(rows, dtype)
    return mean.view(x.shape[:2]), var.view(x.shape[:2])


def _tiled_moments(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    guess = rows[:, : -(-rows.shape[1] // HEAD)].mean(1, keepdim=True, dtype=dtype)
    rest, var = torch.zeros_like(guess), torch.zeros_like(guess)
    for a, p in _tiles(rows):
        about = torch.sub(rows[a, p], guess[a], out=_scratch(rows[a, p], dtype))
        rest[a] += about.sum(1, keepdim=True)
        var[a] += torch.mul(about, about, out=about).sum(1, keepdim=True)
    rest /= rows.shape[1]
    var = var.div_(rows.shape[1]).sub_(rest.square()).clamp_min_(0)
    return guess + rest, var


def affine(x: Tensor, scale: Tensor, offset: Tensor, *, relu: bool = False) -> Tensor:
    """``scale * x + offset``, then ReLU where asked for.

    Args:
        x: (N, C, *spatial).
        scale: (N, C).
        offset: (N, C).
        relu: whether what is below zero becomes zero.

    Returns:
        Of the dtype and layout of ``x``.
    """
    x = readable(x)
    if x.numel() == 0:
        return torch.empty_like(x)
    rows = _rows(x)
    scale, offset = _per_row(scale, rows), _per_row(offset, rows)
    if _has_native(rows):
        z = native.affine(rows, scale, offset)
        return _shaped(z.relu_() if relu else z, x)
    y = torch.empty_like(x)
    out = _rows(y)
    if kernels := _kernels(x):
        kernels.affine(rows, scale, offset, out, relu=relu)
        return y
    for a, p in _tiles(rows):
        z = _affine(rows[a, p], scale[a], offset[a], _place(out[a, p], scale.dtype))
        if relu:
            z.relu_()
        _put(z, out[a, p])
    return y


def paired_sums(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, offset: Tensor, *, relu: bool = False
) -> tuple[Tensor, Tensor]:
    r"""What the gradient of an affine pass reduces to: $\sum_p dy$ and $\sum_p dy\,(x - \mu)$.

    Args:
        dy: gradient with respect to what :func:`affine` gave, (N, C, *spatial).
        x: what it was given.
        mean: (N, C) the $\mu$ to take ``x`` about, which keeps digits where it is large.
        scale: what it was given, (N, C).
        offset: what it was given, (N, C).
        relu: what it was given.

    Returns:
        The two sums, (N, C).
    """
    if x.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    rows = _rows(readable(x))
    gradient = _rows_as(dy, rows)
    about = _per_row(mean, rows)
    if kernels := _kernels(x):
        given = about, _per_row(scale, rows), _per_row(offset, rows)
        total, product = kernels.paired_sums(gradient, rows, *given, relu=relu)
    elif _has_native(rows) and not relu:
        total, product = native.sums(gradient, rows, about)
    elif _is_large(rows, mean.dtype) and not relu:
        total, product = native.large_sums(gradient, rows, about)
    else:
        total, product = torch.zeros_like(about), torch.zeros_like(about)
        scale, offset = _per_row(scale, rows), _per_row(offset, rows)
        for a, p in _tiles(rows):
            t = rows[a, p]
            g = _passed(gradient[a, p], t, scale[a], offset[a], relu=relu)
            total[a] += g.sum(1, keepdim=True)
            weighted = torch.sub(t, about[a], out=_scratch(t, mean.dtype)).mul_(g)
            product[a] += weighted.sum(1, keepdim=True)
    return total.view(mean.shape), product.view(mean.shape)


def combine(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    slope: Tensor,
    shift: Tensor,
    *,
    relu: bool = False,
) -> Tensor:
    """The gradient at the input of a normalizer: ``scale * dy + slope * x + shift``.

    Args:
        dy: gradient with respect to what :func:`affine` gave, (N, C, *spatial).
        x: what it was given.
        scale: what it was given, (N, C).
        offset: what it was given, (N, C).
        slope: (N, C).
        shift: (N, C).
        relu: what it was given.

    Returns:
        Of the dtype and layout of ``x``.
    """
    x = readable(x)
    if x.numel() == 0:
        return torch.empty_like(x)
    rows = _rows(x)
    gradient = _rows_as(dy, rows)
    scale, offset, slope, shift = (_per_row(k, rows) for k in (scale, offset, slope, shift))
    if _has_native(rows) and rows.dtype == scale.dtype and not relu:
        return _shaped(native.affine(rows, slope, shift).addcmul_(gradient, scale), x)
    dx = torch.empty_like(x)
    out = _rows(dx)
    if kernels := _kernels(x):
        kernels.combine(gradient, rows, scale, offset, slope, shift, out, relu=relu)
        return dx
    for a, p in _tiles(rows):
        t = rows[a, p]
        g = _passed(gradient[a, p], t, scale[a], offset[a], relu=relu)
        z = _affine(t, slope[a], shift[a], _place(out[a, p], scale.dtype))
        _put(z.addcmul_(g, scale[a]), out[a, p])
    return dx


def readable(x: Tensor) -> Tensor:
    """The activations where they lie, or a copy where samples and positions lie scattered."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """A view (A, P, D) of readable activations."""
    n, c = x.shape[:2]
    if x.numel() > n * c and x.is_contiguous():
        return x.view(n * c, -1, 1)
    return x.movedim(1, -1).view(n, -1, c)


def _rows_as(dy: Tensor, rows: Tensor) -> Tensor:
    """A gradient in the order of the rows; a copy where it is laid out otherwise."""
    if rows.shape[2] > 1 or rows.shape[1] == 1:
        dy = dy.movedim(1, -1)
    return dy.reshape(rows.shape).contiguous()


def _per_row(coefficient: Tensor, rows: Tensor) -> Tensor:
    """(N, C) -> (A, 1, D)."""
    return coefficient.reshape(rows.shape[0], 1, rows.shape[2])


def _tiles(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of rows, and of positions where one row alone is too large."""
    a, p, d = rows.shape
    many, positions = max(1, TILE // (p * d)), min(p, max(1, TILE // d))
    for i in range(0, a, many):
        for j in range(0, p, positions):
            yield slice(i, i + many), slice(j, j + positions)


def _scratch(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a tile. On the CPU each thread keeps it: new memory costs more than the work."""
    if like.device.type != "cpu":
        return torch.empty_like(like, dtype=dtype)
    room: dict[torch.dtype, Tensor] = vars(_kept).setdefault("room", {})
    if dtype not in room or room[dtype].numel() < like.numel():
        room[dtype] = torch.empty(max(TILE, like.numel()), dtype=dtype)
    return room[dtype][: like.numel()].view(like.shape)


def _place(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to compute what goes to ``out``: there, or aside where that is less precise."""
    return out if out.dtype == dtype else _scratch(out, dtype)


def _put(z: Tensor, out: Tensor) -> None:
    if z.dtype != out.dtype:
        out.copy_(z)


def _affine(t: Tensor, scale: Tensor, offset: Tensor, out: Tensor | None = None) -> Tensor:
    if scale.shape[2] > 1:
        return torch.addcmul(offset, t, scale, out=out)
    return torch.mul(t, scale, out=out).add_(offset)  # two vectorised steps, not one that is not


def _passed(g: Tensor, t: Tensor, scale: Tensor, offset: Tensor, *, relu: bool) -> Tensor:
    """A tile of the gradient, without what ReLU has stopped."""
    g = g.to(scale.dtype)
    if not relu:
        return g
    passed: Tensor = torch.ops.aten.threshold_backward(g, _affine(t, scale, offset), 0)
    return passed


def _kernels(x: Tensor) -> Any:
    """The Triton kernels, where ``x`` is on a GPU that they run on; torch brings Triton with it."""
    return _imported_kernels() if x.is_cuda else None


@functools.cache
def _imported_kernels() -> Any:
    try:
        from evenkeel.moments import kernels
    except ImportError:  # a GPU build of torch without Triton: its own operations do
        return None
    return kernels


def _shaped(z: Tensor, x: Tensor) -> Tensor:
    """In the shape of ``x``, and not as a view: what follows may change it in place."""
    shaped: Tensor = torch.ops.aten._unsafe_view(z, x.shape)
    return shaped


def _has_native(rows: Tensor) -> bool:
    """Whether batch norm's own kernels fit: contiguous rows are channels of a batch of one."""
    return rows.device.type == "cpu" and rows.shape[2] == 1


def _is_large(rows: Tensor, dtype: torch.dtype) -> bool:
    on_cpu = rows.device.type == "cpu"
    return on_cpu and rows.shape[2] > 1 and rows[0].numel() >= LARGE and rows.dtype == dtype
