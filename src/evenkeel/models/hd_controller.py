"""The controller of the high-dimensional memory, by name."""

from typing import TYPE_CHECKING, Any

from evenkeel.models.registry import architecture

if TYPE_CHECKING:
    from evenkeel.memory import HDController


@architecture("hd_controller")
def hd_controller(**options: Any) -> "HDController":
    """:class:`evenkeel.memory.HDController` with these options."""
    from evenkeel.memory import HDController  # others do without it

    return HDController(**options)
