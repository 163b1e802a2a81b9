"""Statistics over the batches of several processes, by one exchange forward and one backward."""

import torch
import torch.distributed as dist
from torch import Tensor

from evenkeel.errors import ConfigError


def gathered(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every process's mean and variance, (W, C) each, and its count, (W, 1).

    Args:
        mean: (C,) of this process; anything where it has no elements.
        var: (C,) about that mean, likewise.
        count: elements that they are taken over.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "synchronize=True needs a process group: call torch.distributed.init_process_group "
            "(torchrun and lightning do), or construct the layer without it."
        )
    own = torch.cat([mean, var, mean.new_full((1,), count)])
    if count == 0:
        own.zero_()  # the moments of nothing are not numbers
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    means, variances, counts = torch.stack(every).split([len(mean), len(mean), 1], dim=1)
    return means, variances, counts


def summed(*terms: Tensor) -> tuple[Tensor, ...]:
    """The sum over processes of each term; they travel together."""
    whole = torch.stack(terms)
    dist.all_reduce(whole)
    return whole.unbind()
