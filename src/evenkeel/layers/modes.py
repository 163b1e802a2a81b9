"""Eval mode for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; every module's own mode is put back, whatever happens inside."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training
