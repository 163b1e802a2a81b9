"""Architectures by name. A built network remembers its name and options, never code."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from evenkeel.errors import ConfigError, nearest

Factory = TypeVar("Factory", bound=Callable[..., nn.Module])

_ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {}


def architecture(name: str) -> Callable[[Factory], Factory]:
    """Register a factory whose options are numbers, strings and flags."""

    def register(factory: Factory) -> Factory:
        _ARCHITECTURES[name] = factory
        return factory

    return register


def known() -> list[str]:
    """Names of all architectures."""
    return sorted(_ARCHITECTURES)


def build(name: str, **options: Any) -> nn.Module:
    """A new network of that architecture.

    Examples:
        >>> net = build("resnet8_digits", num_classes=10)
        >>> config_of(net)
        {'name': 'resnet8_digits', 'options': {'num_classes': 10}}
    """
    if name not in _ARCHITECTURES:
        raise ConfigError(f"Unknown architecture {name!r}. {nearest(name, _ARCHITECTURES)}")
    model = _ARCHITECTURES[name](**options)
    model.architecture = {"name": name, "options": options}  # type: ignore[assignment]
    return model


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """How to build the network again, if it is one of these."""
    config = getattr(model, "architecture", None)
    ours = isinstance(config, dict) and config.get("name") in _ARCHITECTURES and "options" in config
    return config if ours else None
