"""Where a training runs, and with how many bits: lightning-fabric's part."""

from typing import TYPE_CHECKING, Any

from evenkeel.errors import MissingExtraError

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
    fabric = Fabric(precision=precision, **where)  # type: ignore[arg-type]
    fabric.launch()
    return fabric
