"""An episode as people look at it: what is asked, and where the attention goes."""

import base64
import io

import torch
from torch import Tensor

from evenkeel.memory.key_value import Reading

SIDE, GAP, BAR = 56, 10, 44


def episode_picture(
    supports: Tensor,
    owners: Tensor,
    queries: Tensor,
    labels: Tensor,
    reading: Reading,
    *,
    ink: bool,
) -> str:
    """SVG of an episode: supports on top; for each query, the attention that each support gets.

    A bar's height is the attention, in units of the largest of the row; those of the query's own
    class are green where the memory recalls it, orange where it recalls another.

    Args:
        supports: images (n, C, H, W) in [0, 1].
        owners: their classes (n,), in order.
        queries: images (q, C, H, W).
        labels: their classes (q,).
        reading: of the queries' vectors.
        ink: 1 is ink, and is drawn dark.
    """
    width = (1 + len(supports)) * (SIDE + GAP) + GAP
    height = (1 + len(queries)) * (SIDE + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="10" role="img" '
        f'aria-label="Attention of {len(queries)} queries to {len(supports)} supports">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    if ink:
        supports, queries = 1 - supports, 1 - queries
    parts += [_image(image, k + 1, 0) for k, image in enumerate(supports)]
    for row, (query, label) in enumerate(zip(queries, labels.tolist(), strict=True), start=1):
        weights = reading.attention[row - 1]
        right = int(reading.best[row - 1]) == label
        parts.append(_image(query, 0, row))
        for k, (weight, owner) in enumerate(zip(weights.tolist(), owners.tolist(), strict=True)):
            own = "#1a9850" if right else "#e08214"
            parts.append(
                _bar(k + 1, row, weight, float(weights.max()), own if owner == label else "#9aa5b1")
            )
    return "\n".join([*parts, "</svg>\n"])


def _image(image: Tensor, column: int, row: int) -> str:
    from PIL import Image

    file = io.BytesIO()
    pixels = (255 * image.clamp(0, 1)).round().to(torch.uint8)
    grey = pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
    Image.fromarray(grey.permute(1, 2, 0).numpy()).save(file, "PNG")
    x, y = (GAP + k * (SIDE + GAP) for k in (column, row))
    return (
        f'<image x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" '
        f'href="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"/>'
    )


def _bar(column: int, row: int, weight: float, most: float, colour: str) -> str:
    x, y = (GAP + k * (SIDE + GAP) for k in (column, row))
    tall = BAR * weight / most if most > 0 else 0
    return (
        f'<rect x="{x + 14}" y="{y + SIDE - 12 - tall:.1f}" width="{SIDE - 28}" '
        f'height="{tall:.1f}" fill="{colour}"/>'
        f'<text x="{x + SIDE / 2}" y="{y + SIDE}" text-anchor="middle" fill="#444">'
        f"{100 * weight:.1f} %</text>"
    )
