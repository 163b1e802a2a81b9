"""Eval mode for a while, and inference mode not."""

import contextlib
from collections.abc import Iterator

import torch
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


@contextlib.contextmanager
def lasting_tensors() -> Iterator[None]:
    """What is made here also serves outside of inference mode, if that is on."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
