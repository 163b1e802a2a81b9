"""Where a training runs, and with how many bits: lightning-fabric's part."""

from typing import TYPE_CHECKING, Any

from evenkeel.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def launched(precision: str, *, who: str, **where: Any) -> "Fabric":
    """A launched ``Fabric`` of that precision; ``where`` as it takes devices.

    Raises:
        MissingExtraError: lightning-fabric is not installed; ``who`` needs it.
    """
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise MissingExtraError(who, "train") from error
    try:
        fabric = Fabric(precision=precision, **where)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(
            f"precision must be one that lightning-fabric knows, such as 32-true or bf16-mixed; "
            f"got {precision!r}."
        ) from error
    fabric.launch()
    return fabric
