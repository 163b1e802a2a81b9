"""Other normalizers for a network that is there already."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from evenkeel.errors import ConfigError

BatchNorm = nn.modules.batchnorm._BatchNorm
_FORWARDS = (BatchNorm.forward, nn.SyncBatchNorm.forward)


def why_not(module: nn.Module) -> str | None:
    """Why a normalizer is not one that can be replaced; None for a batch norm that can."""
    if not isinstance(module, BatchNorm):
        return f"{type(module).__name__} is not a batch norm"
    if type(module).forward not in _FORWARDS:
        return f"{type(module).__name__} does more than batch norm does"
    if isinstance(module.running_mean, nn.UninitializedBuffer):
        return "it has not seen its first batch, and has no channels yet"
    if module.running_mean is None:
        return "it keeps no running statistics"
    return None


@dataclass
class Conversion:
    """The certificate of :func:`convert_`.

    Attributes:
        converted: paths of the normalizers that were replaced.
        skipped: other normalizers, and why they were not.
    """

    converted: list[str]
    skipped: dict[str, str]
    _model: nn.Module = field(repr=False)
    _old: dict[str, nn.Module] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"converted": self.converted, "skipped": self.skipped}

    def table(self) -> str:
        """A row per normalizer."""
        said = dict.fromkeys(self.converted, "converted") | self.skipped
        width = max(map(len, said))
        return "\n".join(f"{path:<{width}}  {what}" for path, what in said.items())

    def undo(self) -> None:
        """Put the old modules back, as they were left."""
        for path, old in self._old.items():
            self._model.set_submodule(path, old)


def convert_(model: nn.Module, factory: Callable[[int], nn.Module]) -> Conversion:
    """Replace every batch norm by what ``factory`` makes for its channels, in place.

    Parameters, running statistics, ``eps`` and ``momentum`` go over by name wherever the new module
    has them too, as do mode, device and dtype.

    Args:
        model: changed in place.
        factory: from the number of channels to a normalizer, as in ``norm_layer=``.

    Returns:
        The certificate: what was converted, what was not and why, ``undo()``.

    Raises:
        ConfigError: there is no batch norm to replace.

    Examples:
        >>> import torch, evenkeel as ek
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> ek.norm.convert_(net, ek.norm.NoiseAwareBatchNorm).converted
        ['1']
    """
    old: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    made: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        named = "Norm" in type(module).__name__ and next(module.children(), None) is None
        if not isinstance(module, BatchNorm) and not named:
            continue
        if reason := why_not(module):
            skipped[path] = reason
        elif not path:
            skipped[path] = "it is the whole network, and has no place to be replaced in"
        else:
            assert isinstance(module, BatchNorm)
            old[path] = module
            if id(module) not in made:  # one that is used in two places stays one
                made[id(module)] = in_place_of(module, factory)
    if not old:
        said = "; ".join(f"'{path}': {why}" for path, why in skipped.items())
        raise ConfigError(
            f"convert_ needs a batch norm to replace; {type(model).__name__} has none"
            + (f" ({said})." if said else ".")
        )
    for path, module in old.items():
        model.set_submodule(path, made[id(module)])
    return Conversion(list(old), skipped, model, old)


@torch.no_grad()
def in_place_of(old: BatchNorm, factory: Callable[[int], nn.Module]) -> nn.Module:
    """What ``factory`` makes, with all of the old one's state that has a place in it."""
    new = factory(old.num_features)
    given = next((t for t in old.state_dict().values() if t.is_floating_point()), None)
    if given is not None:
        new = new.to(given.device, given.dtype)
    for name in ("eps", "momentum"):
        if hasattr(new, name):
            setattr(new, name, getattr(old, name))
    fitting = {
        name: value
        for name, value in old.state_dict().items()
        if name in (own := new.state_dict()) and own[name].shape == value.shape
    }
    new.load_state_dict(fitting, strict=False)
    for name, parameter in new.named_parameters(recurse=False):
        if getattr(old, name, None) is not None:
            parameter.requires_grad_(getattr(old, name).requires_grad)
    return new.train(old.training)
