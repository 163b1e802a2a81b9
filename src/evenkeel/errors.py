"""The errors of evenkeel: each says what must hold, what came, and what to do."""

import difflib
from collections.abc import Iterable


class EvenkeelError(Exception):
    """Base of every error that evenkeel raises on purpose."""


class ConfigError(EvenkeelError, ValueError):
    """An argument, an option or a file's content does not fit."""


class ShapeError(EvenkeelError, ValueError):
    """A tensor does not have the shape that it must have."""


class CalibrationError(EvenkeelError, ValueError):
    """A network could not be calibrated; it has been left as it was."""


class GraphError(EvenkeelError, ValueError):
    """A network could not be captured, or does not do what its graph says."""


class StoreError(EvenkeelError, OSError):
    """A file of results cannot be read or written."""


class WorkerError(EvenkeelError, RuntimeError):
    """A process that ran trials died."""


class MissingExtraError(EvenkeelError, ImportError):
    """An optional part is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the optional extra '{extra}', which is not installed. "
            f"Install it with: pip install 'evenkeel[{extra}]'"
        )
        self.extra = extra


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the known names closest to a misspelt one.

    Examples:
        >>> nearest("pmc", ["pcm", "gaussian"])
        "Did you mean 'pcm'? Known: gaussian, pcm."
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    guess = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{guess}Known: {', '.join(names) or 'none'}."
