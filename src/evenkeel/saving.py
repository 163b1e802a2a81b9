"""save and load: safetensors with a versioned JSON description, never a pickle."""

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from evenkeel import analog, models, norm
from evenkeel.analog.described import device_from
from evenkeel.analog.device import Device
from evenkeel.calibrate import Calibration
from evenkeel.calibrate.match import matched_paths, put_behind_empty
from evenkeel.errors import ConfigError
from evenkeel.files import write_atomically
from evenkeel.layers import unwrapped, weight_layer

FORMAT = 1
_HEADER = "evenkeel"


def save(item: nn.Module | Calibration, path: str | Path, **about: Any) -> None:
    """Write a network, a chip, a memory or a calibration as safetensors with a description in JSON.

    Args:
        item: a :class:`evenkeel.analog.Chip` (bit for bit: conductances, age, faults), a
            :class:`evenkeel.memory.KeyValueMemory`, on a crossbar too, a calibration's statistics,
            or any network's tensors.
        path: written whole or not at all.
        about: facts to keep with it, ready for JSON; :func:`describe` reads them.

    Examples:
        >>> import tempfile, torch, evenkeel as ek
        >>> net = torch.nn.Linear(4, 2)
        >>> chip = ek.analog.program(net, ek.analog.PCM(), seed=3).age_(3600)
        >>> path = tempfile.mkdtemp() + "/chip.safetensors"
        >>> ek.save(chip, path)
        >>> ek.load(path, model=net).age_s
        3600.0
    """
    description: dict[str, Any] = {"format": FORMAT, "about": about}
    if isinstance(item, analog.Chip):
        description |= {
            "type": "Chip",
            "device": item.device.to_dict(),
            "seed": item.seed,
            "layers": [unwrapped(item.model, path) for path, _ in item.arrays()],
            "model": models.config_of(item.model),
        }
    elif isinstance(item, Calibration):
        description |= {"type": "Calibration", "certificate": item.to_dict()}
    elif _is_memory(item):
        from evenkeel.memory.described import described

        description |= {"type": "Memory", **described(item)}  # type: ignore[arg-type]
    else:
        description |= {"type": "Network", "model": models.config_of(item)}
    network = item.model if isinstance(item, analog.Chip) else item
    if isinstance(network, nn.Module):
        description |= {kind: found for kind, found in _additions(network).items() if found}
    state = dict(item.state_dict())
    if _is_memory(item):
        del state["_extra_state"]  # the classes, which are in the description
    if other := [k for k, v in state.items() if not isinstance(v, Tensor)]:
        raise ConfigError(
            f"Only tensors can be saved; '{other[0]}' of {type(item).__name__} is none. A memory "
            f"inside of a network is saved by itself."
        )
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    write_atomically(path, to_bytes(tensors, {_HEADER: json.dumps(description)}))


def load(path: str | Path, *, model: nn.Module | None = None, device: Device | None = None) -> Any:
    """Read what :func:`save` wrote.

    Args:
        path: the file.
        model: the network that the tensors belong to, if it is not one of evenkeel's own; it is
            changed in place for a network or a calibration, and copied for a chip.
        device: the chip's device, if it is made of effects of the user's own.

    Returns:
        The network, the chip or the memory.

    Raises:
        ConfigError: the file is missing, damaged, a pickle (which is never opened), or does not
            fit.
    """
    tensors, description = read(path)
    kind = description.get("type", "Network")
    config = description.get("model")
    if kind == "Memory":
        from evenkeel.memory.described import built

        memory = built(description, device, path)
        lacking = [k for k in memory.state_dict() if k not in tensors and k != "_extra_state"]
        if lacking:
            raise ConfigError(f"{path} is damaged: a memory needs '{lacking[0]}', and it has none.")
        memory.load_state_dict(tensors, strict=False)
        return memory
    if model is not None:
        network = model
    elif config is not None:
        network = models.build(config["name"], **config["options"]).eval()
    else:
        raise ConfigError(
            f"{path} holds the tensors of a {kind.lower()} but not the code of its network. Pass "
            f"it: load(path, model=...)."
        )
    if model is not None and kind == "Chip":
        network = copy.deepcopy(network)
    undo = _add(network, description, path)
    if kind == "Chip":
        device = device_from(description["device"], device, path)
        network = analog.program(
            network, device, seed=description["seed"], layers=description["layers"]
        )
    try:
        load_tensors(network, tensors, path, strict=kind != "Calibration")
    except ConfigError:
        undo()
        raise
    return network


def _is_memory(item: object) -> bool:
    room = sys.modules.get("evenkeel.memory")  # where it was not imported, there is none
    return room is not None and isinstance(item, room.KeyValueMemory)


