"""Balancing before a network is programmed, as an audit knows it."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from evenkeel.balance.arrays import balance_arrays_
from evenkeel.balance.balance import balance_
from evenkeel.batches import example_of
from evenkeel.errors import ConfigError, nearest
from evenkeel.protocols import Bench

Kind = Literal["norm", "arrays"]


@dataclass(frozen=True)
class BalanceWeights:
    """:func:`evenkeel.balance_` before programming, or :func:`evenkeel.balance.balance_arrays_`.

    ``kind`` "norm" moves scales between layers, to the least norm of power ``p``, and costs nothing
    at inference; "arrays" gives each layer digital scales around it that make its noise least.
    """

    kind: Kind = "norm"
    p: float = 2.0
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(
                f"Unknown kind of balance {self.kind!r}. {nearest(self.kind, get_args(Kind))}"
            )

    @property
    def name(self) -> str:
        """With the settings that are not the default."""
        kind = [] if self.kind == "norm" else [self.kind]
        return ":".join(["balance", *kind, *([] if self.p == 2 else [f"p={self.p:g}"])])

    @property
    def title(self) -> str:
        """For sentences."""
        return "balancing" if self.kind == "norm" else "balancing for arrays"

    @property
    def advice(self) -> str:
        """How to do it."""
        if self.kind == "norm":
            return (
                "Deploy the network of `mended.safetensors`, which computes the same with weights "
                "balanced between layers: `ek.balance_(model, example_inputs)`."
            )
        return (
            "Deploy the network of `mended.safetensors`: around each layer it has digital scales "
            "for inputs and outputs, and on its array weights that make less noise: "
            "`ek.balance.balance_arrays_(model, batches)`."
        )

    def prepare_(self, model: nn.Module, bench: Bench) -> None:
        """Balance the digital network."""
        if self.kind == "arrays":
            balance_arrays_(model, bench.batches, forward=bench.forward)
        else:
            balance_(model, example_of(bench.batches[0]), p=self.p)

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""
        return {"type": "BalanceWeights", "version": self.version, **asdict(self)}
