"""A plain training loop for small networks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fit(
    make_model: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    epochs: int = 12,
    batch_size: int = 64,
    learning_rate: float = 0.2,
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """Train a classifier with SGD and a one-cycle schedule; the global generator is put back.

    Args:
        make_model: builds the network; called under the seed.
        x: inputs (N, ...).
        y: labels (N,).
        epochs: passes over the data.
        batch_size: samples per step; a last incomplete batch is dropped, as it is different in
            every epoch.
        learning_rate: peak of the schedule.
        seed: of the initialisation and the order.
        on_step: called with steps done and steps in all.

    Returns:
        The network in eval mode.
    """
    steps_per_epoch = len(x) // batch_size
    total = epochs * steps_per_epoch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model().train()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total)
        for step in range(total):
            if step % steps_per_epoch == 0:
                order = torch.randperm(len(x))
            at = step % steps_per_epoch * batch_size
            batch = order[at : at + batch_size]
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
            on_step(step + 1, total)
    return model.eval()
