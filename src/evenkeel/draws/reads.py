"""Random numbers that are new at every forward pass, as an operator that compiles and exports."""

import numpy as np
import torch
from torch import Tensor

from evenkeel.draws.keyed import digest


def read_key(*key: str | int) -> Tensor:
    """The 128 bits of a key as an int64 tensor of two, to be kept in a module's buffer."""
    return torch.from_numpy(
        np.frombuffer(digest(*key).to_bytes(16, "little"), dtype=np.int64).copy()
    )


@torch.library.custom_op("evenkeel::keyed_normal", mutates_args=())
def keyed_normal(like: Tensor, key: Tensor, count: Tensor) -> Tensor:
    """Standard normal numbers of the shape of ``like`` for the ``count``-th read of a key.

    An operator of its own because a compiled graph must not freeze the numbers, and because torch's
    global generator must not move. It has no gradient: the numbers do not depend on ``like``.

    Shape: ``like`` any; ``key`` (2,) int64 from :func:`read_key`; ``count`` () int64.
    """
    entropy = [int(word) for word in key.cpu().numpy().view(np.uint64)]
    seed = np.random.SeedSequence(entropy, spawn_key=(int(count),))
    values = np.random.Generator(np.random.SFC64(seed)).standard_normal(
        tuple(like.shape), dtype=np.float32
    )
    return torch.from_numpy(values).to(like.device, like.dtype)


@keyed_normal.register_fake
def _(like: Tensor, key: Tensor, count: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
