"""One sample as an image inside a page."""

import base64
import io

from torch import Tensor

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
