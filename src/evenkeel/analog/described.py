"""Devices from the description that a file or a store keeps of them."""

from typing import Any

from evenkeel.analog.converter import Converter
from evenkeel.analog.device import Device, DeviceModel, as_device
from evenkeel.analog.faults import StuckAt
from evenkeel.analog.hermes import HERMES
from evenkeel.analog.measured import Measured
from evenkeel.analog.pcm import PCM, StateIndependent
from evenkeel.analog.periphery import Periphery
from evenkeel.analog.reram import CMOHfOx, MiloReRAM, WanReRAM
from evenkeel.analog.slices import Slices
from evenkeel.analog.statistical import Gain, Gaussian, LogNormal, Spread
from evenkeel.errors import ConfigError

_MODELS: dict[str, type[DeviceModel]] = {
    kind.__name__: kind
    for kind in (
        PCM, HERMES, StateIndependent, WanReRAM, MiloReRAM, CMOHfOx, Measured,
        Gaussian, LogNormal, Spread, Gain, StuckAt,
    )
}  # fmt: skip


def device_from(config: dict[str, Any], given: Device | DeviceModel | None, path: object) -> Device:
    """The device of ``Device.to_dict``; ``given`` by the user where its effects are not our own.

    Args:
        config: the description.
        given: what the user passes to :func:`evenkeel.load`; it must be what is described.
        path: of the file, for the errors.
    """
    if given is not None:
        device = as_device(given)
        if _without_paths(device.to_dict()) != _without_paths(config):
            raise ConfigError(
                f"{path} holds a chip of the device {config}; the device given is "
                f"{device.to_dict()}. Pass the same; or none, if its effects are evenkeel's own."
            )
        return device
    effects = []
    for fields in config["models"]:
        kind = fields["type"]
        if kind not in _MODELS:
            raise ConfigError(
                f"The chip's device has the effect {kind!r}, which is not evenkeel's own. Pass it: "
                f"load(path, device=Device({kind.split(':')[-1]}(...)))."
            )
        settings = {k: v for k, v in fields.items() if k not in ("type", "version")}
        effects.append(_MODELS[kind](**settings))
    return Device(
        *effects,
        scale_per=config["scale_per"],
        g_max=config["g_max"],
        periphery=_periphery_from(config.get("periphery")),
        slices=Slices(**config["slices"]) if "slices" in config else None,
    )


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Files may lie elsewhere; what was in them is told besides."""
    models = [{k: v for k, v in fields.items() if k != "path"} for fields in config["models"]]
    return config | {"models": models}


def _periphery_from(config: dict[str, Any] | None) -> Periphery | None:
    if config is None:
        return None
    converters = {k: config[k] and Converter(**config[k]) for k in ("dac", "adc")}
    return Periphery(**config | converters)
