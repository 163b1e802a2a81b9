"""Devices by name, with what is asked for around their arrays."""

import copy
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from evenkeel.analog import Converter, Device, Periphery, Slices
from evenkeel.analog.device import as_device
from evenkeel.audit.names import resolve
from evenkeel.errors import ConfigError
from evenkeel.protocols import Device as AnyDevice

Flag = Annotated[bool, Parameter(negative="")]


@Parameter(name="*")
@dataclass(frozen=True)
class Around:
    """What stands around the arrays, and how they hold weights; ideal unless asked for.

    Parameters
    ----------
    dac
        Bits of the converters before the arrays; default ideal ones.
    serial
        Inputs enter as bits, one after the other; as many as --dac has.
    adc
        Bits of the converters behind the arrays; default ideal ones.
    rows
        Inputs of a tile; currents of different tiles are converted one by one.
    slices
        Arrays that hold one weight, and bits of each: 4x2.
    own_reads
        Every product with an input vector has read noise of its own, instead of every forward pass.
    output_noise
        Deviation of each current, in products of the largest input and the largest conductance;
        default none.
    wire_ohm
        Resistance of the wire between two rows, along which the voltage drops; default none.
    """

    dac: int | None = None
    serial: Flag = False
    adc: int | None = None
    rows: int | None = None
    slices: str | None = None
    own_reads: Flag = False
    output_noise: float | None = None
    wire_ohm: float | None = None

    def devices(self, names: Sequence[str]) -> Sequence[str | AnyDevice]:
        """The names; or, where anything is asked for, the devices with it."""
        return names if self == IDEAL else [self._device(name) for name in names]

    def _device(self, name: str) -> Device:
        device = resolve("devices", name)
        try:
            made = copy.copy(as_device(device))
        except ConfigError as error:
            raise ConfigError(
                f"--dac, --adc, --rows and the like are for evenkeel's own devices; {name!r} is "
                f"another. Put them into its own settings."
            ) from error
        if asked := self._periphery():
            made.periphery = dataclasses.replace(made.periphery or Periphery(), **asked)
        if self.slices is not None:
            made.slices = _slices(self.slices)
        return made

    def _periphery(self) -> dict[str, Any]:
        asked = {
            "dac": None if self.dac is None else Converter(self.dac),
            "serial": self.serial or None,
            "adc": None if self.adc is None else Converter(self.adc),
            "rows": self.rows,
            "reads": "each" if self.own_reads else None,
            "output_noise": self.output_noise,
            "wire_ohm": self.wire_ohm,
        }
        return {setting: value for setting, value in asked.items() if value is not None}


IDEAL = Around()


def _slices(text: str) -> Slices:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise ConfigError(
            f"--slices must be arrays of a weight times bits of each, such as 4x2; got {text!r}."
        )
    return Slices(int(found[1]), bits=int(found[2]))
