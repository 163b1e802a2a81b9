"""Other normalizers for a network that is there already."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from evenkeel.errors import ConfigError
from evenkeel.norm.activation import NormAct

BatchNorm = nn.modules.batchnorm._BatchNorm
_FORWARDS = (BatchNorm.forward, nn.SyncBatchNorm.forward)
_FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
"""What torchvision, detectron2 and timm call a batch norm that is all buffers."""


def why_not(module: nn.Module) -> str | None:
    """Why a normalizer is not one that can be replaced; None for a batch norm that can."""
    frozen = type(module).__name__ in _FROZEN
    if not isinstance(module, BatchNorm) and not frozen:
        return f"{type(module).__name__} is not a batch norm"
    if not frozen and type(module).forward not in _FORWARDS and followed_by(module) is None:
        return f"{type(module).__name__} does more than batch norm does"
    if isinstance(module.running_mean, nn.UninitializedBuffer):
        return "it has not seen its first batch, and has no channels yet"
    if module.running_mean is None:
        return "it keeps no running statistics"
    return None


def followed_by(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """What timm's fused layers, such as ``BatchNormAct2d``, do after normalizing: drop, and act."""
    drop, act = getattr(module, "drop", None), getattr(module, "act", None)
    if not (isinstance(drop, nn.Module) and isinstance(act, nn.Module)):
        return None
    return (drop, act) if type(module).__name__.endswith("BatchNormAct2d") else None


@dataclass
class Conversion:
    """The certificate of :func:`convert_`.

    Attributes:
        converted: paths of the normalizers that were replaced.
        skipped: other normalizers, and why they were not.
        old: the modules that were replaced, by path.
    """

    converted: list[str]
    skipped: dict[str, str]
    _model: nn.Module = field(repr=False)
    old: dict[str, nn.Module] = field(repr=False)

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
        for path, old in self.old.items():
            self._model.set_submodule(path, old)


def convert_(
    model: nn.Module,
    factory: Callable[[int], nn.Module],
    *,
    kinds: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
) -> Conversion:
    """Replace every batch norm by what ``factory`` makes for its channels, in place.

    Parameters, running statistics, ``eps`` and ``momentum`` go over by name wherever the new module
    has them too, as do mode, device and dtype. What timm's fused layers do besides, dropping and
    activating, is put behind the new one (:class:`NormAct`). Frozen batch norms of torchvision and
    detectron2 are replaced by layers that train.

    Args:
        model: changed in place.
        factory: from the number of channels to a normalizer, as in ``norm_layer=``.
        kinds: replace these classes instead, such as ``nn.GroupNorm``; of what they hold, the
            affine parameters go over.

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
        if kinds is not None:
            reason = None if isinstance(module, kinds) else "it is of another kind"
        else:
            reason = why_not(module)
        if reason and not is_normalizer(module):
            continue
        if reason:
            skipped[path] = reason
        elif not path:
            skipped[path] = "it is the whole network, and has no place to be replaced in"
        else:
            old[path] = module
            if id(module) not in made:  # one that is used in two places stays one
                made[id(module)] = in_place_of(module, factory)
    if not old:
        what = "a batch norm" if kinds is None else "a normalizer of those kinds"
        said = "; ".join(f"'{path}': {why}" for path, why in skipped.items())
        raise ConfigError(
            f"convert_ needs {what} to replace; {type(model).__name__} has none"
            + (f" ({said})." if said else ".")
        )
    for path, module in old.items():
        model.set_submodule(path, made[id(module)])
    return Conversion(list(old), skipped, model, old)


def is_normalizer(module: nn.Module) -> bool:
    """Whether a module is one, by its class or by its name."""
    named = "Norm" in type(module).__name__ and next(module.children(), None) is None
    return isinstance(module, BatchNorm) or named


@torch.no_grad()
def in_place_of(old: nn.Module, factory: Callable[[int], nn.Module]) -> nn.Module:
    """What ``factory`` makes, with all of the old one's state that has a place in it."""
    state = old.state_dict()
    new = factory(channels_of(old))
    given = next((t for t in state.values() if t.is_floating_point()), None)
    if given is not None:
        new = new.to(given.device, given.dtype)
    for name in ("eps", "momentum"):
        if hasattr(new, name) and hasattr(old, name):
            setattr(new, name, getattr(old, name))
    own = new.state_dict()
    fitting = {
        name: value
        for name, value in state.items()
        if name in own and own[name].shape == value.shape
    }
    new.load_state_dict(fitting, strict=False)
    if hasattr(new, "group_weight") and "weight" in fitting and not fitting["weight"].any():
        # A residual branch that starts at zero: in the last factor, not in one that is divided by.
        nn.init.ones_(new.weight)  # type: ignore[arg-type]
        nn.init.zeros_(new.group_weight)  # type: ignore[arg-type]
    frozen = not any(p.requires_grad for p in old.parameters(recurse=False))
    for name, parameter in new.named_parameters(recurse=False):
        if isinstance(getattr(old, name, None), nn.Parameter):
            parameter.requires_grad_(getattr(old, name).requires_grad)
        elif frozen and next(old.parameters(recurse=False), None) is not None:
            parameter.requires_grad_(False)
    after = followed_by(old)
    if after is not None:
        drop, act = after
        new = NormAct(new, act, drop)
    return new.train(old.training)


def channels_of(normalizer: nn.Module) -> int:
    """The number of channels it was made for."""
    for name in ("num_features", "num_channels"):
        if isinstance(channels := getattr(normalizer, name, None), int):
            return channels
    weight = getattr(normalizer, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 1:
        return len(weight)
    raise ConfigError(
        f"{type(normalizer).__name__} does not tell its number of channels: it has none of "
        f"num_features, num_channels and a weight of one axis."
    )
