"""Images of several sizes: padded a little, and batched with those of their shape."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MULTIPLE = 32
"""Sides of images are padded to a multiple of it, which the usual networks can halve five times."""
BATCH = 8
"""Pictures of a batch to test on."""
MIXED = 16
"""Pictures of a batch to calibrate with, which normalizes by its own statistics."""
UNKNOWN = -1
"""Of a target: neither right nor wrong."""


def padded(image: Tensor, sides: tuple[int, int] | None = None, value: float = 0.0) -> Tensor:
    """(..., H, W) with room to the right and below, by default to the next multiple of 32."""
    height, width = sides or (-(-side // MULTIPLE) * MULTIPLE for side in image.shape[-2:])
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]), value=value)


def batched_by_shape(
    images: Sequence[Tensor], targets: Sequence[Tensor], batch: int = BATCH
) -> list[tuple[Tensor, Tensor]]:
    """Batches of images of one shape, each where its last image comes; what is left at the end.

    Examples:
        >>> x = [torch.zeros(1, 32, 32), torch.zeros(1, 32, 64), torch.zeros(1, 32, 32)]
        >>> [tuple(images.shape) for images, _ in batched_by_shape(x, x)]
        [(2, 1, 32, 32), (1, 1, 32, 64)]
    """
    full: list[list[int]] = []
    open_by_shape: dict[torch.Size, list[int]] = {}
    for k, image in enumerate(images):
        rows = open_by_shape.setdefault(image.shape, [])
        rows.append(k)
        if len(rows) == batch:
            full.append(open_by_shape.pop(image.shape))
    return [
        (torch.stack([images[k] for k in rows]), torch.stack([targets[k] for k in rows]))
        for rows in [*full, *open_by_shape.values()]
    ]


def mixed_batches(images: Sequence[Tensor], batch: int = MIXED) -> list[tuple[Tensor]]:
    """Batches to calibrate with, of images that may have several shapes.

    Such a batch must have pictures of all kinds, as its statistics stand for all; kind and size
    often go together. Images of one shape are padded, as those that are tested on. Others are cut
    to the sides of the smallest, from the middle, to a multiple of 32 where there is as much.

    Examples:
        >>> x = [torch.zeros(1, 32, 70), torch.zeros(1, 64, 40)]
        >>> [tuple(images.shape) for (images,) in mixed_batches(x)]
        [(2, 1, 32, 32)]
    """
    if len({image.shape for image in images}) == 1:
        return [(part,) for part in torch.stack([padded(image) for image in images]).split(batch)]
    height, width = (
        max(min(image.shape[axis] for image in images) // MULTIPLE, 1) * MULTIPLE for axis in (1, 2)
    )
    cut = [padded(from_middle(image, height, width), (height, width)) for image in images]
    return [(part,) for part in torch.stack(cut).split(batch)]


def from_middle(image: Tensor, height: int, width: int) -> Tensor:
    """So many pixels of each side (..., H, W), or all, from the middle."""
    height, width = min(height, image.shape[-2]), min(width, image.shape[-1])
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def spread(number: int, wanted: int) -> list[int]:
    """So many of a number of items, evenly over them, in an order that is mixed but always one."""
    count = min(number, wanted)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [k * number // count for k in order]
