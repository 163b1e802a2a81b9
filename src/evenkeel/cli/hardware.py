"""Devices by name, with the converters and tiles that are asked for around them."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from evenkeel.analog import Converter, Device, Periphery
from evenkeel.analog.device import as_device
from evenkeel.audit.names import resolve
from evenkeel.errors import ConfigError
from evenkeel.protocols import Device as AnyDevice


def devices_from(
    names: Sequence[str], dac: int | None, adc: int | None, rows: int | None, own_reads: bool
) -> Sequence[str | AnyDevice]:
    """The names; or, where anything around the arrays is asked for, the devices with it."""
    if dac is adc is rows is None and not own_reads:
        return names
    asked = {
        "dac": dac and Converter(dac),
        "adc": adc and Converter(adc),
        "rows": rows,
        "reads": "each" if own_reads else None,
    }
    asked = {setting: value for setting, value in asked.items() if value is not None}
    return [_with(name, asked) for name in names]


def _with(name: str, asked: dict[str, Any]) -> Device:
    device = resolve("devices", name)
    try:
        made = copy.copy(as_device(device))
    except ConfigError as error:
        raise ConfigError(
            f"--dac, --adc, --rows and --own-reads are for evenkeel's own devices; {name!r} is "
            f"another. Put them into its own settings."
        ) from error
    made.periphery = dataclasses.replace(made.periphery or Periphery(), **asked)
    return made
