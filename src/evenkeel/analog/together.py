"""What happens to many arrays of a device at once: programming, and a read at some age."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor

from evenkeel.analog import blocks
from evenkeel.analog.blocks import Found, Named, blockwise, layout, size_of
from evenkeel.analog.device import Device, State
from evenkeel.analog.reads import read_moments
from evenkeel.draws import Draws, in_turn
from evenkeel.errors import ConfigError

LAUNCHED = 32
"""Times as many devices are taken at once where each operation has to be launched."""


def written(device: Device, targets: Sequence[Tensor], draws: Sequence[Draws]) -> list[Named]:
    """Of each array what is left after programming: ``programmed``, and ``state_{effect}_{name}``.

    Args:
        device: what happens.
        targets: conductances in µS, (2, outputs, inputs).
        draws: of each array.
    """

    def write(g: Tensor, draws: Draws) -> Named:
        with _left_alone(device, [g]):
            programmed, states = device.write(g, draws)
        named = {f"state_{i}_{k}": v for i, state in enumerate(states) for k, v in state.items()}
        return {"programmed": programmed, **named}

    if not _alike(device, targets):
        return [write(g, of) for g, of in zip(targets, draws, strict=True)]
    pieces = layout([g.numel() for g in targets], _size(targets[0]))
    places = [(size_of(block), [(p.array, p.at, p.number) for p in block]) for block in pieces]
    turns, arrays = in_turn(draws, places), [{"target": g} for g in targets]
    left = blockwise(lambda block: write(block["target"], next(turns)), arrays, pieces)
    return cast(list[Named], left)


def at_age(device: Device, arrays: Sequence[Named], age_s: float, *, moments: bool) -> list[Found]:
    """Of each array what a read finds: ``mean`` and ``spread``, which is None where it is exact.

    Args:
        device: what happens.
        arrays: what :func:`written` has left.
        age_s: seconds since programming.
        moments: whether these are mean and variance of a read, of which none is below zero; else
            the conductances and the deviation of one read about them.
    """

    def read(array: Named) -> Found:
        programmed, states = array["programmed"], states_of(array, len(device.models))
        with _left_alone(device, list(array.values())):
            mean = device.drift(programmed, states, age_s)
            spread = device.read_std(mean, programmed, states, age_s)
        if spread is not None and moments:
            mean, spread = read_moments(mean, spread)
        return {"mean": mean, "spread": spread}

    programmed = [array["programmed"] for array in arrays]
    if not _alike(device, programmed):
        return [read(array) for array in arrays]
    pieces = layout([g.numel() for g in programmed], _size(programmed[0]))
    return blockwise(read, arrays, pieces)


@contextlib.contextmanager
def _left_alone(device: Device, given: Sequence[Tensor]) -> Iterator[None]:
    """Refuse effects that write into what they are given."""
    before = [_version(value) for value in given]
    yield
    if [_version(value) for value in given] != before:
        raise ConfigError(
            f"{device.name} must leave the conductances and states that it is given as they are, "
            f"for they are needed again; it changed some in place. Let it make new ones: g * 0.5 "
            f"instead of g.mul_(0.5)."
        )


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def states_of(named: Named, effects: int) -> list[State]:
    """The state of each effect, out of what :func:`written` gives."""
    prefixes = [f"state_{i}_" for i in range(effects)]
    return [
        {name.removeprefix(p): value for name, value in named.items() if name.startswith(p)}
        for p in prefixes
    ]


def _alike(device: Device, tensors: Sequence[Tensor]) -> bool:
    """Whether the devices of all arrays, which then must have some, can lie in one row."""
    return (
        all(m.elementwise for m in device.models)
        and all(g.numel() for g in tensors)
        and len({g.device for g in tensors}) == 1
    )


def _size(g: Tensor) -> int:
    return blocks.BLOCK * (1 if g.device.type == "cpu" else LAUNCHED)
