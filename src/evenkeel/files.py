"""Files that are there whole or not at all."""

import os
import tempfile
from pathlib import Path

from evenkeel.errors import ConfigError, StoreError


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part."""
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise StoreError(
            f"Cannot write {path}: {error.strerror}. Give a folder that can be written."
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)  # mkstemp makes private files; a result is not one
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StoreError(f"Cannot write {path}: {error.strerror}.") from error
        raise


def require_weights_file(path: Path) -> None:
    """Refuse now, not after an hour, a file that weights and the log beside them cannot be."""
    if path.suffix != ".safetensors" or path.is_dir():
        raise ConfigError(
            f"Weights are written to a file that ends in .safetensors, with the log beside it as "
            f".json; got {path}."
        )
    require_writable_folder(path.parent)


def require_writable_folder(path: str | Path) -> Path:
    """Make a folder if need be, and find out now, not after an hour, that it cannot be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StoreError(
            f"Cannot write into {folder}: {error.strerror}. Give a folder that can be written."
        ) from error
    return folder
