"""The online layer, as an audit knows it."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import nn

from evenkeel.norm.convert import convert_, why_not
from evenkeel.norm.noise_aware import NoiseAwareBatchNorm
from evenkeel.protocols import Bench


@dataclass(frozen=True)
class Online:
    """Every batch norm replaced by one that follows the hardware while it serves."""

    window: int = 256
    update_rate: float = 0.1
    title: ClassVar[str] = "the online layer"
    advice: ClassVar[str] = (
        "Deploy the network of `mended.safetensors`, whose batch norms follow the hardware while "
        "it serves: `ek.norm.convert_(model, ek.norm.NoiseAwareBatchNorm)`. Let the first 1,024 "
        "inputs be mixed."
    )
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", int(self.window))
        NoiseAwareBatchNorm(1, window=self.window, update_rate=self.update_rate)  # or says why not

    @property
    def name(self) -> str:
        """With the settings that are not the default."""
        changed = [
            f"{field.name}={getattr(self, field.name):g}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ":".join(["online", *changed])

    def why_not(self, model: nn.Module) -> str | None:
        """It needs batch norms to take the place of."""
        if any(why_not(module) is None for module in model.modules()):
            return None
        return f"The online layer takes the place of batch norm; {type(model).__name__} has none."

    def prepare_(self, model: nn.Module, bench: Bench) -> None:
        """Replace every batch norm."""
        options: dict[str, Any] = {"window": self.window, "update_rate": self.update_rate}
        convert_(model, lambda channels: NoiseAwareBatchNorm(channels, **options))

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""
        return {"type": "Online", "version": self.version, **asdict(self)}
