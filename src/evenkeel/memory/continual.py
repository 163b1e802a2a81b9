"""Learning one class after the other: what the memory still knows, and what it has just learnt."""

from typing import Any

import torch
from torch import Tensor

from evenkeel.memory.crossbar import CrossbarMemory
from evenkeel.memory.episodes import EpisodeSampler
from evenkeel.memory.evaluation import MOST, Question
from evenkeel.memory.recall import Accuracy


@torch.no_grad()
def learn_one_by_one(
    vectors: Tensor,
    labels: Tensor,
    question: Question,
    *,
    every_s: float = 0.0,
    runs: int = 10,
    seed: int = 0,
    progress: Any = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Write ``question.ways`` classes one after the other; ask about all after each.

    Args:
        vectors: of all samples, (N, d).
        labels: their classes, (N,).
        question: the memory; of a crossbar the age of a column runs from its own write.
        every_s: seconds from one class to the next, where the device ages.
        runs: other classes, in another order, on another crossbar.
        seed: of the runs.
        progress: called with runs done and runs in all.

    Returns:
        For each number of classes the accuracy on the old ones, on the new one and on all, in
        percent, each with its 95 % interval over runs. At first there are no old ones.
    """
    queries = max(1, min(MOST, int(torch.bincount(labels).min()) - question.shots))
    sampler = EpisodeSampler(
        labels, question.ways, question.shots, queries, episodes=runs, seed=seed
    )
    right = []  # (runs, classes written, classes asked about), NaN where not written yet
    for number, episode in enumerate(sampler):
        memory = question.memory(vectors.shape[1], seed + number)
        keys = vectors[episode.support].unflatten(0, (question.ways, question.shots))
        asked = vectors[episode.queries].unflatten(0, (question.ways, queries))
        table = torch.full((question.ways, question.ways), torch.nan)
        for c in range(question.ways):
            if isinstance(memory, CrossbarMemory) and c and every_s:
                memory.age_(c * every_s)
            memory.write(keys[c], [c] * question.shots)
            if isinstance(memory, CrossbarMemory) and c and every_s:
                memory.compensate_()
            best = memory.read(asked[: c + 1]).best
            table[c, : c + 1] = (best == torch.arange(c + 1)[:, None]).float().mean(1)
        right.append(table)
        progress(number + 1, runs)
    found = torch.stack(right)
    rows = []
    for c in range(question.ways):
        row: dict[str, Any] = {"classes": c + 1}
        parts = {"old": found[:, c, :c], "new": found[:, c, c : c + 1], "all": found[:, c, : c + 1]}
        for name, part in parts.items():
            if part.shape[1]:
                accuracy = Accuracy.of(part.mean(1))
                row[name], row[f"{name}_half_width"] = accuracy.mean, accuracy.half_width
        rows.append(row)
    return rows
