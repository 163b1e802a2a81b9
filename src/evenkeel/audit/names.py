"""From what a user writes to the object meant: ``pcm``, ``gaussian:0.05``, ``mine:Device:3``."""

import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from evenkeel.errors import ConfigError, nearest


def known(kind: str) -> list[str]:
    """Names of a kind ("devices", "remedies" or "tasks"), from every installed package."""
    return sorted(entry_points(group=f"evenkeel.{kind}").names)


def resolve(kind: str, text: str) -> Any:
    """The object that a text names.

    Args:
        kind: "devices", "remedies" or "tasks".
        text: a known name, or ``module:Class`` of your own, then settings: ``:value`` in the order
            of the class's fields or ``:field=value``.

    Examples:
        >>> resolve("devices", "stuck_at:0.01:high=0.02").name
        'StuckAt(0.01, high=0.02)'
    """
    name, *settings = text.strip().split(":")
    found = entry_points(group=f"evenkeel.{kind}", name=name)
    if found:
        made = next(iter(found)).load()
    elif settings and not name.replace(".", "").isidentifier():
        raise ConfigError(f"{text!r} is not a name of a known kind.")
    elif settings and "=" not in settings[0] and settings[0].isidentifier():
        made, settings = import_from(f"{name}:{settings[0]}"), settings[1:]
    else:
        single = {"devices": "device", "remedies": "remedy", "tasks": "task"}[kind]
        raise ConfigError(
            f"Unknown {single} {name!r}. {nearest(name, known(kind))} One of your own is named as "
            f"module:Class."
        )
    positional = [_value(s) for s in settings if "=" not in s]
    named = dict(s.split("=", 1) for s in settings if "=" in s)
    try:
        return made(*positional, **{k: _value(v) for k, v in named.items()})
    except TypeError as error:
        raise ConfigError(f"{text!r} does not fit {made.__name__}: {error}.") from error


def import_from(text: str) -> Any:
    """The attribute of ``module:attribute``; the working folder counts as installed."""
    module, _, attribute = text.partition(":")
    if not module or not attribute:
        raise ConfigError(f"Expected module:attribute; got {text!r}.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise  # the module is there; something that it imports is not
        raise ConfigError(
            f"No module named {module!r} for {text!r}; it must be installed or lie in this folder."
        ) from error
    if not hasattr(found, attribute):
        raise ConfigError(
            f"Module {module!r} has no {attribute!r}. "
            f"{nearest(attribute, [n for n in dir(found) if n[0] != '_'])}"
        )
    return getattr(found, attribute)


def _value(text: str) -> float | str | bool | None:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return float(text)
    except ValueError:
        return text
