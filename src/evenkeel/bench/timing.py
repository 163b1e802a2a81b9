"""Timing things against each other on a machine that is not quiet."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evenkeel.errors import ConfigError

BLOCK_S = 0.1
"""Seconds that a block of calls takes."""


@dataclass(frozen=True)
class Timing:
    """Of one candidate.

    Attributes:
        median_ms: of the blocks' means per call.
        low_ms: their lower quartile.
        high_ms: their upper quartile.
        ratio: median over rounds of its block to the first candidate's in the same round.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "median_ms": self.median_ms,
            "quartiles_ms": [self.low_ms, self.high_ms],
            "ratio": self.ratio,
        }


def compare(candidates: Sequence[Callable[[], object]], rounds: int = 9) -> list[Timing]:
    """Run candidates in alternating blocks; the first is what the others are compared with.

    A machine's speed drifts, so a ratio is taken within a round, in which blocks lie side by side.
    """
    if rounds < 1:
        raise ConfigError(f"rounds must be 1 or more; got {rounds!r}.")
    calls = [_calls_in_a_block(run) for run in candidates]
    blocks: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds):
        for k, run in enumerate(candidates):
            run()  # what the one before has left in the caches is not its fault
            blocks[k].append(_seconds(run, calls[k]) / calls[k] * 1e3)
    return [
        Timing(
            statistics.median(times),
            *_quartiles(times),
            statistics.median(a / b for a, b in zip(times, blocks[0], strict=True)),
        )
        for times in blocks
    ]


def _calls_in_a_block(run: Callable[[], object]) -> int:
    for _ in range(3):
        run()
    return max(1, round(BLOCK_S / max(_seconds(run, 3) / 3, 1e-6)))


def _seconds(run: Callable[[], object], calls: int) -> float:
    _wait()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quartiles(times: list[float]) -> tuple[float, float]:
    if len(times) == 1:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high
