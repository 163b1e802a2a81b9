"""Random crops and mirror images, for a whole batch at once."""

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
