"""Tasks by codes by devices: the accuracy of a memory over many episodes, on several processes."""

import functools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from evenkeel.analog import Converter, Device
from evenkeel.memory.crossbar import CrossbarMemory
from evenkeel.memory.episodes import Episode, EpisodeSampler
from evenkeel.memory.key_value import KeyValueMemory
from evenkeel.memory.recall import Accuracy, by_prototypes

ASKED, MOST = 100, 15
"""Queries of an episode; and at most of each class."""
CHUNK = 25
"""Episodes that a process takes at once, with all questions of a task."""


@dataclass(frozen=True)
class Question:
    """A task, and the memory that it is put to.

    Attributes:
        ways: classes of an episode, m.
        shots: supports of each, n.
        code: one of :data:`evenkeel.memory.CODES`; or "prototypes", the nearest mean of a class.
        device: of the crossbar; None for software. Each episode has a crossbar of its own.
        ages: in seconds, ascending.
        compensate: at ages above 0, see :meth:`CrossbarMemory.compensate_`.
        converter: of the crossbar.
        options: further ones of :class:`KeyValueMemory`.
    """

    ways: int
    shots: int
    code: str
    device: Device | None = None
    ages: tuple[float, ...] = (0.0,)
    compensate: bool = True
    converter: Converter | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def queries(self, samples: int) -> int:
        """Of each class, which has so many samples."""
        return max(1, min(MOST, ASKED // self.ways, samples - self.shots))

    @property
    def task(self) -> str:
        """As it is called."""
        return f"{self.ways}-way {self.shots}-shot"

    def memory(self, dim: int, seed: int) -> KeyValueMemory:
        """An empty one."""
        options = {"code": self.code, **dict(self.options)}
        if self.device is None:
            return KeyValueMemory(dim, **options)
        return CrossbarMemory(dim, self.device, seed=seed, converter=self.converter, **options)


def answers(
    vectors: Path,
    questions: Sequence[Question],
    *,
    episodes: int,
    seed: int,
    pool: Executor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Accuracy of each question at each of its ages, in percent, with its 95 % interval.

    Args:
        vectors: a safetensors file of "vectors" (N, d) and "labels" (N,).
        questions: what to measure.
        episodes: of each; of one task they are the same for all codes and devices.
        seed: of episodes and crossbars.
        pool: that has the file at hand.
        progress: called with chunks of episodes done, and chunks in all.
    """
    chunks = [range(k, min(k + CHUNK, episodes)) for k in range(0, episodes, CHUNK)]
    tasks = list(dict.fromkeys(question.task for question in questions))
    asked = {task: [q for q in questions if q.task == task] for task in tasks}
    futures = {
        pool.submit(shares_of, str(vectors), asked[task], chunk, seed): (task, chunk)
        for task in reversed(tasks)  # what takes longest is usually last, and should not end alone
        for chunk in chunks
    }
    shares: dict[tuple[str, range], list[Tensor]] = {}
    try:
        for future in as_completed(futures):
            shares[futures[future]] = future.result()
            progress(len(shares), len(futures))
    finally:
        for future in futures:
            future.cancel()
    found = {}
    for task in tasks:
        parts = zip(*(shares[task, chunk] for chunk in chunks), strict=True)
        found[task] = [torch.cat(of_question, 1) for of_question in parts]
    return [row for q in questions for row in rows_of(q, found[q.task].pop(0))]


def rows_of(question: Question, shares: Tensor) -> list[dict[str, Any]]:
    """Facts at each age, from shares of right answers (ages, episodes)."""
    rows = []
    for age_s, of_episodes in zip(question.ages, shares, strict=True):
        accuracy = Accuracy.of(of_episodes)
        rows.append(
            {
                "task": question.task,
                "code": question.code,
                "device": None if question.device is None else question.device.name,
                "age_s": age_s,
                "accuracy": accuracy.mean,
                "half_width": accuracy.half_width,
                "episodes": accuracy.episodes,
            }
        )
    return rows


@torch.no_grad()
def shares_of(
    vectors: str, questions: Sequence[Question], numbers: range, seed: int
) -> list[Tensor]:
    """Share of right answers to each question of one task, by age and episode."""
    x, _ = _read(vectors)
    sampler = _sampler(vectors, questions[0], seed)
    found: list[list[list[float]]] = [[] for _ in questions]
    for k in numbers:
        episode = sampler[k]
        keys, queries = x[episode.support], x[episode.queries]
        for shares, question in zip(found, questions, strict=True):
            shares.append(_answered(keys, queries, question, episode, seed + k))
    return [torch.tensor(shares, dtype=torch.float64).T for shares in found]


def _answered(
    keys: Tensor, queries: Tensor, question: Question, episode: Episode, seed: int
) -> list[float]:
    if question.code == "prototypes":
        found = by_prototypes(keys, episode.support_labels, queries)
        return [_right(found, episode)] * len(question.ages)
    memory = question.memory(keys.shape[1], seed)
    memory.write(keys, episode.support_labels)
    shares = []
    for age_s in question.ages:
        if age_s > 0 and isinstance(memory, CrossbarMemory):
            memory.age_(age_s)
            if question.compensate:
                memory.compensate_()
        shares.append(_right(memory.read(queries).best, episode))
    return shares


def _right(found: Tensor, episode: Episode) -> float:
    return float((found == episode.query_labels).double().mean())


@functools.lru_cache(maxsize=2)
def _sampler(vectors: str, of: Question, seed: int) -> EpisodeSampler:
    _, labels = _read(vectors)
    queries = of.queries(int(labels.unique(return_counts=True)[1].min()))
    return EpisodeSampler(labels, of.ways, of.shots, queries, episodes=sys.maxsize, seed=seed)


@functools.lru_cache(maxsize=2)
def _read(vectors: str) -> tuple[Tensor, Tensor]:
    tensors = load_file(vectors)
    return tensors["vectors"].float(), tensors["labels"]
