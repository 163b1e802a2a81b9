"""What an optimizer remembers, carried along when parameters are scaled.

A parameter scaled by $t$ has its gradient scaled by $1/t$, so what is linear in gradients goes by
$1/t$, and what is quadratic by $1/t^2$.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError

POWERS: dict[type[torch.optim.Optimizer], dict[str, int]] = {
    torch.optim.SGD: {"momentum_buffer": -1},
    torch.optim.Adam: {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
    torch.optim.NAdam: {"exp_avg": -1, "exp_avg_sq": -2},
    torch.optim.RAdam: {"exp_avg": -1, "exp_avg_sq": -2},
    torch.optim.Adamax: {"exp_avg": -1, "exp_inf": -1},
    torch.optim.RMSprop: {"square_avg": -2, "grad_avg": -1},
    torch.optim.Adagrad: {"sum": -2},
}
"""By optimizer, the power of t of each tensor in its state; a subclass goes by its parent's."""

Rescale = Callable[[nn.Parameter, Tensor, int], None]
"""Multiplies a tensor like the parameter by its factors to a power."""


def require_rule(optimizer: torch.optim.Optimizer) -> Mapping[str, int]:
    """The powers of an optimizer's state.

    Raises:
        ConfigError: there is no exact rule for it.
    """
    powers = next((POWERS[kind] for kind in type(optimizer).__mro__ if kind in POWERS), None)
    if powers is None:
        known = ", ".join(kind.__name__ for kind in POWERS)
        raise ConfigError(
            f"There is no rule for how the state of {type(optimizer).__name__} goes with scaled "
            f"parameters. There is for {known} and what derives from them; or balance before the "
            f"optimizer is made."
        )
    if any(group.get("momentum", 0) for group in optimizer.param_groups) and isinstance(
        optimizer, torch.optim.RMSprop
    ):
        raise ConfigError(
            "RMSprop with momentum sums steps that are free of scale, for which there is no exact "
            "rule. Use momentum=0, or balance before the optimizer is made."
        )
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if name not in (*powers, "step") and getattr(value, "shape", None) == parameter.shape:
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps '{name}', for which there is no rule. "
                    f"Balance before the optimizer is made."
                )
    return powers


@torch.no_grad()
def transport_(
    optimizer: torch.optim.Optimizer, parameters: Mapping[nn.Parameter, Any], rescale: Rescale
) -> None:
    """Carry an optimizer's state, and gradients that are there, to the scaled parameters."""
    powers = require_rule(optimizer)
    for parameter in parameters:
        if parameter.grad is not None:
            rescale(parameter, parameter.grad, -1)
        state = optimizer.state.get(parameter, {})
        for name, power in powers.items():
            if isinstance(state.get(name), Tensor):  # one that has no state yet may hold None
                rescale(parameter, state[name], power)