def describe(path: str | Path) -> dict[str, Any]:
    """The description alone: type, device, seed, certificate, and what was given as ``about``."""
    return read(path)[1]


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a safetensors file; anyone's file has an empty description."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"No file {path}. Give a safetensors file that holds the weights.")
    with path.open("rb") as file:
        start = file.read(9)
    is_json = start[8:] == b"{"  # safetensors: eight bytes of length, then the header
    if not is_json and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise ConfigError(
            f"{path} is a pickle, as torch.save writes it; it can hold code and is not opened. "
            "Write the weights as safetensors: safetensors.torch.save_file(model.state_dict(), "
            "path)."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        description = json.loads(metadata.get(_HEADER, "{}"))
        needed = {"Chip": {"device", "seed", "layers"}}
        if not isinstance(description, dict) or (
            needed.get(description.get("type", ""), set()) - set(description)
        ):
            raise ValueError(f"its description is {description!r}")
    except (SafetensorError, ValueError) as error:
        raise ConfigError(f"{path} is damaged or no safetensors file: {error}.") from error
    if description.get("format", 0) > FORMAT:
        raise ConfigError(f"{path} was written by a newer evenkeel; update evenkeel to read it.")
    return tensors, description


def load_tensors(
    model: nn.Module, tensors: dict[str, Tensor], path: str | Path, *, strict: bool = True
) -> None:
    """Load tensors into a network, or say which do not fit; the network is then left as it was."""
    own = model.state_dict()
    wrong = [f"'{k}' is missing" for k in own if strict and k not in tensors]
    wrong += [f"'{k}' is not in the network" for k in tensors if k not in own]
    wrong += [
        f"'{k}' is {tuple(v.shape)} in the file and {tuple(own[k].shape)} in the network"
        for k, v in tensors.items()
        if k in own and own[k].shape != v.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        some = "; ".join(wrong[:3])
        raise ConfigError(
            f"The weights in {path} do not fit {type(model).__name__}: {some}{more}. Check that "
            f"the file belongs to this architecture and its options."
        )
    with torch.no_grad():
        model.load_state_dict(tensors, strict=False)


_NORMALIZERS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        norm.NoiseAwareBatchNorm,
        norm.NoiseAwareBatchNorm1d,
        norm.NoiseAwareBatchNorm2d,
        norm.NoiseAwareBatchNorm3d,
        norm.BatchChannelNorm,
        norm.BatchChannelNorm1d,
        norm.BatchChannelNorm2d,
        norm.BatchChannelNorm3d,
        norm.GhostBatchNorm2d,
    )
}


def _additions(network: nn.Module) -> dict[str, dict[str, Any]]:
    """What evenkeel has put into a network, by path, as far as a file must tell of it."""
    from evenkeel.balance.rescaled import rescaled_paths

    return {
        "rescaled": dict.fromkeys(rescaled_paths(network), True),
        "matched": matched_paths(network),
        "normalizers": {
            path: {"type": type(m).__name__, **m.options()}
            for path, m in network.named_modules()
            if type(m).__name__ in _NORMALIZERS and type(m) is _NORMALIZERS[type(m).__name__]
        },
        "standardized": norm.weight_standard.standardized_paths(network),
    }


def _add(network: nn.Module, description: dict[str, Any], file: str | Path) -> Callable[[], None]:
    """Put into a network what a file's description tells of and it lacks; returns the way back."""
    from evenkeel.balance.rescaled import put_around_empty

    rescaled, matched, normalizers, standardized = (
        {path: how for path, how in description.get(kind, {}).items() if path not in there}
        for kind, there in _additions(network).items()
    )
    modules = dict(network.named_modules())
    layers = [_bare(path, modules) for path in (*rescaled, *matched, *standardized)]
    wrong = [p for p in layers if p not in modules or weight_layer(modules[p]) is None]
    wrong += [p for p in normalizers if not norm.convert.is_normalizer(modules.get(p, network))]
    if wrong:
        raise ConfigError(
            f"The weights in {file} do not fit {type(network).__name__}: '{wrong[0]}' is not the "
            f"layer there that the file tells of. Check that it belongs to this architecture."
        )
    taken_off = [
        norm.standardize_weights_(network, [path], eps=eps).undo
        for path, eps in standardized.items()
    ]
    for path in sorted((*rescaled, *matched), key=len):  # what is around another comes first
        if path in rescaled:
            put_around_empty(network, path)
        else:
            put_behind_empty(network, {path: matched[path]})
    for path, settings in normalizers.items():
        options = dict(settings)
        make = functools.partial(_NORMALIZERS[options.pop("type")], **options)
        network.set_submodule(path, norm.convert.in_place_of(modules[path], make))
        for name in ("eps", "momentum"):  # the old one's have gone over
            if name in settings:
                setattr(network.get_submodule(path), name, settings[name])

    def undo() -> None:
        for path in (*rescaled, *matched, *normalizers):
            if path in modules:
                network.set_submodule(path, modules[path])
        for take_off in taken_off:
            take_off()

    return undo


def _bare(path: str, modules: dict[str, nn.Module]) -> str:
    """The layer's own path, where wrappers were around it."""
    while path not in modules and path.endswith(".layer"):
        path = path.removesuffix(".layer")
    return path
