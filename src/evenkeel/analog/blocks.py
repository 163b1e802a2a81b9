"""Large arrays block by block: what is made on the way stays in a core's cache."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree

BLOCK = 1 << 18
"""Devices that are taken at once."""


def sizes(number: int) -> list[int]:
    """Of the blocks of so many devices."""
    return [min(BLOCK, number - start) for start in range(0, number, BLOCK)]


def blockwise(f: Callable[[Any], Any], given: Any) -> Any:
    """What ``f`` makes of tensors of one shape, device by device, in any nesting.

    ``f`` sees blocks (1, 1, n), in the order in which devices lie in memory. What it gives has the
    same shape; where it hands its first input through, nothing is copied.
    """
    leaves, structure = _pytree.tree_flatten(given)
    shape, rows = leaves[0].shape, [leaf.reshape(-1) for leaf in leaves]
    whole: list[Any] = []
    start = 0
    for size in sizes(len(rows[0])):
        block = [row[start : start + size].view(1, 1, -1) for row in rows]
        parts, out = _pytree.tree_flatten(f(_pytree.tree_unflatten(block, structure)))
        if not whole:
            whole = [_room(part, block[0], rows[0]) for part in parts]
        for k, part in enumerate(parts):
            whole[k] = _kept(whole[k], part, block[0], rows[0], start)
        start += size
    return _pytree.tree_unflatten(
        [room if room is None else room.view(shape) for room in whole], out
    )


def _kept(room: Any, part: Any, block: Tensor, row: Tensor, start: int) -> Any:
    """The room with the part in it; one that was handed through so far is copied at need."""
    if part is None and room is None:
        return None
    if room is row:
        if part.data_ptr() == block.data_ptr():
            return row
        room = row.clone()
    room[start : start + part.numel()] = part.view(-1)
    return room


def _room(part: Tensor | None, block: Tensor, row: Tensor) -> Tensor | None:
    if part is None or part.data_ptr() == block.data_ptr():
        return None if part is None else row
    return part.new_empty(len(row))
