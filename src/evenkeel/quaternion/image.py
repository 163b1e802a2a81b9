"""Pictures as quaternions, and back."""

from typing import Literal, get_args

import torch
from torch import Tensor

from evenkeel.errors import ConfigError, ShapeError, nearest

Mode = Literal["rgb", "gray"]
LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue in grey, as ITU-R BT.601 has it."""


def to_quaternion(image: Tensor, mode: Mode = "rgb") -> Tensor:
    """Pixels as quaternions without a real part: (0, R, G, B), or (0, g, g, g).

    Args:
        image: (..., 3, H, W), red, green and blue, or (..., 1, H, W), grey.
        mode: "rgb", or "gray" to take a colour picture for its grey one.

    Shape:
        (..., 3 or 1, H, W) -> (..., 4, H, W).

    Examples:
        >>> to_quaternion(torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)).flatten()
        tensor([0.0000, 0.1000, 0.2000, 0.3000])
        >>> to_quaternion(torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1), mode="gray").flatten()
        tensor([0.0000, 0.2990, 0.2990, 0.2990])
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"Unknown mode {mode!r}. {nearest(mode, get_args(Mode))}")
    if image.dim() < 3 or image.shape[-3] not in (1, 3):
        raise ShapeError(
            f"A picture needs (..., 3, H, W) or (..., 1, H, W); got shape {tuple(image.shape)}."
        )
    if mode == "gray" and image.shape[-3] == 3:
        image = sum(w * image[..., c : c + 1, :, :] for c, w in enumerate(LUMA))  # type: ignore[assignment]
    grey_or_rgb = image.expand(*image.shape[:-3], 3, *image.shape[-2:])
    return torch.cat([torch.zeros_like(grey_or_rgb[..., :1, :, :]), grey_or_rgb], -3)


def from_quaternion(x: Tensor) -> Tensor:
    """The i, j and k parts as red, green and blue: (..., 4, H, W) -> (..., 3, H, W)."""
    if x.dim() < 3 or x.shape[-3] != 4:
        raise ShapeError(f"One quaternion a pixel needs (..., 4, H, W); got {tuple(x.shape)}.")
    return x[..., 1:, :, :]
