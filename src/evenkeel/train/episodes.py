"""Training by few-shot episodes, resumable after a kill."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError
from evenkeel.train import checkpoint as checkpoints
from evenkeel.train.loop import one_cycle

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class EpisodeLike(Protocol):
    """Which samples an episode is of, and their classes; as of ``evenkeel.memory.Episode``."""

    @property
    def support(self) -> Tensor:
        """Indices of the samples that are written."""

    @property
    def support_labels(self) -> Tensor:
        """Their classes, numbered from 0."""

    @property
    def queries(self) -> Tensor:
        """Indices of the samples that are asked about."""

    @property
    def query_labels(self) -> Tensor:
        """Their classes."""


class Episodes(Protocol):
    """Episodes by their number."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> EpisodeLike: ...


Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fit_episodes(
    make_encoder: Callable[[], nn.Module],
    images: Tensor,
    episodes: Episodes,
    objective: Objective,
    *,
    learning_rate: float = 1e-4,
    augment: Callable[[Tensor], Tensor] = lambda x: x,
    support_gradients: bool = False,
    seed: int = 0,
    validate: Callable[[nn.Module], float],
    every: int = 500,
    fabric: "Fabric",
    checkpoint: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_validation: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> nn.Module:
    """Train an encoder with Adam and one cycle; the global generator is put back.

    Args:
        make_encoder: builds the network; called under the seed.
        images: (N, ...).
        episodes: one for each step, found by its number.
        objective: from the vectors and classes of supports, then of queries, to the loss.
        learning_rate: peak of the cycle.
        augment: changes a batch of images.
        support_gradients: whether gradients also flow through the supports; by default these are
            embedded in eval mode and without, at half the cost of a query. An encoder whose two
            modes differ, as by batch norm, should have them.
        seed: of the initialisation and the augmentation.
        validate: from the network in eval mode to a figure; higher is better.
        every: episodes from one validation to the next; the last is followed by one too.
        fabric: a launched lightning-fabric ``Fabric``, for its device and precision.
        checkpoint: file to go on from, written at every validation. A run that was killed ends as
            one that was not.
        identity: what makes this run another than others; a checkpoint of another is refused.
        on_step: called with episodes done and episodes in all.
        on_validation: called with an episode's number, the mean loss since the last validation,
            the figure and seconds; where a run goes on, also for those behind it.

    Returns:
        The network as it was at its best validation, in eval mode.
    """
    if every < 1 or learning_rate <= 0:
        raise ConfigError(
            f"every must be 1 or more and learning_rate above 0; got {every!r} and "
            f"{learning_rate!r}."
        )
    identity = {
        **(identity or {}),
        "samples": len(images),
        "steps": len(episodes),
        "peak": learning_rate,
        "seed": seed,
        "validated_every": every,
        "gradients_of_supports": support_gradients,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = make_encoder()
        optimizer = torch.optim.Adam(encoder.parameters(), lr=learning_rate)
        schedule = one_cycle(optimizer, len(episodes))
        parts: dict[str, Any] = {"model": encoder, "optimizer": optimizer, "schedule": schedule}
        state = checkpoints.restore(checkpoint, identity) if checkpoint else None
        history: list[dict[str, Any]] = state["history"] if state else []
        best: dict[str, Tensor] = state["best"] if state else {}
        for name, part in parts.items():
            if state:
                part.load_state_dict(state[name])
        for facts in history:
            on_validation(facts)
        network, stepper = fabric.setup(encoder, optimizer)
        losses: list[Tensor] = []
        started = time.perf_counter()
        for number in range(history[-1]["episode"] if history else 0, len(episodes)):
            loss = _loss(network, images, episodes[number], objective, augment, support_gradients)
            stepper.zero_grad(set_to_none=True)
            fabric.backward(loss)
            stepper.step()
            schedule.step()
            losses.append(loss.detach())
            on_step(number + 1, len(episodes))
            if (number + 1) % every and number + 1 < len(episodes):
                continue
            figure = validate(encoder.eval())
            before = [f["validation"] for f in history if math.isfinite(f["validation"])]
            if not best or (math.isfinite(figure) and figure >= max(before, default=figure)):
                best = {k: v.detach().cpu().clone() for k, v in encoder.state_dict().items()}
            history.append(
                {
                    "episode": number + 1,
                    "loss": float(torch.stack(losses).mean()),
                    "validation": figure,
                    "seconds": time.perf_counter() - started,
                }
            )
            losses, started = [], time.perf_counter()
            if checkpoint is not None:
                kept = {name: part.state_dict() for name, part in parts.items()}
                kept |= {"history": history, "best": best}
                checkpoints.store(checkpoint, identity, kept)
            on_validation(history[-1])
    encoder.load_state_dict(best)
    return encoder.eval()


def _loss(
    network: nn.Module,
    images: Tensor,
    episode: EpisodeLike,
    objective: Objective,
    augment: Callable[[Tensor], Tensor],
    support_gradients: bool,
) -> Tensor:
    device = next(network.parameters()).device
    supports = augment(images[episode.support]).to(device)
    queries = augment(images[episode.queries]).to(device)
    with torch.set_grad_enabled(support_gradients):
        keys = network.train(support_gradients)(supports)
    vectors = network.train()(queries)
    owners, labels = (t.to(device) for t in (episode.support_labels, episode.query_labels))
    return objective(keys, owners, vectors, labels)
