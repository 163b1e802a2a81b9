"""What an audit will run: every trial, known before the first one starts."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evenkeel.audit.remedy import Row
from evenkeel.errors import ConfigError
from evenkeel.protocols import Device, Task

EVALUATION_VERSION = 1
"""Raised when the way a trial is run changes, so that old results are not mistaken for new ones."""

_UNITS = {
    "s": 1.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 604800.0,
    "mo": 2629746.0,
    "y": 31556952.0,
}


def parse_age(text: str | float) -> float:
    """Seconds of an age such as 0, 90s, 1h, 1d, 1mo (30.4 days) or 1y.

    Examples:
        >>> parse_age("1d")
        86400.0
    """
    if isinstance(text, int | float):
        seconds = float(text)
    else:
        match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)\s*", text.lower())
        if match is None or (match[2] or "s") not in _UNITS:
            raise ConfigError(
                f"An age is a number and a unit, such as 0, 1h, 1d, 1mo or 1y; got {text!r}. "
                f"Units: {', '.join(_UNITS)}."
            )
        seconds = float(match[1]) * _UNITS[match[2] or "s"]
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"An age must be finite and not negative; got {text!r}.")
    return seconds


def age_label(seconds: float) -> str:
    """The shortest way to write an age.

    Examples:
        >>> [age_label(s) for s in (0, 3600, 2629746)]
        ['0', '1h', '1mo']
    """
    if seconds == 0:
        return "0"
    for unit, size in reversed(_UNITS.items()):
        if seconds >= size:
            return f"{seconds / size:.3g}{unit}"
    return f"{seconds:.3g}s"


@dataclass(frozen=True)
class Trial:
    """One chip, at one age, with one row of remedies; positions refer to the plan's lists."""

    device: int
    age_s: float
    row: int
    chip: int
    key: str
    identity: str


@dataclass(frozen=True)
class Plan:
    """Devices x ages x rows x chips, and what identifies each trial in the store.

    Args:
        devices: hardware, each level an entry of its own.
        ages_s: ages to visit; devices that do not age are visited at 0 only.
        rows: remedies; the first is the one that the others are compared with.
        task: what is measured.
        seed: of the audit; chip k has the seed ``seed + k``.
        model: fingerprint of the network.
        data: fingerprint of the data.
    """

    devices: Sequence[Device]
    ages_s: Sequence[float]
    rows: Sequence[Row]
    task: Task
    seed: int
    model: str
    data: str

    def ages_of(self, device: Device) -> tuple[float, ...]:
        """Ages at which this device is visited."""
        return tuple(self.ages_s) if device.ages else (0.0,)

    def cells(self) -> list[tuple[int, float, int]]:
        """Every (device, age, row), in the order of a table."""
        return [
            (d, age_s, r)
            for d, device in enumerate(self.devices)
            for age_s in self.ages_of(device)
            for r in range(len(self.rows))
        ]

    def trial(self, device: int, age_s: float, row: int, chip: int) -> Trial:
        """The trial with its key: a hash of all that its result depends on."""
        chosen, hardware = self.rows[row], self.devices[device]
        identity: dict[str, Any] = {
            "model": self.model,
            "data": self.data,
            "task": self.task.to_dict(),
            "device": hardware.to_dict(),
            "age_s": age_s,
            "remedy": chosen.to_dict(),
            "chip": chip,
            "evaluation": EVALUATION_VERSION,
        }
        if chosen.is_shared:  # fitted to other chips, at all the ages audited
            identity["fit"] = {"ages_s": self.ages_of(hardware), "seed": self.seed}
        text = json.dumps(identity, sort_keys=True)
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return Trial(device, age_s, row, chip, key, text)

    def trials(self, chips: Sequence[int], cells: Sequence[tuple[int, float, int]]) -> list[Trial]:
        """Trials of the cells, chip by chip, so that an interrupted audit has whole chips."""
        return [self.trial(*cell, self.seed + k) for k in chips for cell in cells]
