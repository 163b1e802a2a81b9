"""Modules around a layer that leave it its name."""

from typing import Any

from torch import nn


class Wrapper(nn.Module):
    """A module around ``layer`` that goes by the layer's own path.

    What is drawn for a layer is keyed by its path, so that wrapping 'conv1' must not make another
    chip of the same seed.
    """

    layer: nn.Module

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        # torch's transformer layers compute past their sublayers where none of them has a hook.
        self.register_forward_hook(called)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks, such as ``weight`` or ``in_features``, is the layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer" or name.startswith("__"):  # copying is the wrapper's own business
                raise
            return getattr(self.layer, name)


def called(module: nn.Module, args: Any, output: Any) -> None:
    """Nothing: what counts is that there is a hook."""


def unwrapped(model: nn.Module, path: str) -> str:
    """The path that a module of ``model`` has when nothing is wrapped around it or above it.

    Examples:
        >>> unwrapped(nn.Sequential(Wrapper(nn.ReLU())), "0.layer")
        '0'
    """
    parts: list[str] = []
    module = model
    for part in path.split(".") if path else ():
        if not (isinstance(module, Wrapper) and part == "layer"):
            parts.append(part)
        module = getattr(module, part)
    return ".".join(parts)
