"""A layer's weights as a matrix of (outputs, inputs), and the layer run with another matrix.

That is all an analog array, or any other method that works on matrices, has to know of a layer. A
new kind of layer is one class of three functions and a call of :func:`register_weight_layer`.
"""

import fnmatch
import math
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import ConfigError, nearest


class WeightLayer(Protocol):
    """How one kind of layer shows its weights.

    One that can be cut into blocks of columns besides has ``grain(layer)``, the number of columns
    that stay together, and ``block(layer, x, block, start)``, the output without a bias for a block
    (outputs, columns) alone that begins with that column.
    """

    def matrix(self, layer: Any) -> Tensor:
        """The weights as (outputs, inputs per output): a row holds all that feeds one output."""

    def weight(self, layer: Any, matrix: Tensor) -> Tensor:
        """The way back: a matrix in the layout of the layer's own weight.

        Neither this nor ``forward`` may use ``layer.weight``: on a chip it is gone. The layer's
        bias and options are there.
        """

    def forward(self, layer: Any, x: Tensor, matrix: Tensor) -> Tensor:
        """The layer's output for ``x`` with ``matrix`` in place of its weights."""


class LinearWeights:
    """``nn.Linear``: the weight is the matrix."""

    def matrix(self, layer: nn.Linear) -> Tensor:
        """(out_features, in_features)."""
        return layer.weight

    def weight(self, layer: nn.Linear, matrix: Tensor) -> Tensor:
        """The matrix itself."""
        return matrix

    def forward(self, layer: nn.Linear, x: Tensor, matrix: Tensor) -> Tensor:
        """Same as the layer's own forward."""
        return F.linear(x, matrix, layer.bias)

    def grain(self, layer: nn.Linear) -> int | None:
        """Each column is an input."""
        return 1

    def block(self, layer: nn.Linear, x: Tensor, block: Tensor, start: int) -> Tensor:
        """Those inputs alone."""
        return F.linear(x[..., start : start + block.shape[1]], block)


class ConvWeights:
    """``nn.Conv{1,2,3}d`` with every option: one row per output channel, a patch unrolled along it.

    With ``groups`` a row holds only the inputs of its own group, as on an array that stores each
    group's block on its own.
    """

    def matrix(self, layer: nn.Conv2d) -> Tensor:
        """(out_channels, in_channels / groups * kernel size)."""
        return layer.weight.flatten(1)

    def weight(self, layer: nn.Conv2d, matrix: Tensor) -> Tensor:
        """(out_channels, in_channels / groups, *kernel)."""
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        return matrix.view(shape)

    def forward(self, layer: nn.Conv2d, x: Tensor, matrix: Tensor) -> Tensor:
        """Same as the layer's own forward, padding modes included."""
        y: Tensor = layer._conv_forward(x, self.weight(layer, matrix), layer.bias)
        return y

    def grain(self, layer: nn.Conv2d) -> int | None:
        """A channel's kernel; groups are not cut."""
        return math.prod(layer.kernel_size) if layer.groups == 1 else None

    def block(self, layer: nn.Conv2d, x: Tensor, block: Tensor, start: int) -> Tensor:
        """Those channels alone."""
        size = math.prod(layer.kernel_size)
        first, channels = start // size, block.shape[1] // size
        kernel = block.reshape(len(block), channels, *layer.kernel_size)
        of_channels = x.narrow(-1 - len(layer.kernel_size), first, channels)
        y: Tensor = layer._conv_forward(of_channels, kernel, None)
        return y


class ConvTransposeWeights:
    """``nn.ConvTranspose{1,2,3}d``: one row per output channel, all that may reach it along it."""

    def matrix(self, layer: nn.ConvTranspose2d) -> Tensor:
        """(out_channels, in_channels / groups * kernel size)."""
        return outputs_first(layer.weight, layer.groups).flatten(1)

    def weight(self, layer: nn.ConvTranspose2d, matrix: Tensor) -> Tensor:
        """(in_channels, out_channels / groups, *kernel)."""
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        return outputs_first(matrix.view(shape), layer.groups)

    def forward(self, layer: nn.ConvTranspose2d, x: Tensor, matrix: Tensor) -> Tensor:
        """Same as the layer's own forward."""
        rank = len(layer.kernel_size)
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        options: Any = (
            layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation,
        )  # fmt: skip
        y: Tensor = convolve(x, self.weight(layer, matrix), layer.bias, *options)
        return y


def outputs_first(weight: Tensor, groups: int) -> Tensor:
    """A weight (inputs, outputs / groups, ...) as (outputs, inputs / groups, ...); and back."""
    swapped: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return swapped


_KINDS: dict[type[nn.Module], WeightLayer] = {
    nn.Linear: LinearWeights(),
    nn.Conv1d: ConvWeights(),
    nn.Conv2d: ConvWeights(),
    nn.Conv3d: ConvWeights(),
    nn.ConvTranspose1d: ConvTransposeWeights(),
    nn.ConvTranspose2d: ConvTransposeWeights(),
    nn.ConvTranspose3d: ConvTransposeWeights(),
}


def register_weight_layer(kind: type[nn.Module], weights: WeightLayer) -> None:
    """Make a further kind of layer known, for programming and for every other method."""
    _KINDS[kind] = weights


def registered_kinds() -> dict[type[nn.Module], WeightLayer]:
    """All kinds that are known, for another process to know them too."""
    return dict(_KINDS)


def weight_layer(layer: nn.Module) -> WeightLayer | None:
    """How ``layer`` shows its weights; None where nothing is known of it.

    A subclass counts as its parent only while it keeps the parent's forward: one that does anything
    else with its weight is not guessed at. Parametrized layers keep it, so they are found.
    """
    if "forward" in vars(layer):  # a wrapper has given this one a forward of its own
        return None
    for kind in type(layer).__mro__:  # the nearest first
        if kind in _KINDS:
            same = type(layer) is kind or type(layer).forward is kind.forward
            return _KINDS[kind] if same else None
    return None


def chosen_paths(patterns: Collection[str], paths: Sequence[str]) -> set[str]:
    """Those of the paths that are named or fit a pattern such as ``"layer*"``; each must fit one.

    Examples:
        >>> sorted(chosen_paths(["conv*", "head"], ["conv1", "conv2", "head", "stem"]))
        ['conv1', 'conv2', 'head']
    """
    if isinstance(patterns, str):
        raise ConfigError(
            f"layers must be a list of paths or patterns; got the string {patterns!r}."
        )
    chosen: set[str] = set()
    for pattern in patterns:
        found = [pattern] if pattern in paths else fnmatch.filter(paths, pattern)
        if not found:
            raise ConfigError(f"No layer matches {pattern!r}. {nearest(pattern, paths)}")
        chosen.update(found)
    return chosen


def require_own_weight(layer: nn.Module, path: str) -> None:
    """Refuse a layer whose weight is not its own: gone onto a chip, or made anew by a hook."""
    if layer._parameters.get("weight", layer) is None:
        raise ConfigError(
            f"'{path}' has no weight: this network is programmed onto a chip already. Start from "
            f"the digital network."
        )
    if "weight" in vars(layer):
        raise ConfigError(
            f"The weight of '{path}' is made by a hook at each forward (pruning, or spectral_norm "
            f"of old), so what it holds now may be stale. Make it a plain parameter first: "
            f"prune.remove(layer, 'weight') or remove_spectral_norm(layer)."
        )
