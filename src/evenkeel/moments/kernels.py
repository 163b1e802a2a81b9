"""The passes as Triton kernels, for CUDA; the same rows (A, P, D) as in :mod:`passes`.

A program has a tile of positions by channels of one row. The reductions cut long rows into ranges,
whose partial results are put together by a few operations on small tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024
"""About so many programs keep a GPU busy."""
TILES = 8
"""Tiles of a range, at most: its first one tells a mean to take the others about."""
RANGES = 65535
"""CUDA's limit to the third axis of a grid."""


@triton.jit  # type: ignore[untyped-decorator]
def _moments_kernel(x, mean, square, P, D, span, BP: tl.constexpr, BD: tl.constexpr):  # type: ignore  # noqa: ANN001, ANN202
    a, s = tl.program_id(0).to(tl.int64), tl.program_id(2)
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    start, stop = s * span, tl.minimum((s + 1) * span, P)
    p = tl.arange(0, BP)[:, None].to(tl.int64)
    first = start + p
    row = x + a * P * D + d
    t = tl.load(row + first * D, mask=(first < stop) & (d < D), other=0).to(mean.dtype.element_ty)
    guess = tl.sum(t, 0)[None, :] / tl.minimum(stop - start, BP)
    total = tl.zeros([BP, BD], mean.dtype.element_ty)
    squares = tl.zeros([BP, BD], mean.dtype.element_ty)
    for q in range(start, stop, BP):
        here = q + p
        inside = (here < stop) & (d < D)
        t = tl.load(row + here * D, mask=inside, other=0).to(mean.dtype.element_ty)
        about = tl.where(inside, t - guess, 0)
        total += about
        squares += about * about
    rest = tl.sum(total, 0)[None, :] / (stop - start)
    spread = tl.sum(squares, 0)[None, :] - rest * rest * (stop - start)
    out = (s * tl.num_programs(0) + a) * D + d
    tl.store(mean + out, guess + rest, mask=d < D)
    tl.store(square + out, spread, mask=d < D)


