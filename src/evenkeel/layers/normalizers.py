"""The normalizers of a network that keep running statistics."""

from collections.abc import Iterator
from typing import Protocol, cast

from torch import Tensor, nn


class RunningStatistics(Protocol):
    """A normalizer that, in eval mode, normalizes by statistics that it keeps.

    Any module with these two buffers of one number per channel qualifies: batch normalization in
    all its forms, synchronised, fused with an activation, or frozen; the user's own. Where the
    channels are not the second axis of its input, ``channel_dim`` tells which.
    """

    running_mean: Tensor
    running_var: Tensor


def running_normalizers(model: nn.Module) -> Iterator[tuple[str, RunningStatistics]]:
    """Path and module of every normalizer that keeps running statistics, in order of definition."""
    for path, module in model.named_modules():
        mean = getattr(module, "running_mean", None)
        var = getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            yield path, cast(RunningStatistics, module)
