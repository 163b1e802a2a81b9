"""A memory as a description that JSON can hold, beside its tensors."""

from dataclasses import asdict
from typing import Any

import torch

from evenkeel.analog import Converter, Device, DeviceModel
from evenkeel.analog.described import device_from
from evenkeel.errors import ConfigError
from evenkeel.memory.crossbar import CrossbarMemory
from evenkeel.memory.key_value import KeyValueMemory

LABELS = (str, int, float, bool, type(None))


def described(memory: KeyValueMemory) -> dict[str, Any]:
    """What it was made with, its classes, and the crossbar it is on."""
    if wrong := [c for c in memory.classes if type(c) not in LABELS]:
        raise ConfigError(
            f"Labels must be text, numbers, bools or None to be saved; got {wrong[0]!r}. Write the "
            f"memory with such labels, or keep them in a list of your own and write its indices."
        )
    options = memory.options()
    description = {
        "dim": memory.dim,
        "options": options | {"dtype": str(options["dtype"]).removeprefix("torch.")},
        "classes": list(memory.classes),
        "crossbar": None,
    }
    if isinstance(memory, CrossbarMemory):
        description["crossbar"] = {
            "device": memory.columns.device.to_dict(),
            "seed": memory.columns.seed,
            "converter": memory.converter and asdict(memory.converter),
        }
    return description


def built(
    description: dict[str, Any], given: Device | DeviceModel | None, path: object
) -> KeyValueMemory:
    """The memory of a description, whose tensors are then loaded; ``given`` as a device's."""
    options = description["options"]
    options = options | {"dtype": getattr(torch, options["dtype"])}
    crossbar = description["crossbar"]
    if crossbar is None:
        memory = KeyValueMemory(description["dim"], **options)
    else:
        converter = crossbar["converter"]
        memory = CrossbarMemory(
            description["dim"],
            device_from(crossbar["device"], given, path),
            seed=crossbar["seed"],
            converter=converter and Converter(**converter),
            **options,
        )
    memory.classes = list(description["classes"])
    return memory
