"""One network, trained in batches of some size, and measured."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import evenkeel as ek
from evenkeel.audit.run import evaluate
from evenkeel.models import build
from evenkeel.studies.frame import Facts, load_data, load_training_data
from evenkeel.studies.teaching import TEACHING
from evenkeel.train import fit, launched

FROZEN = "frozen batch"


class FrozenNorms(nn.Module):
    """A network whose batch norms keep their statistics, scales and shifts in training."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in self.norms:
            norm.requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenNorms":
        """As of any module, but for the norms."""
        super().train(mode)
        for norm in self.norms:
            norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> Any:
        """That of the network."""
        return self.network(x)


def trained(
    method: str,
    options: Facts,
    data: str,
    task: str,
    architecture: str,
    width: int,
    batch_size: int,
    seed: int,
    epochs: int,
    samples: int,
    test_samples: int | None,
    learning_rate: float,
    precision: str,
    started_at: int | None,
    root: Path | None,
    cache: Path,
) -> Facts:
    """Settings, losses, seconds, and all figures on the test samples.

    With ``started_at``, the batch size of a run of batch norm, that run's network is the start, and
    its statistics stay.
    """
    settings = {k: v for k, v in locals().items() if k not in ("root", "cache")}
    teaching = TEACHING[task]
    x, y = (t[:samples] for t in load_training_data(data, root))
    test = load_data(data, root).limited(test=test_samples)
    fabric = launched(precision, who="evenkeel study micro_batch", devices=1)
    place = f"{data}_{width}_{epochs}_{samples}_{method.replace(' ', '_')}_{{}}_{seed}"

    def make() -> nn.Module:
        network = build(architecture, width=width, **options)
        if started_at is None:
            return network
        source = cache / (place.replace(FROZEN.replace(" ", "_"), "batch").format(started_at))
        weights, _ = ek.saving.read(source.with_suffix(".safetensors"))
        network.load_state_dict(weights)
        return FrozenNorms(network)

    losses: list[float] = []
    started = time.perf_counter()
    checkpoint = cache / f"{place.format(batch_size)}.checkpoint"
    network = fit(
        lambda: make().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        x,
        y,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        vary=teaching.vary,
        loss=teaching.loss,
        seed=seed,
        fabric=fabric,
        checkpoint=checkpoint,
        identity={"options": options, "started_at": started_at},
        on_epoch=lambda facts: losses.append(facts["loss"]),
    ).cpu()
    seconds = time.perf_counter() - started
    if started_at is None and method == "batch":
        ek.save(network, cache / f"{place.format(batch_size)}.safetensors")
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    figures: Facts = {}
    if all(bool(p.isfinite().all()) for p in network.parameters()):
        sums = evaluate(network, test, teaching.task)
        figures = teaching.task.figures(sums, test.classes)  # type: ignore[attr-defined]
    checkpoint.unlink(missing_ok=True)
    return settings | {"losses": losses, "seconds": seconds, "figures": figures}
