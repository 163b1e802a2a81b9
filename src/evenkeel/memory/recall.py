"""How well episodes are recalled: vectors once, then any number of episodes on them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evenkeel.memory.episodes import Episode
from evenkeel.memory.key_value import KeyValueMemory
from evenkeel.memory.objectives import to_prototypes

Recall = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From keys (n, d), their classes from 0 on, and queries (q, d) to each one's class, (q,)."""


@dataclass(frozen=True)
class Accuracy:
    """Mean over episodes, in percent.

    Attributes:
        mean: the accuracy.
        half_width: of the 95 % interval of the mean, by the normal law over episodes; None of one.
        episodes: how many.
    """

    mean: float
    half_width: float | None
    episodes: int

    @classmethod
    def of(cls, shares: Tensor) -> "Accuracy":
        """From the share of right answers of each episode."""
        percent = 100 * shares.double()
        half_width = None
        if len(percent) > 1:
            half_width = 1.96 * float(percent.std()) / math.sqrt(len(percent))
        return cls(float(percent.mean()), half_width, len(percent))

    def __str__(self) -> str:
        interval = "" if self.half_width is None else f" ± {self.half_width:.2f}"
        return f"{self.mean:.2f}{interval}"


@torch.no_grad()
def embed(
    encoder: nn.Module,
    images: Tensor,
    *,
    batch: int = 200,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Vectors (N, d) of images, on the CPU; each image is embedded once for all episodes."""
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    encoder.eval()
    vectors, done = [], 0
    for part in images.split(batch):
        vectors.append(encoder(part.to(device)).cpu())
        done += len(part)
        progress(done, len(images))
    return torch.cat(vectors)


@torch.no_grad()
def accuracies(vectors: Tensor, episodes: Iterable[Episode], recall: Recall) -> Tensor:
    """Share of right answers of each episode, (episodes,)."""
    shares = []
    for episode in episodes:
        keys, queries = vectors[episode.support], vectors[episode.queries]
        found = recall(keys, episode.support_labels, queries)
        shares.append((found == episode.query_labels).double().mean())
    return torch.stack(shares)


def by_prototypes(keys: Tensor, owners: Tensor, queries: Tensor) -> Tensor:
    """Recall by the nearest mean of a class, as prototypical networks do."""
    return to_prototypes(keys, owners, queries).argmin(1)


def recall_by(objective: str) -> Recall:
    """What a controller of that objective was trained for."""
    if objective == "prototypes":
        return by_prototypes

    def recall(keys: Tensor, owners: Tensor, queries: Tensor) -> Tensor:
        memory = KeyValueMemory(keys.shape[1], sharpening=objective)
        memory.write(keys, owners)
        return memory.read(queries).best

    return recall
