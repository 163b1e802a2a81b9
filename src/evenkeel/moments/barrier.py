"""Where a compiler shall stop fusing."""

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("evenkeel", "DEF")
_LIBRARY.define("barrier(Tensor a, Tensor b) -> (Tensor, Tensor)")


def _copies(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.clone(), b.clone()


def _fake(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b)


def _backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return _crossed(a, b)


def _crossed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    both: tuple[Tensor, Tensor] = torch.ops.evenkeel.barrier(a, b)
    return both


_LIBRARY.impl("barrier", _copies, "CompositeExplicitAutograd")
torch.library.register_fake("evenkeel::barrier", _fake, lib=_LIBRARY)
torch.library.register_autograd("evenkeel::barrier", _backward, lib=_LIBRARY)


def barrier(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same two tensors, (N, C) or the like; in a compiled graph they are made once and kept.

    The compiler would otherwise work out the numbers of a channel again for each of its positions,
    which takes several times as long (torch 2.13, channels last); and a compiled backward would
    make statistics again from a buffer that was updated meanwhile.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return a, b
    return _crossed(a, b)
