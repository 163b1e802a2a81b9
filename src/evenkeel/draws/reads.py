"""Random numbers that are new at every forward pass, as an operator that compiles and exports."""

import math

import numpy as np
import torch
from torch import Tensor

from evenkeel.draws.keyed import digest

CHUNK = 1 << 16
"""Numbers that are made at once: what they are made from stays in a core's cache."""


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
    generator, n = _generator(key, count), like.numel()
    values = torch.empty(n + n % 2)
    for part in values.split(CHUNK):
        u, v = torch.from_numpy(generator.random((2, len(part) // 2), dtype=np.float32))
        radius, angle = u.neg_().add_(1).log_().mul_(-2).sqrt_(), v.mul_(2 * math.pi)
        cosines, sines = part.view(2, -1)
        torch.cos(angle, out=cosines).mul_(radius)
        torch.sin(angle, out=sines).mul_(radius)
    return values[:n].view(like.shape).to(like.device, like.dtype)


@keyed_noise.register_fake
@keyed_normal.register_fake
def _(like: Tensor, key: Tensor, count: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
