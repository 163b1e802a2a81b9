"""Buffers that keep their precision when a network is moved to a lower one."""

from collections.abc import Iterable

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