@triton.jit  # type: ignore[untyped-decorator]
def _sums_kernel(  # type: ignore  # noqa: ANN202
    dy, x, mean, scale, offset, total, product, P, D, span,  # noqa: ANN001
    RELU: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    a, s = tl.program_id(0).to(tl.int64), tl.program_id(2)
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    row, of = a * P * D + d, a * D + d
    m = tl.load(mean + of, mask=d < D, other=0)
    k, b = tl.load(scale + of, mask=d < D, other=0), tl.load(offset + of, mask=d < D, other=0)
    first = tl.zeros([BP, BD], mean.dtype.element_ty)
    second = tl.zeros([BP, BD], mean.dtype.element_ty)
    for q in range(s * span, tl.minimum((s + 1) * span, P), BP):
        p = q + tl.arange(0, BP)[:, None].to(tl.int64)
        inside = (p < tl.minimum((s + 1) * span, P)) & (d < D)
        t = tl.load(x + row + p * D, mask=inside, other=0).to(mean.dtype.element_ty)
        g = tl.load(dy + row + p * D, mask=inside, other=0).to(mean.dtype.element_ty)
        if RELU:
            g = tl.where(t * k + b <= 0, 0, g)
        first += g
        second += tl.where(inside, g * (t - m), 0)
    out = (s * tl.num_programs(0) + a) * D + d
    tl.store(total + out, tl.sum(first, 0)[None, :], mask=d < D)
    tl.store(product + out, tl.sum(second, 0)[None, :], mask=d < D)


@triton.jit  # type: ignore[untyped-decorator]
def _write_kernel(  # type: ignore  # noqa: ANN202
    x, dy, scale, offset, slope, shift, y, P, D, tiles,  # noqa: ANN001
    BACKWARD: tl.constexpr, RELU: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    a, q = program // tiles, program % tiles
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    p = q * BP + tl.arange(0, BP)[:, None]
    inside, of, at = (p < P) & (d < D), a * D + d, a * P * D + p * D + d
    t = tl.load(x + at, mask=inside, other=0).to(scale.dtype.element_ty)
    k, b = tl.load(scale + of, mask=d < D, other=0), tl.load(offset + of, mask=d < D, other=0)
    z = t * k + b
    if BACKWARD:
        g = tl.load(dy + at, mask=inside, other=0).to(scale.dtype.element_ty)
        if RELU:
            g = tl.where(z <= 0, 0, g)
        z = k * g + tl.load(slope + of, mask=d < D, other=0) * t
        z += tl.load(shift + of, mask=d < D, other=0)
    elif RELU:
        z = tl.where(z <= 0, 0, z)  # what is not a number stays so
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


def sample_moments(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance over positions, (A, 1, D)."""
    a, p, d = rows.shape
    grid, span, tile = _cut(rows)
    means, squares = (rows.new_empty((grid[2], a, d), dtype=dtype) for _ in range(2))
    with torch.cuda.device_of(rows):
        _moments_kernel[grid](rows, means, squares, p, d, span, **tile)
    if grid[2] == 1:
        return means[0, :, None], (squares[0, :, None] / p).clamp_min_(0)
    counts = torch.full((grid[2], 1, 1), span, dtype=dtype, device=rows.device)
    counts[-1] = p - span * (grid[2] - 1)
    mean = (counts * means).sum(0) / p
    var = (squares + counts * (means - mean).square()).sum(0) / p
    return mean[:, None], var.clamp_min_(0)[:, None]


def paired_sums(
    dy: Tensor, rows: Tensor, mean: Tensor, scale: Tensor, offset: Tensor, *, relu: bool
) -> tuple[Tensor, Tensor]:
    """Sums over positions of the gradient, and of it times the deviation, (A, 1, D)."""
    a, p, d = rows.shape
    grid, span, tile = _cut(rows)
    totals, products = (mean.new_empty((grid[2], a, d)) for _ in range(2))
    given = (t.contiguous() for t in (mean, scale, offset))
    with torch.cuda.device_of(rows):
        _sums_kernel[grid](dy, rows, *given, totals, products, p, d, span, relu, **tile)
    return totals.sum(0)[:, None], products.sum(0)[:, None]


def affine(rows: Tensor, scale: Tensor, offset: Tensor, out: Tensor, *, relu: bool) -> None:
    """``scale * x + offset`` into ``out``."""
    _write(rows, rows, scale, offset, scale, offset, out, backward=False, relu=relu)


def combine(
    dy: Tensor,
    rows: Tensor,
    scale: Tensor,
    offset: Tensor,
    slope: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    relu: bool,
) -> None:
    """``scale * dy + slope * x + shift`` into ``out``."""
    _write(rows, dy, scale, offset, slope, shift, out, backward=True, relu=relu)


def _write(
    rows: Tensor,
    dy: Tensor,
    scale: Tensor,
    offset: Tensor,
    slope: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    backward: bool,
    relu: bool,
) -> None:
    a, p, d = rows.shape
    tile = _tile(p, d)
    tiles = triton.cdiv(p, tile["BP"])
    given = (t.contiguous() for t in (scale, offset, slope, shift))
    with torch.cuda.device_of(rows):
        grid = (a * tiles, triton.cdiv(d, tile["BD"]))
        _write_kernel[grid](rows, dy, *given, out, p, d, tiles, backward, relu, **tile)


def _tile(positions: int, channels: int) -> dict[str, int]:
    """Of contiguous rows up to a thousand positions, of others 64 channels by 32 positions."""
    bd = min(64, triton.next_power_of_2(channels))
    bp = min(triton.next_power_of_2(positions), 1024 if bd == 1 else 2048 // bd)
    return {"BP": bp, "BD": bd}


def _cut(rows: Tensor) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """The grid of a reduction, the positions of a range, and the tile."""
    a, p, d = rows.shape
    tile = _tile(p, d)
    columns = triton.cdiv(d, tile["BD"])
    tiles = triton.cdiv(p, tile["BP"])
    wanted = max(PROGRAMS // (a * columns), triton.cdiv(tiles, TILES))
    ranges = max(1, min(tiles, wanted, RANGES))
    span = triton.cdiv(triton.cdiv(p, ranges), tile["BP"]) * tile["BP"]
    return (a, columns, triton.cdiv(p, span)), span, tile
