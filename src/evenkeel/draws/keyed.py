"""Random streams that are found by name instead of by the order in which they are drawn.

A chip must be the same chip whatever remedy meets it, however many layers were drawn before, and on
however many threads. A shared generator cannot give that: one draw more, and all that follows has
changed. Here every tensor of random numbers has a key, and the key alone decides it.

The stream is numpy's SFC64, seeded with a 128-bit hash of the key. torch's CPU generator will not
do: it keeps 32 bits of its seed, so that among the 10^5 keys of a usual audit two would more likely
than not share their numbers.
"""

import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evenkeel.errors import ConfigError

Block = tuple[int, Sequence[tuple[int, int, int]]]


def digest(*key: str | int) -> int:
    """128 bits that stand for a key; equal keys only give equal bits."""
    text = json.dumps([k if isinstance(k, str) else operator.index(k) for k in key]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


@dataclass(frozen=True)
class Draws:
    """The random numbers of one part of one chip.

    Args:
        seed: the chip's seed, any integer.
        name: the part, usually a layer's path in its network.

    Examples:
        >>> draws = Draws(seed=0, name="conv1")
        >>> first = draws.normal("programming", (2, 3))
        >>> _ = draws.normal("drift", (5,))  # another stream: it does not disturb the first
        >>> bool((draws.normal("programming", (2, 3)) == first).all())
        True
    """

    seed: int
    name: str

    def generator(self, component: str) -> "np.random.Generator":  # not imported before it is used
        """The numpy generator at the start of a component's stream."""
        entropy = digest(self.seed, self.name, component)
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(entropy)))

    def normal(
        self, component: str, shape: tuple[int, ...], *, device: torch.device | None = None
    ) -> Tensor:
        """Standard normal numbers, float32, drawn on the CPU and moved to ``device``."""
        values = self.generator(component).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(values).to(device)

    def uniform(
        self, component: str, shape: tuple[int, ...], *, device: torch.device | None = None
    ) -> Tensor:
        """Numbers uniform in [0, 1), float32, drawn on the CPU and moved to ``device``."""
        values = self.generator(component).random(shape, dtype=np.float32)
        return torch.from_numpy(values).to(device)


class InTurn(Draws):
    """The numbers of many parts in blocks, of which each call for a component gives the next.

    They are those that each part gives alone, from its first on.

    Args:
        parts: whose numbers.
        blocks: of each its size, and what lies in it: a part's index, where, and how many of its
            next numbers. Between them are zeros.
    """

    __slots__ = ("blocks", "parts", "streams")

    def __init__(self, parts: Sequence[Draws], blocks: Sequence[Block]) -> None:
        self.parts, self.blocks = parts, blocks
        self.streams: dict[tuple[str, str], Iterator[Tensor]] = {}

    def generator(self, component: str) -> "np.random.Generator":
        """None: it would begin anew with each block."""
        raise ConfigError(
            f"An elementwise effect draws with draws.normal and draws.uniform; got a call of "
            f"draws.generator({component!r}). Use those, or set elementwise = False."
        )

    def normal(
        self, component: str, shape: tuple[int, ...], *, device: torch.device | None = None
    ) -> Tensor:
        """The next standard normal numbers."""
        return self._next("standard_normal", component).view(shape).to(device)

    def uniform(
        self, component: str, shape: tuple[int, ...], *, device: torch.device | None = None
    ) -> Tensor:
        """The next uniform numbers."""
        return self._next("random", component).view(shape).to(device)

    def _next(self, law: str, component: str) -> Tensor:
        if (law, component) not in self.streams:
            self.streams[law, component] = self._stream(law, component)
        return next(self.streams[law, component])

    def _stream(self, law: str, component: str) -> "Iterator[Tensor]":
        draw: dict[int, Callable[..., object]] = {}  # each part's law, while its numbers last
        for size, pieces in self.blocks:
            values = np.zeros(size, np.float32)
            for part, at, number in pieces:
                if part not in draw:
                    draw = {part: getattr(self.parts[part].generator(component), law)}
                draw[part](out=values[at : at + number], dtype=np.float32)
            yield torch.from_numpy(values)
