"""From a network to a chip that holds it."""

import functools
import operator
from collections.abc import Callable, Collection
from typing import overload

import torch
from torch import nn
from torch.nn.utils import parametrize

from evenkeel.analog.chip import Chip
from evenkeel.analog.chips import Chips
from evenkeel.analog.device import Device, DeviceModel, as_device
from evenkeel.analog.layer import AnalogLayer, derive_, write_
from evenkeel.errors import ConfigError
from evenkeel.layers import (
    chosen_paths,
    deepcopied,
    expanded,
    is_composite,
    unwrapped,
    weight_layer,
)

LayerChoice = Collection[str] | Callable[[str, nn.Module], bool] | None


@overload
def program(
    model: nn.Module,
    device: Device | DeviceModel,
    *,
    seed: int,
    layers: LayerChoice = None,
    chips: None = None,
) -> Chip: ...
@overload
def program(
    model: nn.Module,
    device: Device | DeviceModel,
    *,
    seed: int,
    layers: LayerChoice = None,
    chips: int,
) -> Chips: ...
@torch.inference_mode(False)  # a chip made inside of it must also serve outside
def program(
    model: nn.Module,
    device: Device | DeviceModel,
    *,
    seed: int,
    layers: LayerChoice = None,
    chips: int | None = None,
) -> "Chip | Chips":
    """Program a network's weights onto one chip, or onto many.

    The network is copied and left alone; the copy is in eval mode. Everything drawn for the chip is
    keyed by ``seed``, the layer's path and the effect, so the same seed is the same chip whatever
    else has been drawn, and torch's global generator does not move.

    Args:
        model: any network. Linear, Conv1d to 3d and their transposes go onto arrays, with every
            option they have; so do the projections of MultiheadAttention and the matrices of LSTM,
            GRU, RNN and their cells, whose softmax and gates are digital. What holds a weight
            matrix and stays digital is in :attr:`Chip.digital`, with the reason.
        device: a :class:`Device`, or one effect such as ``PCM()``.
        seed: which chip; any integer.
        layers: which layers to program: paths or patterns such as ``"layer*"``, or a function of
            path and module; a layer of several matrices by its path, or one of them by its own.
            Default: all that can be.
        chips: how many, with seeds from ``seed`` on; they come as :class:`Chips`. Default: one, as
            a :class:`Chip`.

    Returns:
        The chip or chips, right after programming.

    Raises:
        ConfigError: no layer can be programmed, a pattern matches none, or weights are not finite.

    Examples:
        >>> import torch, evenkeel as ek
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.ReLU(), torch.nn.Linear(9, 4))
        >>> chip = ek.analog.program(net, ek.analog.PCM(), seed=1)
        >>> chip.age_(86_400).digital  # a day old, and nothing had to stay digital
        {}
    """
    if chips is not None and chips < 1:
        raise ConfigError(f"chips must be 1 or more; got {chips!r}.")
    array_of = functools.partial(
        AnalogLayer, device=as_device(device), keep_target=chips is not None
    )
    chosen = _choice(model, layers)
    digital: dict[str, str] = {}
    arrays: dict[int, nn.Module] = {}  # by identity: a layer used in two places is one array
    inside: tuple[str, ...] = ()  # what belongs to a layer that has been dealt with
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        name = unwrapped(model, path)
        if is_composite(module):
            inside += (f"{path}.".lstrip("."),)
            if (whole := expanded(module)) is None:
                digital[name] = _why_digital(module, known=False) or ""
            else:
                _put_parts(whole, name, array_of, chosen, digital)
                arrays[id(module)] = whole
            continue
        if parametrize.is_parametrized(module):
            inside += (f"{path}.parametrizations".lstrip("."),)
        weights = weight_layer(module)
        if weights is not None and chosen(name, module):
            arrays[id(module)] = array_of(module, weights, path=name)
        elif reason := _why_digital(module, known=weights is not None):
            digital[name] = reason
    programmed = [m for one in arrays.values() for m in one.modules() if isinstance(m, AnalogLayer)]
    if not programmed:
        held = (
            "; ".join(f"'{path}': {why}" for path, why in digital.items()) or "no layer has weights"
        )
        raise ConfigError(
            f"A chip needs at least one layer to program; {type(model).__name__} has none "
            f"({held}). Linear, convolutional, attention and recurrent layers can be programmed; "
            f"make other kinds known with evenkeel.layers.register_weight_layer."
        )
    write_(programmed, [operator.index(seed)])
    derive_(programmed)
    made = _copy_with(model, arrays)
    chip = Chip(made, as_device(device), operator.index(seed), digital)
    chip.training = False
    return chip if chips is None else Chips(chip, chips)


def _put_parts(
    whole: nn.Module,
    name: str,
    array_of: Callable[..., AnalogLayer],
    chosen: Callable[[str, nn.Module], bool],
    digital: dict[str, str],
) -> None:
    """Put those linear layers of a composite one onto arrays that are chosen."""
    for part, module in list(whole.named_children()):
        weights, path = weight_layer(module), f"{name}.{part}".lstrip(".")
        if weights is not None and chosen(path, module):
            setattr(whole, part, array_of(module, weights, path=path))
        elif weights is not None:
            digital[path] = "left out by `layers`"


def _choice(model: nn.Module, layers: LayerChoice) -> Callable[[str, nn.Module], bool]:
    if layers is None:
        return lambda path, module: True
    if callable(layers):
        return layers
    parts: dict[str, list[str]] = {}  # of each path that can be named; a whole one has several
    for path, module in model.named_modules():
        name, whole = unwrapped(model, path), expanded(module)
        if whole is not None:
            inside = [f"{name}.{part}".lstrip(".") for part, _ in whole.named_children()]
            parts |= {part: [part] for part in inside} | {name: inside}
        elif weight_layer(module) is not None:
            parts.setdefault(name, [name])
    chosen = {part for path in chosen_paths(layers, list(parts)) for part in parts[path]}
    return lambda path, module: path in chosen


def _why_digital(module: nn.Module, *, known: bool) -> str | None:
    """Why a module that itself holds a matrix of weights is not on an array."""
    if known:
        return "left out by `layers`"
    own = list(module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        own += module.parametrizations.parameters()  # type: ignore[union-attr]
    if is_composite(module):
        return (
            f"{type(module).__name__} has a forward of its own, or weights that are made by "
            f"parametrizations"
        )
    if any(p.dim() > 1 for p in own):
        return f"{type(module).__name__} is not a kind of layer that can be programmed"
    return None


def _copy_with(model: nn.Module, arrays: dict[int, nn.Module]) -> nn.Module:
    """A copy of the network in eval mode in which arrays stand where their layers stood.

    The copy is made with the replacements as already copied, so that every reference to a layer,
    shared ones too, leads to its array, and no digital weight is copied only to be dropped.
    """
    made = deepcopied(model, dict(arrays)).eval()
    for module in made.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # for that torch computes past the layers
    return made
