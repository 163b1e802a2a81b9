"""Weight standardization: convolutions whose filters have mean 0 and variance 1."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evenkeel.errors import ConfigError
from evenkeel.layers import chosen_paths, register_weight_layer, require_own_weight
from evenkeel.layers.weights import ConvWeights

EPS = 1e-5


def standardized(weight: Tensor, eps: float = EPS) -> Tensor:
    r"""Every filter with mean 0 and, but for ``eps``, variance 1 over its inputs and positions.

    $$ \hat W_o = \frac{W_o - \bar W_o}{\sqrt{s_o^2 + \varepsilon}} $$

    with the unbiased variance $s_o^2$, as in the code released for batch-channel normalization.

    Args:
        weight: (out_channels, in_channels / groups, *kernel).
        eps: added to the variance.

    Returns:
        Of the same shape and dtype; worked out in float32 or better.

    Raises:
        ConfigError: filters of a single weight, which would all become zero.
    """
    if weight[0].numel() < 2:
        raise ConfigError(
            f"Weight standardization needs filters of two weights or more; got weights of shape "
            f"{tuple(weight.shape)}. Leave this layer out."
        )
    wide = weight if weight.dtype == torch.float64 else weight.float()
    rows = wide.flatten(1)  # (O, I)
    rows = rows - rows.mean(1, keepdim=True)
    variance = rows.square().sum(1, keepdim=True) / (rows.shape[1] - 1)
    return (rows * (variance + eps).rsqrt()).view_as(weight).to(weight.dtype)


class WeightStandardization(nn.Module):
    """The same as a parametrization, which :func:`standardize_weights_` puts on layers."""

    def __init__(self, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses."""
        return standardized(weight, self.eps)


class _Standardized:
    """What makes a convolution of torch one with standardized weights."""

    def forward(self, x: Tensor) -> Tensor:
        """As torch's, with the weight standardized."""
        y: Tensor = self._conv_forward(x, standardized(self.weight), self.bias)  # type: ignore[attr-defined]
        return y


class WeightStandardizedConv1d(_Standardized, nn.Conv1d):
    """``nn.Conv1d`` with every filter standardized at each forward; see :func:`standardized`."""


class WeightStandardizedConv2d(_Standardized, nn.Conv2d):
    r"""``nn.Conv2d`` with every filter standardized at each forward; see :func:`standardized`.

    Use with group or batch-channel normalization, in every convolution. It makes outputs larger, by
    the square root of a filter's number of inputs, so that a normalizer must follow. Not for the
    last layer.

    Arguments, options and checkpoints are those of ``nn.Conv2d``.

    Examples:
        >>> import torch, evenkeel as ek
        >>> conv = ek.norm.WeightStandardizedConv2d(3, 8, 3)
        >>> x = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(conv(x), conv(x + 1), atol=1e-5)  # filters that sum to zero
        True

    References:
        Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization", arXiv 1903.10520.
    """


class WeightStandardizedConv3d(_Standardized, nn.Conv3d):
    """``nn.Conv3d`` with every filter standardized at each forward; see :func:`standardized`."""


class _StandardizedWeights(ConvWeights):
    """What goes onto an array is the standardized weight."""

    def matrix(self, layer: nn.Conv2d) -> Tensor:
        """(out_channels, in_channels / groups * kernel size)."""
        return standardized(layer.weight).flatten(1)


for _kind in (WeightStandardizedConv1d, WeightStandardizedConv2d, WeightStandardizedConv3d):
    register_weight_layer(_kind, _StandardizedWeights())


@dataclass
class Standardization:
    """The certificate of :func:`standardize_weights_`.

    Attributes:
        standardized: paths of the layers whose weights are standardized now.
        skipped: other convolutions, and why they are not.
    """

    standardized: list[str]
    skipped: dict[str, str]
    _model: nn.Module = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"standardized": self.standardized, "skipped": self.skipped}

    def table(self) -> str:
        """A row per layer."""
        said = dict.fromkeys(self.standardized, "standardized") | self.skipped
        width = max(map(len, said))
        return "\n".join(f"{path:<{width}}  {what}" for path, what in said.items())

    def undo(self) -> None:
        """Take the parametrizations off again; the weights beneath are as training left them."""
        for path in self.standardized:
            layer = self._model.get_submodule(path)
            if _is_standardized(layer):
                _take_off(layer)


def _take_off(layer: nn.Module) -> None:
    of_weight: nn.ModuleList = layer.parametrizations["weight"]  # type: ignore[index,assignment]
    others = [p for p in of_weight if not isinstance(p, WeightStandardization)]
    if others:  # the user's own stay
        while len(of_weight):
            del of_weight[-1]
        of_weight.extend(others)
        return
    names = ["weight", *(name for name in layer._parameters if name != "weight")]
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    for name in names:  # in their old order, which an optimizer's saved state goes by
        layer._parameters[name] = layer._parameters.pop(name)


def standardize_weights_(
    model: nn.Module, layers: Collection[str] | None = None, *, eps: float = EPS
) -> Standardization:
    """Standardize the weights of a model's convolutions from now on, in place.

    The model keeps its modules: each convolution gets a parametrization, so that training, saving
    and programming onto chips go on as before.

    Args:
        model: changed in place.
        layers: paths or patterns; default: every convolution.
        eps: added to the variance.

    Returns:
        The certificate, with ``undo()``.

    Raises:
        ConfigError: there is no convolution to standardize, or a pattern fits none.

    Examples:
        >>> import torch, evenkeel as ek
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> ek.norm.standardize_weights_(net).standardized
        ['0']
        >>> bool(net[0].weight.mean().abs() < 1e-6)
        True
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {path: m for path, m in model.named_modules() if isinstance(m, kinds)}
    chosen = set(found) if layers is None else chosen_paths(layers, list(found))
    done: list[str] = []
    skipped: dict[str, str] = {}
    for path, layer in found.items():
        if path not in chosen:
            skipped[path] = "left out by `layers`"
            continue
        require_own_weight(layer, path)
        if isinstance(layer, _Standardized) or _is_standardized(layer):
            skipped[path] = "it is standardized already"
        elif isinstance(layer._parameters.get("weight"), nn.UninitializedParameter):
            skipped[path] = "it has not seen its first batch, and has no weights yet"
        elif layer.weight[0].numel() < 2:
            skipped[path] = "its filters have a single weight"
        else:
            done.append(path)
    if not done:
        said = "; ".join(f"'{path}': {why}" for path, why in skipped.items())
        raise ConfigError(
            f"standardize_weights_ needs a convolution; {type(model).__name__} has none to "
            f"standardize" + (f" ({said})." if said else ".")
        )
    for path in done:
        parametrize.register_parametrization(found[path], "weight", WeightStandardization(eps))
    return Standardization(done, skipped, model)


def standardized_paths(model: nn.Module) -> dict[str, float]:
    """The layers that :func:`standardize_weights_` has put a parametrization on, and their eps."""
    return {
        path.removesuffix(".parametrizations.weight"): part.eps
        for path, module in model.named_modules()
        if isinstance(module, parametrize.ParametrizationList)
        for part in module
        if isinstance(part, WeightStandardization)
    }


def _is_standardized(layer: nn.Module) -> bool:
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    of_weight = layer.parametrizations["weight"]  # type: ignore[index]
    return any(isinstance(p, WeightStandardization) for p in of_weight)
