"""``evenkeel fewshot train``."""

import functools
import json
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from evenkeel.cli.labelled import labelled_from
from evenkeel.cli.network import made_by
from evenkeel.cli.progress import progress_bar
from evenkeel.errors import ConfigError, nearest
from evenkeel.files import require_weights_file, write_atomically
from evenkeel.models import build
from evenkeel.provenance import environment
from evenkeel.saving import save

VALIDATION_EPISODES = 250
VALIDATION_SEED = 1
"""Another than the training's, so that no episode is the same."""


def train(
    *,
    out: Path,
    data: str = "omniglot",
    data_root: Path | None = None,
    split: Literal["official", "vinyals"] = "official",
    size: int = 32,
    ink: bool = False,
    encoder: str = "hd_controller",
    objective: str = "softabs",
    ways: int = 20,
    shots: int = 5,
    queries: int = 2,
    episodes: int = 10_000,
    learning_rate: float = 1e-3,
    support_gradients: bool | None = None,
    turned: bool = True,
    every: int = 500,
    channels: int = 128,
    dim: int = 512,
    seed: int = 0,
    precision: str = "32-true",
) -> None:
    """Train a controller by episodes; killed, the same command goes on after the last validation.

    What is kept is the network of the best validation, on classes that training does not see; the
    test classes are not looked at.

    Parameters
    ----------
    out
        Safetensors file for the controller, in half precision; its log is written beside it, as
        .json.
    data
        omniglot, or a folder with train/ and validation/, of images in one folder for each class.
    data_root
        Where published sets lie; default $EVENKEEL_DATA.
    split
        Of Omniglot: official (background and evaluation) or vinyals.
    size
        Images are resized to this.
    ink
        Your images are dark ink on white paper: make ink 1 and paper 0, as for Omniglot.
    encoder
        hd_controller, the published one; or module:factory of your own, which gives a vector for
        each image.
    objective
        softabs: the memory's attention, as published. softmax: the control. prototypes: those of
        Snell et al.
    ways
        Classes of an episode.
    shots
        Written examples of each.
    queries
        Further examples of each, which are asked about.
    episodes
        One step each.
    learning_rate
        Peak of Adam's one cycle.
    support_gradients
        Let gradients flow through the supports as well; default as published: for prototypes, and
        not for attention.
    turned
        Take each class turned by 90, 180 and 270 degrees for three further classes.
    every
        Episodes from one validation to the next.
    channels
        Of the published controller's convolutions.
    dim
        Of its vectors.
    seed
        Of initialisation, episodes and augmentation.
    precision
        As lightning-fabric names it: 32-true, or bf16-mixed where the machine has instructions.
    """
    settings = {k: v for k, v in locals().items() if k not in ("out", "data_root")}
    from evenkeel.memory import OBJECTIVES, EpisodeSampler
    from evenkeel.memory.recall import accuracies, embed, recall_by
    from evenkeel.train import drawn_anew, fit_episodes, launched

    if objective not in OBJECTIVES:
        raise ConfigError(f"Unknown objective {objective!r}. {nearest(objective, OBJECTIVES)}")
    require_weights_file(out)
    console = Console()
    log_path, checkpoint = out.with_suffix(".json"), out.with_suffix(".checkpoint")
    log: list[dict[str, Any]] = []
    facts: dict[str, Any] = {
        "command": shlex.join(["evenkeel", *sys.argv[1:]]),
        "settings": settings,
        "environment": environment(),
        "validations": log,
    }
    with progress_bar(console) as bar:
        samples, held_out = (
            labelled_from(data, part, root=data_root, split=split, size=size, ink=ink, bar=bar)
            for part in ("train", "validation")
        )
        samples = samples.turned() if turned else samples
        task = (ways, shots, queries)
        sampler = EpisodeSampler(samples.labels, *task, episodes=episodes, seed=seed)
        asked = EpisodeSampler(
            held_out.labels, *task, episodes=VALIDATION_EPISODES, seed=VALIDATION_SEED
        )
        fabric = launched(precision, who="evenkeel fewshot train", devices=1)
        job = bar.add_task("episodes", total=episodes)

        def note(validation: dict[str, Any]) -> None:
            log.append(validation)
            write_atomically(log_path, json.dumps(facts, indent=1).encode())
            bar.console.print(
                f"episode {validation['episode']:,}: loss {validation['loss']:.4f}, validation "
                f"{validation['validation']:.2f} %, {validation['seconds']:.0f} s",
                highlight=False,
            )

        def validate(network: nn.Module) -> float:
            with fabric.autocast():
                vectors = embed(network, held_out.images).float()
            return 100 * float(accuracies(vectors, asked, recall_by(objective)).mean())

        def make() -> nn.Module:
            if encoder != "hd_controller":
                return made_by(encoder)
            options = {"dim": dim, "channels": channels, "in_channels": samples.channels}
            return _laid_out(build(encoder, **options), torch.channels_last)

        network = fit_episodes(
            make,
            samples.images,
            sampler,
            OBJECTIVES[objective],
            learning_rate=learning_rate,
            augment=functools.partial(drawn_anew, beyond="zeros" if samples.ink else "border"),
            support_gradients=(
                objective == "prototypes" if support_gradients is None else support_gradients
            ),
            seed=seed,
            validate=validate,
            every=every,
            fabric=fabric,
            checkpoint=checkpoint,
            identity=settings,
            on_step=lambda done, total: bar.update(job, completed=done, total=total),
            on_validation=note,
        )
    best = max(row["validation"] for row in log)
    halved = _laid_out(network.cpu(), torch.contiguous_format).half()
    save(halved, out, objective=objective, validation=best, data=data, split=split)
    facts["parameters"] = sum(p.numel() for p in network.parameters())
    write_atomically(log_path, json.dumps(facts, indent=1).encode())
    checkpoint.unlink(missing_ok=True)
    console.print(
        f"{out}: {facts['parameters']:,} parameters in half precision; {ways}-way {shots}-shot on "
        f"{len(held_out.classes)} classes held out: {best:.2f} %.",
        highlight=False,
    )


def _laid_out(network: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Channels last is the faster to train."""
    return network.to(memory_format=memory_format)  # type: ignore[call-overload,no-any-return]
