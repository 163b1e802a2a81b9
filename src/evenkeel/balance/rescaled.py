"""A layer whose inputs and outputs are scaled digitally, around weights scaled the other way."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from evenkeel.layers import Wrapper, restore_precision

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What can be rescaled."""
SCALES = ("input_scale", "output_scale")


class Rescaled(Wrapper):
    r"""A layer $\ell$ between two scales, $y_o = u_o\,\ell(s \odot x)_o$.

    With the weights $w_{oi}/(u_o s_i)$ and the bias $b_o/u_o$ it computes what it did before. Both
    scales belong to the digital side of an array, like the bias.

    Args:
        layer: a linear layer or a convolution, its weights scaled already.
        input_scale: $s$, (I,).
        output_scale: $u$, (O,).
    """

    input_scale: Tensor
    output_scale: Tensor

    def __init__(self, layer: nn.Module, input_scale: Tensor, output_scale: Tensor) -> None:
        super().__init__(layer)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("output_scale", output_scale)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, between the two scales."""
        into, out = (self._like(getattr(self, name), x) for name in SCALES)
        y: Tensor = self.layer(x * into) * out
        return y

    def _like(self, scale: Tensor, x: Tensor) -> Tensor:
        return scale.to(x.dtype).view(-1, *(1,) * kernel_rank(self.layer))

    @property
    def weight(self) -> Tensor:
        """As it was, for code that asks a layer for its weight."""
        weight: Any = self.layer.weight
        return weight * product(self.layer, self.input_scale, self.output_scale)  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """As it was."""
        bias: Any = self.layer.bias
        return None if bias is None else bias * self.output_scale.to(bias.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_precision(self, before, SCALES)
        return self


def product(layer: nn.Module, input_scale: Tensor, output_scale: Tensor) -> Tensor:
    """Of the two scales, by which each weight is divided; broadcast against the weight."""
    both = output_scale[:, None] * input_scale[columns(layer)]
    return both.view(*both.shape, *(1,) * kernel_rank(layer))


def kernel_rank(layer: nn.Module) -> int:
    """Axes of space: 0 for a linear layer."""
    return len(getattr(bare(layer), "kernel_size", ()))


def columns(layer: Any) -> Tensor:
    """The input channel that each of a layer's weights reads, (O or 1, I / groups)."""
    layer = bare(layer)
    groups = getattr(layer, "groups", 1)
    inputs = getattr(layer, "in_channels", None) or layer.in_features
    outputs = getattr(layer, "out_channels", None) or layer.out_features
    read = torch.arange(inputs).view(groups, -1)
    return read.repeat_interleave(outputs // groups, 0) if groups > 1 else read


def bare(layer: Any) -> Any:
    """The layer itself, within an array or another wrapper."""
    while not isinstance(layer, KINDS):
        layer = layer.layer
    return layer


def put_around_empty(model: nn.Module, path: str) -> None:
    """Wrap the layer at ``path`` with scales of 1, for a file to fill."""
    layer: Any = model.get_submodule(path)
    outputs, inputs = len(layer.weight), int(columns(layer).max()) + 1
    device = layer.weight.device
    wrap(model, layer, Rescaled(layer, *(torch.ones(n, device=device) for n in (inputs, outputs))))


def wrap(model: nn.Module, layer: nn.Module, wrapper: nn.Module) -> None:
    """Put a wrapper in a layer's place, under every name that it goes by."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is layer:
            model.set_submodule(path, wrapper)


def rescaled_paths(model: nn.Module) -> list[str]:
    """Paths of the layers that are rescaled."""
    return [path for path, m in model.named_modules() if isinstance(m, Rescaled)]
