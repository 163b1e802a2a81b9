"""Devices of many arrays as one row that is worked on in blocks.

What is made on the way stays in a core's cache, and small arrays share the cost of an operation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LANES = 64
"""Arrays begin at multiples of it: torch may round otherwise what is left over by whole vectors."""
SPLIT = 12 * LANES
"""Blocks are multiples of it: among one to four threads torch then splits them at whole vectors."""
BLOCK = 170 * SPLIT
"""Devices that are taken at once: not enough for a fifth thread, each of which takes 32,768."""
LARGE = 1 << 22
"""Bytes from which numpy asks for large pages."""

Named = dict[str, Tensor]
Found = dict[str, Tensor | None]


class Piece(NamedTuple):
    """A part of one array in a block."""

    array: int
    start: int
    """In the array."""
    at: int
    """In the block."""
    number: int
    """Of devices."""


def layout(numbers: Sequence[int], block: int) -> list[list[Piece]]:
    """The pieces in each block, for arrays of so many devices."""
    blocks: list[list[Piece]] = [[]]
    at = 0
    for array, number in enumerate(numbers):
        start = 0
        while start < number:
            if at >= block:
                blocks.append([])
                at = 0
            taken = min(number - start, block - at)
            blocks[-1].append(Piece(array, start, at, taken))
            start, at = start + taken, at + _whole(taken, LANES)
    return blocks


def size_of(pieces: Sequence[Piece]) -> int:
    """Devices in a block, with those between the arrays."""
    return _whole(pieces[-1].at + pieces[-1].number, SPLIT)


def blockwise(
    f: Callable[[Named], Mapping[str, Tensor | None]],
    arrays: Sequence[Named],
    blocks: Sequence[Sequence[Piece]],
) -> list[Found]:
    """What ``f`` makes of the tensors of each array, which are of one shape, device by device.

    ``f`` sees tensors (1, 1, n) of those names, in which devices lie as they do in memory. What it
    gives can be expanded to that; where it hands the first one through, nothing is copied.
    """
    shapes = [next(iter(named.values())).shape for named in arrays]
    rows = {name: [array[name].reshape(-1) for array in arrays] for name in arrays[0]}
    first = next(iter(rows))
    found: list[Found] = [{} for _ in arrays]
    for pieces in blocks:
        block = {name: _gathered(of_each, pieces) for name, of_each in rows.items()}
        for name, part in f(block).items():
            whole = None if part is None else part.expand(block[first].shape).reshape(-1)
            through = whole is not None and whole.data_ptr() == block[first].data_ptr()
            for piece in pieces:
                into, row = found[piece.array], rows[first][piece.array]
                if whole is None:
                    into[name] = None
                elif not through:
                    values = whole[piece.at : piece.at + piece.number]
                    into[name] = _filled(into.get(name), values, row, piece.start)
                elif into.setdefault(name, row) is not row:
                    span = slice(piece.start, piece.start + piece.number)
                    into[name][span] = row[span]  # type: ignore[index]
    return [
        {name: None if value is None else value.view(shape) for name, value in named.items()}
        for named, shape in zip(found, shapes, strict=True)
    ]


def _gathered(rows: list[Tensor], pieces: Sequence[Piece]) -> Tensor:
    """The pieces side by side; one that fills a block as it is.

    Between them lies what is as good as any other device: the last of a piece again.
    """
    size, (whose, begin, _, number) = size_of(pieces), pieces[0]
    if number == size:
        return rows[whose][begin : begin + size].view(1, 1, -1)
    block = rows[whose].new_empty(size)
    ends = [*(piece.at for piece in pieces[1:]), size]
    for (array, start, at, number), until in zip(pieces, ends, strict=True):
        end = start + number
        block[at : at + number] = rows[array][start:end]
        if until > at + number:
            block[at + number : until] = rows[array][end - 1]
    return block.view(1, 1, -1)


def _filled(room: Tensor | None, values: Tensor, row: Tensor, start: int) -> Tensor:
    """The room with the values in it; a row that was handed through so far is left alone."""
    if room is None:
        room = unfilled(values, len(row))
    elif room is row:
        room = row.clone()
    room[start : start + len(values)] = values
    return room


def unfilled(like: Tensor, *shape: int) -> Tensor:
    """Room for numbers like these. Large ones lie on large pages, which cost a fifth to touch."""
    number = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or number < LARGE:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(number, np.uint8)).view(like.dtype).view(shape)


def _whole(number: int, of: int) -> int:
    return -(-number // of) * of
