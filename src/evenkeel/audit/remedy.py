"""A row of an audit: remedies done one after the other."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from evenkeel.audit.names import resolve
from evenkeel.errors import ConfigError
from evenkeel.protocols import Bench, ChipRemedy, Device, Remedy, SharedRemedy


class Nothing:
    """The network as it is: the row that all others are compared with."""

    name = "none"
    needs_data = False
    advice = "Deploy the network as it is."

    def mend_(self, chip: Any, bench: Bench) -> dict[str, Any]:
        """Leave the chip as it is."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {"type": "Nothing", "version": 1}


@dataclass(frozen=True)
class Row:
    """Remedies in order, such as clip+drift+calibrate.

    Shared ones change the network before it is programmed; those that fit it to chips see chips on
    which the chip's own remedies that stand before them have been done.
    """

    parts: tuple[Remedy, ...]

    @property
    def name(self) -> str:
        """The parts' names, joined."""
        return "+".join(part.name for part in self.parts)

    @property
    def title(self) -> str:
        """For sentences: the parts' titles, or names where they have none."""
        return " and ".join(getattr(part, "title", part.name) for part in self.parts)

    @property
    def is_shared(self) -> bool:
        """Whether the network is changed before it is programmed."""
        return any(isinstance(part, SharedRemedy) for part in self.parts)

    @property
    def per_chip(self) -> bool:
        """Whether each chip needs something done to it."""
        return any(
            isinstance(part, ChipRemedy) and not isinstance(part, Nothing) for part in self.parts
        )

    @property
    def needs_data(self) -> bool:
        """Whether each chip needs data."""
        return any(isinstance(part, ChipRemedy) and part.needs_data for part in self.parts)

    @property
    def effort(self) -> int:
        """What it costs to deploy: 0 nothing, 1 once for all chips, 2 on each chip, 3 with data.

        From 4 on the same, and training before.
        """
        training = 4 * any(getattr(part, "trains", False) for part in self.parts)
        if self.per_chip:
            return training + (3 if self.needs_data else 2)
        return training + (1 if self.is_shared else 0)

    def why_not(self, model: nn.Module) -> str | None:
        """Why one of the parts is of no use to a network; a part that has no say is of use."""
        enabled: set[str] = set()
        for part in self.parts:
            reason = getattr(part, "why_not", lambda _: None)(model)
            if reason and part.name.split(":")[0] not in enabled:
                return str(reason)
            enabled.update(getattr(part, "enables", ()))
        return None

    def prepared(self, model: nn.Module, bench: "FitBench") -> nn.Module:
        """The network with the shared changes; the user's own stays as it is."""
        if not self.is_shared:
            return model
        changed = copy.deepcopy(model)
        for i, part in enumerate(self.parts):
            if isinstance(part, SharedRemedy):
                part.prepare_(changed, bench.behind(self.parts[:i]))
        return changed

    def mend_(self, chip: Any, bench: Bench) -> dict[str, Any]:
        """Do on the chip what is to be done on each; returns the facts."""
        facts: dict[str, Any] = {}
        for part in self.parts:
            if isinstance(part, ChipRemedy):
                facts |= part.mend_(chip, bench)
        return facts

    def to_dict(self) -> list[dict[str, Any]]:
        """The parts that count; "none" beside others adds nothing."""
        return [part.to_dict() for part in self.parts]


def as_row(remedy: "str | Remedy | Sequence[Remedy] | Row") -> Row:
    """A row from a name such as "drift+calibrate", a remedy, or several."""
    if isinstance(remedy, Row):
        return remedy
    if isinstance(remedy, str):
        return Row(tuple(resolve("remedies", name) for name in remedy.split("+")))
    parts = tuple(remedy) if isinstance(remedy, list | tuple) else (remedy,)
    for part in parts:
        if not isinstance(part, SharedRemedy | ChipRemedy):
            raise ConfigError(
                f"A remedy has a name and prepare_(model, bench) or mend_(chip, bench) with "
                f"needs_data; {type(part).__name__} has neither. See evenkeel.protocols."
            )
    return Row(parts)


@dataclass(frozen=True)
class FitBench:
    """What remedies may use, and chips to fit shared changes to.

    These chips have seeds of their own, below zero: no chip that is tested is among them.
    """

    batches: Sequence[Any]
    forward: Any
    device: Device
    ages_s: Sequence[float]
    seed: int = 0
    num_chips: int = 8
    before: tuple[Remedy, ...] = ()

    def behind(self, parts: tuple[Remedy, ...]) -> "FitBench":
        """The bench for a remedy that comes after ``parts``."""
        return replace(self, before=parts)

    def chips(self, model: nn.Module) -> Iterator[Any]:
        """Each fitting chip at each audited age, with the remedies before this one done."""
        for k in range(self.num_chips):
            chip = None
            for age_s in self.ages_s:
                if chip is None or self.before:  # mended once, a chip is no fresh one any more
                    chip = self.device.program(model, seed=fitting_seed(self.seed, k))
                chip.age_(age_s)
                chip.rewind_("fit")
                for part in self.before:
                    if isinstance(part, ChipRemedy):
                        part.mend_(chip, self)
                yield chip


def fitting_seed(seed: int, k: int) -> int:
    """Seed of the k-th chip that shared changes are fitted to: -1, -2, ... for seed 0."""
    return -(abs(seed) * 1000 + k + 1)
