"""How pictures with boxes are varied."""

import torch
from torch import Tensor
from torch.nn import functional as F

MULTIPLE = 32


def flipped_boxes(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture mirrored or not, both ways, and lighter or darker by up to a fifth.

    Args:
        images: bytes (N, C, H, W).
        boxes: (N, M, 6): left, top, right, bottom, class (-1: no box), crowd.

    Returns:
        Pixels in [0, 1] or a little above, with sides padded to multiples of 32, and the boxes.
    """
    height, width = images.shape[2:]
    light = 1 + 0.2 * (2 * torch.rand(len(images), 1, 1, 1) - 1)
    x, boxes = images.float() / 255 * light, boxes.clone()
    for axis, side, (low, high) in ((3, width, (0, 2)), (2, height, (1, 3))):
        turned = torch.rand(len(images)) < 0.5
        x[turned] = x[turned].flip(axis)
        ends = boxes[turned][..., [high, low]]
        boxes[turned] = boxes[turned].index_copy(2, torch.tensor([low, high]), side - ends)
    return F.pad(x, (0, -width % MULTIPLE, 0, -height % MULTIPLE)), boxes
