"""A plain training loop, resumable after a kill, on one device or many."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from evenkeel.train import checkpoint as checkpoints

if TYPE_CHECKING:
    from lightning_fabric import Fabric


AfterStep = Callable[[nn.Module, torch.optim.Optimizer], Callable[[], object]]


def nesterov(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 and weight decay 5e-4."""
    return torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Up to the optimizer's learning rate, and down to zero."""
    return OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total_steps=steps)


def fit(
    make_model: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    epochs: int = 12,
    batch_size: int = 64,
    learning_rate: float = 0.2,
    augment: Callable[[Tensor], Tensor] = lambda x: x,
    vary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, y: (x, y),
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    seed: int = 0,
    make_optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] = nesterov,
    make_schedule: Callable[[torch.optim.Optimizer, int], LRScheduler] = one_cycle,
    after_step: AfterStep = lambda model, optimizer: lambda: None,
    fabric: "Fabric | None" = None,
    checkpoint: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda facts: None,
    watch: Callable[[nn.Module], dict[str, Any]] = lambda model: {},
) -> nn.Module:
    """Train a network, by default a classifier; the global generator is put back.

    Args:
        make_model: builds the network; called under the seed.
        x: inputs (N, ...).
        y: labels (N, ...).
        epochs: passes over the data.
        batch_size: samples per step over all processes; a last incomplete batch is dropped, as it
            is different in every epoch.
        learning_rate: peak of the schedule.
        augment: changes a batch of inputs.
        vary: changes a batch of inputs and labels together.
        loss: from the network's output and the labels.
        seed: of the initialisation, the order and the augmentation.
        make_optimizer: from the network and the learning rate.
        make_schedule: from the optimizer and the number of steps.
        after_step: from the network and the optimizer to what is done after each of its steps.
        fabric: a launched lightning-fabric ``Fabric``, for its devices and precision.
        checkpoint: file to go on from, written after every epoch. A run that was killed ends as one
            that was not.
        identity: what else makes this run another than others, such as the network's options; a
            checkpoint of another run is refused.
        on_step: called with steps done and steps in all.
        on_epoch: called with an epoch's number, mean loss, seconds, and what ``watch`` has found;
            where a run goes on, also for the epochs behind it.
        watch: looks at the network, in eval mode, after each epoch.

    Returns:
        The network in eval mode.
    """
    steps = len(x) // batch_size  # of an epoch
    rank, world = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
    identity = {
        **(identity or {}),
        "samples": len(x),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model().train()
        optimizer = make_optimizer(model, learning_rate)
        schedule = make_schedule(optimizer, epochs * steps)
        follow = after_step(model, optimizer)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
        history = _go_on(parts, checkpoint, identity)
        for facts in history:
            on_epoch(facts)
        network: Any = model
        stepper: Any = optimizer
        if fabric is not None:
            network, stepper = fabric.setup(model, optimizer)
        for epoch in range(len(history), epochs):
            started, total_loss = time.perf_counter(), 0.0
            order = torch.randperm(len(x))
            for step in range(steps):
                batch = order[step * batch_size : (step + 1) * batch_size][rank::world]
                inputs, labels = vary(augment(x[batch]), y[batch])
                if fabric is not None:
                    inputs, labels = fabric.to_device((inputs, labels))
                stepper.zero_grad(set_to_none=True)
                cost = loss(network(inputs), labels)
                fabric.backward(cost) if fabric is not None else cost.backward()
                stepper.step()
                follow()
                schedule.step()
                total_loss += float(cost.detach())
                on_step(epoch * steps + step + 1, epochs * steps)
            seconds = time.perf_counter() - started
            facts = {"epoch": epoch + 1, "loss": total_loss / steps, "seconds": seconds}
            history.append(facts | watch(model.eval()))
            model.train()
            if checkpoint is not None and rank == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                checkpoints.store(checkpoint, identity, {"history": history, **state})
            on_epoch(history[-1])
    return model.eval()


def _go_on(
    parts: dict[str, Any], checkpoint: Path | None, identity: dict[str, Any]
) -> list[dict[str, Any]]:
    """Load a checkpoint into the parts, if there is one; the facts of the epochs behind it."""
    state = checkpoints.restore(checkpoint, identity) if checkpoint is not None else None
    if state is None:
        return []
    for name, part in parts.items():
        part.load_state_dict(state[name])
    history: list[dict[str, Any]] = state["history"]
    return history
