"""Few-shot episodes: some classes, a few examples of each to write, others to ask about."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.draws import Draws
from evenkeel.errors import ConfigError


@dataclass(frozen=True)
class Episode:
    """Which samples, by their index.

    Attributes:
        support: (ways * shots,), class by class.
        support_labels: their class, from 0 to ways - 1.
        queries: (ways * queries,), class by class; none of them is in ``support``.
        query_labels: their class.
        classes: the labels that 0, 1, ... stand for.
    """

    support: Tensor
    support_labels: Tensor
    queries: Tensor
    query_labels: Tensor
    classes: tuple[Hashable, ...]


class EpisodeSampler:
    """Episodes of m classes with n examples each, by number.

    Episode k is the same whatever has been drawn before, on any machine; the global generator does
    not move.

    Args:
        labels: of all samples: integers, or anything that can be a key.
        ways: classes of an episode, m.
        shots: examples of each that are written, n.
        queries: further examples of each that are asked about.
        episodes: how many there are.
        seed: another seed, other episodes.

    Raises:
        ConfigError: more ways than classes, or a class with too few samples.

    Examples:
        >>> sampler = EpisodeSampler([0, 0, 0, 1, 1, 1, 2, 2, 2], ways=2, shots=1, queries=2)
        >>> episode = sampler[0]
        >>> len(episode.support), episode.query_labels.tolist(), len(sampler)
        (2, [0, 0, 1, 1], 1000)
    """

    def __init__(
        self,
        labels: Sequence[Hashable] | Tensor,
        ways: int,
        shots: int,
        queries: int,
        *,
        episodes: int = 1000,
        seed: int = 0,
    ) -> None:
        numbers = {"ways": ways, "shots": shots, "queries": queries, "episodes": episodes}
        for name, number in numbers.items():
            if number < 1:
                raise ConfigError(f"{name} must be 1 or more; got {number!r}.")
        given = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        counts = Counter(given)
        if len(counts) < ways:
            raise ConfigError(
                f"An episode of {ways} ways needs as many classes; the samples have {len(counts)}. "
                f"Use fewer ways, or another split."
            )
        short = {label: n for label, n in counts.items() if n < shots + queries}
        if short:
            label, n = min(short.items(), key=lambda item: item[1])
            raise ConfigError(
                f"Each class needs {shots} shots and {queries} queries, {shots + queries} samples; "
                f"{len(short)} of {len(counts)} have fewer, {label!r} has {n}. Use fewer, or leave "
                f"these classes out."
            )
        self.ways, self.shots, self.queries = ways, shots, queries
        self.episodes, self.seed = episodes, seed
        self._members: dict[Hashable, list[int]] = {label: [] for label in counts}
        for i, label in enumerate(given):
            self._members[label].append(i)
        self._classes = list(self._members)

    def __len__(self) -> int:
        return self.episodes

    def __iter__(self) -> Iterator[Episode]:
        return (self[k] for k in range(self.episodes))

    def __getitem__(self, number: int) -> Episode:
        if not 0 <= number < self.episodes:
            raise IndexError(f"There are episodes 0 to {self.episodes - 1}; got {number}.")
        generator = Draws(self.seed, "episode").generator(str(number))
        each = self.shots + self.queries
        chosen = generator.choice(len(self._classes), self.ways, replace=False).tolist()
        classes = [self._classes[c] for c in chosen]
        rows = []
        for label in classes:
            members = self._members[label]
            drawn = generator.choice(len(members), each, replace=False).tolist()
            rows.append([members[i] for i in drawn])
        numbers, samples = torch.arange(self.ways), torch.tensor(rows)
        return Episode(
            samples[:, : self.shots].flatten(),
            numbers.repeat_interleave(self.shots),
            samples[:, self.shots :].flatten(),
            numbers.repeat_interleave(self.queries),
            tuple(classes),
        )
