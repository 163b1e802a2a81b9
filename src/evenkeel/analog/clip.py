"""Clipping weights before they are mapped, so that rare large ones do not set the scale."""

from typing import cast

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError
from evenkeel.layers import require_own_weight, weight_layer


@torch.no_grad()
def clip_weights_(model: nn.Module, deviations: float = 2.5) -> dict[str, float]:
    r"""Clip every programmable layer's weights to a number of their standard deviations.

    $$ w \leftarrow \mathrm{clip}(w,\,-\alpha\,\mathrm{std}(w),\,\alpha\,\mathrm{std}(w)) $$

    An array's noise is proportional to its largest weight. A lower largest weight buys less noise
    at the price of a changed network; without retraining the price can exceed the gain. Attention
    and recurrent layers must be taken apart first: :func:`evenkeel.layers.take_apart_`.

    Args:
        model: changed in place.
        deviations: $\alpha$; Joshi et al. trained with 2.0 to 2.5.

    Returns:
        The share of weights that were clipped, by layer.
    """
    if not deviations > 0:
        raise ConfigError(f"clip_weights_ needs deviations above 0; got {deviations!r}.")
    clipped = {}
    for path, module in model.named_modules():
        weights = weight_layer(module)
        if weights is None:
            continue
        require_own_weight(module, path)
        weight = cast(Tensor, module.weight).detach()
        limit = deviations * float(weight.float().std(correction=0))
        if limit == 0:  # equal weights have no outliers
            clipped[path] = 0.0
            continue
        clipped[path] = float((weight.abs() > limit).float().mean())
        if isinstance(module._parameters.get("weight"), nn.Parameter):
            weight.clamp_(-limit, limit)
        else:
            _assign(module, weight.clamp(-limit, limit), path)
    return clipped


def _assign(module: nn.Module, weight: Tensor, path: str) -> None:
    """Set a parametrized weight, where its parametrization can be inverted."""
    try:
        module.weight = weight
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"The weight of '{path}' is parametrized in a way that cannot be set. Remove the "
            f"parametrization first: torch.nn.utils.parametrize.remove_parametrizations."
        ) from error
