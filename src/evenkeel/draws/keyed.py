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
import math
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evenkeel.errors import ConfigError

Block = tuple[int, Sequence[tuple[int, int, int]]]
Streams = dict[tuple[str, str, int], Iterator[tuple[int, Tensor]]]
ALONE = "With elementwise = False an effect is given one array at a time."


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


def in_turn(parts: Sequence[Draws], blocks: Sequence[Block]) -> "Iterator[Draws]":
    """The numbers of many parts block by block: those that each part gives alone.

    Args:
        parts: whose numbers.
        blocks: of each its size, and what lies in it: a part's index, where, and how many of its
            next numbers. Between them are zeros.
    """
    streams: Streams = {}
    for index in range(len(blocks)):
        yield _Block(parts, blocks, streams, index)


class _Block(Draws):
    """Of one block. A component that is asked for again is drawn again: it gives the same."""

    def __init__(
        self, parts: Sequence[Draws], blocks: Sequence[Block], streams: "Streams", index: int
    ) -> None:
        self.parts, self.blocks, self.streams, self.index = parts, blocks, streams, index
        self.asked: Counter[tuple[str, str]] = Counter()

    __repr__ = object.__repr__

    @property
    def seed(self) -> int:
        """None: there may be several."""
        raise ConfigError(f"Several arrays lie in one block, so it has no seed. {ALONE}")

    @property
    def name(self) -> str:
        """None: there may be several."""
        raise ConfigError(f"Several arrays lie in one block, so it has no name. {ALONE}")

    def generator(self, component: str) -> "np.random.Generator":
        """None: it would begin anew with each block."""
        raise ConfigError(
            f"An elementwise effect draws with draws.normal and draws.uniform; got a call of "
            f"draws.generator({component!r}). {ALONE}"
        )

    def normal(
        self, component: str, shape: tuple[int, ...], *, device: torch.device | None = None
    ) -> Tensor:
        """Of all parts."""
        return self._next("standard_normal", component, shape).to(device)

    def uniform(
        self, component: str, shape: tuple[int, ...], *, device: torch.device | None = None
    ) -> Tensor:
        """Of all parts."""
        return self._next("random", component, shape).to(device)

    def _next(self, law: str, component: str, shape: tuple[int, ...]) -> Tensor:
        size, _ = self.blocks[self.index]
        if math.prod(shape) != size:
            raise ConfigError(
                f"An elementwise effect draws a number for each device, so {component!r} must have "
                f"the shape of g, of {size} devices; got {tuple(shape)}. {ALONE}"
            )
        stream = law, component, self.asked[law, component]
        self.asked[law, component] += 1
        if stream not in self.streams:
            self.streams[stream] = enumerate(self._stream(law, component))
        # Blocks before may have had no use for it.
        return next(values for k, values in self.streams[stream] if k == self.index).view(shape)

    def _stream(self, law: str, component: str) -> "Iterator[Tensor]":
        draw: dict[int, Callable[..., object]] = {}  # each part's law, while its numbers last
        for size, pieces in self.blocks:
            values = np.zeros(size, np.float32)
            for part, at, number in pieces:
                if part not in draw:
                    draw = {part: getattr(self.parts[part].generator(component), law)}
                draw[part](out=values[at : at + number], dtype=np.float32)
            yield torch.from_numpy(values)


class Apart(Draws):
    """Another's numbers, but others for components that are taken."""

    def __init__(self, draws: Draws, taken: Collection[str], who: str) -> None:
        self.draws, self.taken, self.who = draws, taken, who
        self.used: set[str] = set()

    __repr__ = object.__repr__

    @property
    def seed(self) -> int:
        """The other's."""
        return self.draws.seed

    @property
    def name(self) -> str:
        """The other's."""
        return self.draws.name

    def generator(self, component: str) -> "np.random.Generator":
        """Of that component."""
        return self.draws.generator(self._own(component))

    def normal(
        self, component: str, shape: tuple[int, ...], *, device: torch.device | None = None
    ) -> Tensor:
        """Of that component."""
        return self.draws.normal(self._own(component), shape, device=device)

    def uniform(
        self, component: str, shape: tuple[int, ...], *, device: torch.device | None = None
    ) -> Tensor:
        """Of that component."""
        return self.draws.uniform(self._own(component), shape, device=device)

    def _own(self, component: str) -> str:
        self.used.add(component)
        return f"{component} of {self.who}" if component in self.taken else component
