"""What a run needs to go on as if it had not been killed."""

import io
from pathlib import Path
from typing import Any

import torch

from evenkeel.errors import ConfigError
from evenkeel.files import write_atomically


def store(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all; the random state goes with it."""
    file = io.BytesIO()
    torch.save({"identity": identity, "rng": torch.get_rng_state(), **state}, file)
    write_atomically(path, file.getvalue())


def restore(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state that was stored, if there is one, and the random state with it.

    Only tensors and plain values are read; a file with code in it is refused by torch.
    """
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["identity"] != identity:
        raise ConfigError(
            f"{path} is the checkpoint of another run: {state['identity']}, and this one is "
            f"{identity}. Remove it, or choose another place."
        )
    torch.set_rng_state(state["rng"])
    return state
