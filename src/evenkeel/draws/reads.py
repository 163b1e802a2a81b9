"""Random numbers that are new at every forward pass, as operators that compile and export."""

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


def keyed_normal(like: Tensor, key: Tensor, count: Tensor) -> Tensor:
    """Standard normal numbers of the shape of ``like`` for the ``count``-th read of a key.

    An operator of its own because a compiled graph must not freeze the numbers, and because torch's
    global generator must not move. It has no gradient: the numbers do not depend on ``like``.

    Shape: ``like`` any; ``key`` (2,) int64 from :func:`read_key`; ``count`` () int64.
    """
    drawn: Tensor = torch.ops.evenkeel.keyed_normal(like.detach(), key, count)
    return drawn


def keyed_noise(like: Tensor, key: Tensor, count: Tensor) -> Tensor:
    r"""The same for large tensors, by other numbers at half the time.

    Pairs $\sqrt{-2\ln u}\,(\cos 2\pi v,\; \sin 2\pi v)$ of uniform numbers (Box and Muller 1958),
    of 24 bits each: none is beyond 5.8.
    """
    drawn: Tensor = torch.ops.evenkeel.keyed_noise(like.detach(), key, count)
    return drawn


def _generator(key: Tensor, count: Tensor) -> "np.random.Generator":
    entropy = key.cpu().numpy().view(np.uint64).tolist()
    seed = np.random.SeedSequence(entropy, spawn_key=(int(count),))
    return np.random.Generator(np.random.SFC64(seed))


def _normal(like: Tensor, key: Tensor, count: Tensor) -> Tensor:
    values = _generator(key, count).standard_normal(tuple(like.shape), dtype=np.float32)
    return torch.from_numpy(values).to(like.device, like.dtype)


def _noise(like: Tensor, key: Tensor, count: Tensor) -> Tensor:
    generator, n = _generator(key, count), like.numel()
    values = torch.from_numpy(np.empty(n + n % 2, np.float32))  # numpy asks for large pages
    for part in values.split(CHUNK):
        u, v = _uniform(generator, len(part)).view(2, -1)
        radius, angle = u.neg_().add_(1).log_().mul_(-2).sqrt_(), v.mul_(2 * math.pi)
        cosines, sines = part.view(2, -1)
        torch.cos(angle, out=cosines).mul_(radius)
        torch.sin(angle, out=sines).mul_(radius)
    return values[:n].view(like.shape).to(like.device, like.dtype)


def _uniform(generator: "np.random.Generator", number: int) -> Tensor:
    """What ``generator.random`` gives as float32, for an even number, in half the time."""
    words = generator.bit_generator.random_raw(number // 2).view(np.uint32)
    words >>= 8
    return torch.from_numpy(words.view(np.int32)).float().mul_(2.0**-24)


def _fake(like: Tensor, key: Tensor, count: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


for _name, _drawn in (("keyed_normal", _normal), ("keyed_noise", _noise)):
    # Not torch.library.custom_op, of which a call takes as long as a small layer's numbers do.
    torch.library.define(f"evenkeel::{_name}", "(Tensor like, Tensor key, Tensor count) -> Tensor")
    torch.library.impl(f"evenkeel::{_name}", "CompositeExplicitAutograd", _drawn)
    torch.library.register_fake(f"evenkeel::{_name}", _fake)
