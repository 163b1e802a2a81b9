"""Random streams that are found by name instead of by the order in which they are drawn.

A chip must be the same chip whatever remedy meets it, however many layers were drawn before, and on
however many threads. A shared generator cannot give that: one draw more, and all that follows has
changed. Here every tensor of random numbers has a key, and the key alone decides it.

The stream is numpy's SFC64, seeded with a 128-bit hash of the key. torch's CPU generator will not
do: it keeps 32 bits of its seed, so that among the 10^5 keys of a usual audit two would more likely
than not share their numbers.
"""

import contextlib
import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def digest(*key: str | int) -> int:
    """128 bits that stand for a key; equal keys only give equal bits."""
    text = json.dumps([k if isinstance(k, str) else operator.index(k) for k in key]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


@dataclass(frozen=True, slots=True)
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

    @contextlib.contextmanager
    def in_turn(self, sizes: Sequence[int]) -> "Iterator[Draws]":
        """The same numbers in blocks of these sizes, one after the other; a thread draws ahead."""
        with ThreadPoolExecutor(1, "draws") as pool:
            yield _InTurn(self.seed, self.name, pool, tuple(sizes), {})


@dataclass(frozen=True, slots=True)
class _InTurn(Draws):
    """Each call for a component gives its next block."""

    pool: ThreadPoolExecutor
    sizes: tuple[int, ...]
    streams: "dict[tuple[str, str], Iterator[np.ndarray]]"

    def normal(
        self, component: str, shape: tuple[int, ...], *, device: torch.device | None = None
    ) -> Tensor:
        """The next standard normal numbers."""
        return self._next("standard_normal", component, shape).to(device)

    def uniform(
        self, component: str, shape: tuple[int, ...], *, device: torch.device | None = None
    ) -> Tensor:
        """The next uniform numbers."""
        return self._next("random", component, shape).to(device)

    def _next(self, law: str, component: str, shape: tuple[int, ...]) -> Tensor:
        if (law, component) not in self.streams:
            self.streams[law, component] = self._ahead(law, component)
        return torch.from_numpy(next(self.streams[law, component])).view(shape)

    def _ahead(self, law: str, component: str) -> "Iterator[np.ndarray]":
        draw = getattr(self.generator(component), law)
        coming = self.pool.submit(draw, self.sizes[0], np.float32)
        for size in self.sizes[1:]:
            block, coming = coming.result(), self.pool.submit(draw, size, np.float32)
            yield block
        yield coming.result()
