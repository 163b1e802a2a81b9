"""Which channels must share one scale, and which have none: a union-find over labels."""

from collections.abc import Callable

import torch
from torch import Tensor

FIXED = 0
"""The label of what has scale 1 for good: a network's inputs, and what no rule can move."""
ZERO = -1
"""The label of what is zero, whatever its scale: padding."""


class Labels:
    """Labels 1, 2, 3, ... of scales, some tied to each other, some pinned for a reason."""

    def __init__(self) -> None:
        self._parent = [FIXED]
        self._reason: dict[int, str] = {FIXED: "fixed"}

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, number: int) -> Tensor:
        """So many new labels, (number,)."""
        start = len(self._parent)
        self._parent.extend(range(start, start + number))
        return torch.arange(start, start + number)

    def tie(self, a: Tensor, b: Tensor, why: str) -> None:
        """Make labels one, element by element; what meets a fixed one is pinned."""
        a, b = (compact(t) for t in torch.broadcast_tensors(a, b))
        for x, y in _distinct(*torch.broadcast_tensors(a, b)):
            if ZERO not in (x, y):
                self._union(self._root(x), self._root(y), why)

    def pin(self, labels: Tensor, why: str) -> None:
        """Give these the scale 1 for good."""
        for label in compact(labels).unique().tolist():
            if label != ZERO:
                self._reason.setdefault(self._root(label), why)

    def is_pinned(self, labels: Tensor) -> Tensor:
        """Where the scale is 1 for good, or does not matter."""
        return self._by_label(labels, lambda x: x == ZERO or self._root(x) in self._reason).bool()

    def roots(self, labels: Tensor) -> Tensor:
        """One label for all that are tied."""
        return self._by_label(labels, lambda x: x if x == ZERO else self._root(x)).long()

    def reason(self, label: int) -> str | None:
        """Why a label is pinned; None where it is free."""
        return None if label == ZERO else self._reason.get(self._root(label))

    def _by_label(self, labels: Tensor, of: Callable[[int], int | bool]) -> Tensor:
        values, where = compact(labels).unique(return_inverse=True)
        return torch.tensor([of(x) for x in values.tolist()])[where].expand(labels.shape)

    def _union(self, x: int, y: int, why: str) -> None:
        if x == y:
            return
        if FIXED in (x, y):
            self._reason.setdefault(max(x, y), why)
            return
        low, high = min(x, y), max(x, y)
        self._parent[high] = low
        if high in self._reason:
            self._reason.setdefault(low, self._reason.pop(high))

    def _root(self, x: int) -> int:
        while self._parent[x] != x:
            self._parent[x] = x = self._parent[self._parent[x]]
        return x


def compact(labels: Tensor) -> Tensor:
    """The labels without axes along which they were only expanded."""
    for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if stride == 0 and size > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def _distinct(a: Tensor, b: Tensor) -> list[tuple[int, int]]:
    pairs = torch.stack([a.reshape(-1), b.reshape(-1)], 1)
    return [(x, y) for x, y in pairs.unique(dim=0).tolist() if x != y]
