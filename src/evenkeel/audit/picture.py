"""One sample as an image inside a page."""

import base64
import html
import io
from collections.abc import Sequence

import torch
from torch import Tensor

Colour = tuple[float, float, float]

SIDE = 96
"""Small images are enlarged to at least this many pixels, without smoothing."""
LARGEST = 256
"""Larger ones are made smaller."""


def inline_png(x: Tensor, limits: tuple[float, float] | None = None) -> str:
    """An ``<img>`` of a (C, H, W) tensor; empty for other shapes.

    Black and white are at the limits; default: its own range.
    """
    if x.dim() != 3 or x.shape[0] not in (1, 3):
        return ""
    from PIL import Image

    x = x.detach().float().cpu()
    low, high = limits or (float(x.min()), float(x.max()))
    pixels = (
        ((x - low) / max(high - low, 1e-12) * 255)
        .clamp(0, 255)
        .round()
        .byte()
        .permute(1, 2, 0)
        .numpy()
    )
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    factor = max(1, -(-SIDE // max(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def beside(
    shown: Sequence[tuple[str, Tensor, str]], limits: tuple[float, float] = (0.0, 1.0)
) -> str:
    """Pictures side by side: each with whose it is, and what is said of it."""
    figures = "".join(
        f"<div>{inline_png(x, limits)}<figcaption>{html.escape(who)}{said}</figcaption></div>"
        for who, x, said in shown
    )
    return f'<div class="beside">{figures}</div>'


def in_colour(x: Tensor) -> Tensor:
    """A (C, H, W) picture as three channels that use the range from 0 to 1."""
    x = x.detach().float().cpu()
    x = x if x.shape[0] in (1, 3) else x.mean(0, keepdim=True)
    low, high = x.min(), x.max()
    return ((x - low) / (high - low).clamp_min(1e-12)).expand(3, -1, -1).clone()


def tinted(x: Tensor, tints: Sequence[tuple[Tensor, Colour]]) -> Tensor:
    """The picture (C, H, W) with half of a colour over where each mask (H, W) is."""
    made = in_colour(x)
    for mask, colour in tints:
        made[:, mask] = 0.45 * made[:, mask] + 0.55 * torch.tensor(colour)[:, None]
    return made


def outlined(x: Tensor, boxes: Sequence[tuple[Sequence[float], Colour]]) -> Tensor:
    """The picture (C, H, W) with a frame of two pixels for each left, top, right, bottom."""
    made = in_colour(x)
    height, width = made.shape[1:]
    for box, colour in boxes:
        left, right = (min(max(round(v), 0), width - 1) for v in (box[0], box[2]))
        top, bottom = (min(max(round(v), 0), height - 1) for v in (box[1], box[3]))
        frame = torch.zeros(height, width, dtype=torch.bool)
        frame[top : bottom + 1, left : right + 1] = True
        frame[top + 2 : bottom - 1, left + 2 : right - 1] = False
        made[:, frame] = torch.tensor(colour)[:, None]
    return made
