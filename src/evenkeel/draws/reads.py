"""Random numbers that are new at every forward pass, as an operator that compiles and exports."""

import math

import numpy as np
import torch
from torch import Tensor

from evenkeel.draws.keyed import digest


def read_key(*key: str | int) -> Tensor:
    """The 128 bits of a key as an int64 tensor of two, to be kept in a module's buffer."""
    return torch.from_numpy(
        np.frombuffer(digest(*key).to_bytes(16, "little"), dtype=np.int64).copy()
    )


def _generator(key: Tensor, count: Tensor) -> "np.random.Generator":
    entropy = [int(word) for word in key.cpu().numpy().view(np.uint64)]
    seed = np.random.SeedSequence(entropy, spawn_key=(int(count),))
    return np.random.Generator(np.random.SFC64(seed))


@torch.library.custom_op("evenkeel::keyed_normal", mutates_args=())
def keyed_normal(like: Tensor, key: Tensor, count: Tensor) -> Tensor:
    """Standard normal numbers of the shape of ``like`` for the ``count``-th read of a key.

    An operator of its own because a compiled graph must not freeze the numbers, and because torch's
    global generator must not move. It has no gradient: the numbers do not depend on ``like``.

    Shape: ``like`` any; ``key`` (2,) int64 from :func:`read_key`; ``count`` () int64.
    """
    values = _generator(key, count).standard_normal(tuple(like.shape), dtype=np.float32)
    return torch.from_numpy(values).to(like.device, like.dtype)


@torch.library.custom_op("evenkeel::keyed_noise", mutates_args=())
def keyed_noise(like: Tensor, key: Tensor, count: Tensor) -> Tensor:
    r"""The same for large tensors, by other numbers at half the time.

    Pairs $\sqrt{-2\ln u}\,(\cos 2\pi v,\; \sin 2\pi v)$ of uniform numbers (Box and Muller 1958),
    of 24 bits each: none is beyond 5.8.
    """
    n = like.numel()
    u, v = torch.from_numpy(_generator(key, count).random((2, (n + 1) // 2), dtype=np.float32))
    radius, angle = u.neg_().add_(1).log_().mul_(-2).sqrt_(), v.mul_(2 * math.pi)
    values = torch.empty(2, len(u))
    torch.cos(angle, out=values[0])
    torch.sin(angle, out=values[1])
    flat = values.mul_(radius).flatten()[:n]
    return flat.view(like.shape).to(like.device, like.dtype)


@keyed_noise.register_fake
@keyed_normal.register_fake
def _(like: Tensor, key: Tensor, count: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
