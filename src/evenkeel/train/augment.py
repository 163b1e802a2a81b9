"""Random crops and mirror images, for a whole batch at once."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = 4


def crop_and_flip(x: Tensor) -> Tensor:
    """Shift each image (N, C, H, W) by up to 4 pixels, and mirror half of them; zeros move in.

    Draws from torch's global generator, as dropout does.
    """
    n, _, height, width = x.shape
    padded = F.pad(x, [PADDING] * 4)
    top, left = torch.randint(0, 2 * PADDING + 1, (2, n))
    rows = top.view(n, 1) + torch.arange(height)  # (N, H)
    columns = left.view(n, 1) + torch.arange(width)  # (N, W)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    samples = torch.arange(n).view(n, 1, 1)
    # Advanced indices put the channels last; they go back to their place.
    return padded[samples, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def flipped(x: Tensor, y: Tensor, *, turn: bool = False) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and maps (N, H, W), mirrored or not both ways, each as its map is.

    Args:
        x: images.
        y: maps.
        turn: whether height and width also change places, in half of them; they must be equal.
    """
    x, y = x.clone(), y.clone()
    for axis in (1, 2):
        chosen = torch.rand(len(x)) < 0.5
        x[chosen], y[chosen] = x[chosen].flip(axis + 1), y[chosen].flip(axis)
    if turn:
        chosen = torch.rand(len(x)) < 0.5
        x[chosen], y[chosen] = x[chosen].transpose(2, 3), y[chosen].transpose(1, 2)
    return x, y


DEGREES, STRETCH, SHEAR, SHIFT = 15.0, 0.15, 0.15, 0.06


def drawn_anew(x: Tensor, *, beyond: Literal["zeros", "border"] = "zeros") -> Tensor:
    """Drawings (N, C, H, W) as another hand may draw them: each turned, stretched, slanted, moved.

    By up to 15 degrees, about 15 %, 15 % and 6 % of the size. What moves in from ``beyond`` the
    image is zeros, the paper of images whose ink is 1, or what is at the border. Draws from torch's
    global generator, as dropout does.
    """
    turn, slant, *stretch_and_shift = (2 * torch.rand(6, len(x)) - 1).unbind()
    angle = turn * math.radians(DEGREES)
    cos, sin = angle.cos(), angle.sin()
    wide, high = (1 + STRETCH * v for v in stretch_and_shift[:2])
    # An image's coordinates run from -1 to 1, so a share of the size is twice as much.
    right, down = (2 * SHIFT * v for v in stretch_and_shift[2:])
    rows = [cos * wide, -sin + SHEAR * slant, right, sin, cos * high, down]
    maps = torch.stack(rows, 1).view(-1, 2, 3).to(x)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode=beyond, align_corners=False)
