"""Buffers that keep their precision when a network is moved to a lower one."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def restore_precision(
    module: nn.Module, before: dict[str, Tensor | None], names: Iterable[str]
) -> None:
    """After ``_apply``: give buffers their former dtype and content, on the device they are now on.

    Args:
        module: whose buffers were changed.
        before: its buffers as they were.
        names: those to restore.
    """
    for name in names:
        old, new = before[name], module._buffers[name]
        if old is not None and new is not None and new.dtype != old.dtype:
            module._buffers[name] = old.to(new.device)


def lowered(
    now: Mapping[str, Tensor | None], before: Mapping[str, Tensor | None], names: Iterable[str]
) -> list[str]:
    """Those of the named buffers that have fewer bits than before."""

    def bits(of: Tensor | None) -> int:
        return 0 if of is None else torch.finfo(of.dtype).bits

    return [name for name in names if bits(now[name]) < bits(before[name])]
