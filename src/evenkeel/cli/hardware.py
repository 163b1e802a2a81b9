"""Devices by name, with the converters and tiles that are asked for around them."""

from collections.abc import Sequence

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
    around = Periphery(
        dac=None if dac is None else Converter(dac),
        adc=None if adc is None else Converter(adc),
        rows=rows,
        reads="each" if own_reads else "shared",
    )
    return [_with(name, around) for name in names]


def _with(name: str, around: Periphery) -> Device:
    device = resolve("devices", name)
    try:
        bare = as_device(device)
    except ConfigError as error:
        raise ConfigError(
            f"--dac, --adc, --rows and --own-reads are for evenkeel's own devices; {name!r} is "
            f"another. Put them into its own settings."
        ) from error
    return Device(*bare.models, scale_per=bare.scale_per, g_max=bare.g_max, periphery=around)
