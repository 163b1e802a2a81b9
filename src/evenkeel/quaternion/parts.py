"""Dropout of whole quaternions, and pooling by their length."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import ConfigError, ShapeError
from evenkeel.quaternion.algebra import components, modulus

Size = int | Sequence[int]


class QuaternionDropout(nn.Module):
    """Drops all four parts of a quaternion together, with probability p; scales the rest.

    Draws from torch's global generator, as ``nn.Dropout`` does.

    Args:
        p: share that is dropped in training.
        dim: axis of the four blocks; -1 behind a linear layer.
    """

    def __init__(self, p: float = 0.5, *, dim: int = 1) -> None:
        if not 0 <= p <= 1:
            raise ConfigError(f"p must be from 0 to 1; got {p!r}.")
        super().__init__()
        self.p, self.dim = p, dim

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        if not self.training or self.p == 0:
            return x
        kept = F.dropout(torch.ones_like(components(x, self.dim)[0]), self.p)
        return x * torch.cat([kept] * 4, self.dim)

    def extra_repr(self) -> str:
        """Share and axis."""
        return f"p={self.p}, dim={self.dim}"


class QuaternionMaxPool2d(nn.Module):
    """Of each window the longest quaternion, whole.

    Args:
        kernel_size: of the window.
        stride: of the window; default its size.
        padding: of pixels that are never chosen.
        dilation: of the window.
        ceil_mode: as ``nn.MaxPool2d``.

    Shape:
        (N, C, H, W) -> (N, C, H', W').
    """

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        *,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.options = {
            "kernel_size": kernel_size,
            "stride": kernel_size if stride is None else stride,
            "padding": padding,
            "dilation": dilation,
            "ceil_mode": ceil_mode,
        }

    def forward(self, x: Tensor) -> Tensor:
        """The longest of each window."""
        if x.dim() != 4:
            raise ShapeError(f"The layer needs (N, C, H, W); got shape {tuple(x.shape)}.")
        options: dict[str, Any] = self.options
        _, chosen = F.max_pool2d(modulus(x.detach()), **options, return_indices=True)
        index = chosen.flatten(2).repeat(1, 4, 1)
        return x.flatten(2).gather(2, index).view(*x.shape[:2], *chosen.shape[2:])

    def extra_repr(self) -> str:
        """Window."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
