"""Eval mode for a while, inference mode not, and the time of being captured as a graph."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn

_captured: ContextVar[bool] = ContextVar("captured", default=False)


@contextlib.contextmanager
def being_captured() -> Iterator[None]:
    """A network's graph is taken for analysis.

    A layer that computes its weight from fewer numbers then does so by an operator of its own, for
    which there can be a rule.
    """
    token = _captured.set(True)
    try:
        yield
    finally:
        _captured.reset(token)


def is_captured() -> bool:
    """Whether this is run for the sake of its graph."""
    return not torch.compiler.is_dynamo_compiling() and _captured.get()


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; every module's own mode is put back, whatever happens inside."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def lasting_tensors() -> Iterator[None]:
    """What is made here also serves outside of inference mode, if that is on."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
