"""What a segmentation network learns by, and how its pictures are varied."""

import torch
from torch import Tensor
from torch.nn import functional as F

from evenkeel.train.augment import flipped

SIDE = 128


def foreground_loss(scores: Tensor, objects: Tensor) -> Tensor:
    r"""Cross entropy of foreground and background, and what is missing of the overlap.

    $$ \mathrm{mean}\,\mathrm{BCE}(p, t) + 1 - \frac{2\sum p\,t + 1}{\sum p + \sum t + 1} $$

    over all pixels whose target is known, with $p$ the sigmoid of the scores.

    Args:
        scores: (N, 1, H, W).
        objects: (N, H, W): 0 for the background, above for an object, -1 where it is not known.

    References:
        Milletari et al., "V-Net", 3DV 2016, for the overlap.
    """
    known = objects >= 0
    score = scores[:, 0][known]
    score = score if score.dtype == torch.float64 else score.float()
    target = (objects > 0)[known].to(score)
    p = score.sigmoid()
    overlap = (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    entropy = F.binary_cross_entropy_with_logits(score, target, reduction="sum")
    return entropy / max(1, len(score)) + 1 - overlap


def crops(images: Tensor, objects: Tensor, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """A window of each picture, turned or mirrored, and lighter or darker by up to a fifth.

    Args:
        images: bytes (N, C, H, W), with room on the right and below where objects are -1.
        objects: (N, H, W).
        side: of the windows, which lie inside of what is known where that is large enough.

    Returns:
        Pixels (N, C, side, side) in [0, 1] or a little above, and their objects.
    """
    missing = [max(0, side - n) for n in images.shape[2:]]
    room = (0, missing[1], 0, missing[0])
    images, objects = F.pad(images, room), F.pad(objects, room, value=-1)
    known = objects >= 0
    x, y = [], []
    for image, target, inside in zip(images, objects, known, strict=True):
        height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
        top, left = (int(torch.randint(max(1, n - side + 1), ())) for n in (height, width))
        window = (..., slice(top, top + side), slice(left, left + side))
        x.append(image[window])
        y.append(target[window])
    light = 1 + 0.2 * (2 * torch.rand(len(x), 1, 1, 1) - 1)
    return flipped(torch.stack(x).float() / 255 * light, torch.stack(y), turn=True)
