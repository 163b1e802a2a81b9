"""``evenkeel train``."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from evenkeel import data as datasets
from evenkeel.audit.run import evaluate
from evenkeel.cli.progress import progress_bar
from evenkeel.files import require_weights_file, write_atomically
from evenkeel.models import build
from evenkeel.provenance import environment
from evenkeel.saving import save
from evenkeel.studies.teaching import TEACHING
from evenkeel.train import Recipe, crop_and_flip, fit, launched, recipe


def train(
    name: str,
    /,
    *,
    out: Path,
    data_root: Path | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    norm: str | None = None,
    normalization_batch: int | None = None,
    weight_standard: bool | None = None,
    seed: int | None = None,
    precision: str | None = None,
) -> None:
    """Train a reference network by a recipe; killed, the same command goes on after the last epoch.

    The test samples are looked at once, at the end. On many devices, start it by torchrun.

    Parameters
    ----------
    name
        Of the recipe: digits, cifar10, cifar10_group (norm), cifar10_none (no norm), nuclei (a
        U-Net) or bccd (a detector of blood cells).
    out
        Safetensors file for the network; its log is written beside it, as .json.
    data_root
        Where published sets lie; default $EVENKEEL_DATA.
    epochs
        Another number of passes than the recipe's.
    batch_size
        Another number of samples per step than the recipe's.
    learning_rate
        Another peak than the recipe's; it wants to fall with the batch size.
    norm
        Another normalizer than the recipe's: batch, group, layer, batch_channel,
        batch_channel_running (for batches of one or two), batch_kalman or none.
    normalization_batch
        Normalize so many samples together, within a larger batch.
    weight_standard
        Standardize the convolutions' weights.
    seed
        Another seed than the recipe's.
    precision
        Another than the recipe's: 32-true, or bf16-mixed where the machine has instructions for it.
    """
    asked = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "norm": norm,
        "normalization_batch": normalization_batch,
        "weight_standard": weight_standard,
        "seed": seed,
        "precision": precision,
    }
    changed = {option: value for option, value in asked.items() if value is not None}
    chosen = dataclasses.replace(recipe(name), **changed)  # type: ignore[arg-type]
    require_weights_file(out)
    samples, (x, y) = _data(chosen.data, data_root)
    taught = TEACHING[chosen.task]
    fabric = launched(chosen.precision, who="evenkeel train")
    console = Console(quiet=fabric.global_rank > 0)
    log_path, checkpoint = out.with_suffix(".json"), out.with_suffix(".checkpoint")
    log: list[dict[str, Any]] = []
    facts: dict[str, Any] = {
        "command": shlex.join(["evenkeel", *sys.argv[1:]]),
        "recipe": dataclasses.asdict(chosen),
        "environment": environment(),
        "epochs": log,
    }
    with progress_bar(console) as bar:
        job = bar.add_task("training", total=None)

        def note(epoch: dict[str, Any]) -> None:
            log.append(epoch)
            if fabric.global_rank == 0:
                write_atomically(log_path, json.dumps(facts, indent=1).encode())
            bar.console.print(
                f"epoch {epoch['epoch']}: loss {epoch['loss']:.4f}, {epoch['seconds']:.0f} s",
                highlight=False,
            )

        network = fit(
            lambda: _laid_out(_network(chosen), torch.channels_last),
            x,
            y,
            epochs=chosen.epochs,
            batch_size=chosen.batch_size,
            learning_rate=chosen.learning_rate,
            augment=crop_and_flip if chosen.augment else lambda x: x,
            vary=taught.vary,
            loss=taught.loss,
            seed=chosen.seed,
            fabric=fabric,
            checkpoint=checkpoint,
            identity=dataclasses.asdict(chosen),
            on_step=lambda done, total: bar.update(job, completed=done, total=total),
            on_epoch=note,
        )
    if fabric.global_rank > 0:
        return
    network = _laid_out(network.cpu(), torch.contiguous_format)
    sums = evaluate(network, samples, taught.task)
    figure = taught.task.value(sums)
    measure = f"test_{taught.task.metric.replace(' ', '_')}"
    facts[measure] = figure
    if hasattr(taught.task, "figures"):
        facts["figures"] = taught.task.figures(sums, samples.classes)
    facts["test_samples"] = samples.test_samples
    facts["parameters"] = sum(p.numel() for p in network.parameters())
    save(network, out, recipe=name, **{measure: figure})
    write_atomically(log_path, json.dumps(facts, indent=1).encode())
    checkpoint.unlink(missing_ok=True)
    console.print(
        f"{out}: {facts['parameters']:,} parameters, test {taught.task.metric} "
        f"{figure:.2f} % on {facts['test_samples']} samples.",
        highlight=False,
    )


def _network(chosen: Recipe) -> nn.Module:
    options: dict[str, Any] = {"norm": chosen.norm}
    if chosen.normalization_batch is not None:
        options["normalization_batch"] = chosen.normalization_batch
    if chosen.weight_standard:
        options["weight_standard"] = True
    return build(chosen.architecture, **options)


def _laid_out(network: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Convolutions follow the layout of their weights; channels last is the faster to train."""
    return network.to(memory_format=memory_format)  # type: ignore[call-overload,no-any-return]


def _data(name: str, root: Path | None) -> tuple[datasets.Data, tuple[Tensor, Tensor]]:
    if name == "digits":
        samples = datasets.digits()
        assert samples.train is not None
        return samples, samples.train
    return datasets.read_set(name, root), datasets.read_training_set(name, root)
