"""evenkeel keeps neural networks accurate when the arithmetic under them is not."""

import importlib
from typing import TYPE_CHECKING, Any

from evenkeel import analog as analog
from evenkeel import norm as norm
from evenkeel.audit import Audit as Audit
from evenkeel.audit import audit as audit
from evenkeel.calibrate import Calibration as Calibration
from evenkeel.calibrate import calibrate_ as calibrate_
from evenkeel.saving import load as load
from evenkeel.saving import save as save

if TYPE_CHECKING:
    from evenkeel import memory as memory
    from evenkeel import quaternion as quaternion
    from evenkeel.balance import Balance as Balance
    from evenkeel.balance import Balancer as Balancer
    from evenkeel.balance import balance_ as balance_

_ROOMS = ("balance", "memory", "quaternion")
_BALANCE = ("Balance", "Balancer", "balance_")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:  # an import is cheap: much does without them
        return importlib.import_module(f"evenkeel.{name}")
    if name in _BALANCE:
        return getattr(importlib.import_module("evenkeel.balance"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_BALANCE})
