"""An anchor-free detector: every object is the peak of a map at its centre."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.models.norms import NormLayer, built_with
from evenkeel.models.registry import architecture
from evenkeel.models.unet import UNetFeatures, conv_norm_relu, require_multiples

STRIDE = 4
"""Pixels from one cell of the maps to the next."""
SIZE_UNIT = 32.0
"""Pixels of a side for an output of 1."""
RARE = 0.01
"""Share of cells that a new network takes for centres."""


class CentreDetector(nn.Module):
    r"""Maps at a quarter of the size: a score of each class, and place and size of the box there.

    A cell whose score is the highest of the 3 x 3 around it is an object. With the cell's place
    $(i, j)$, its outputs $(u, v, a, b)$ and $s = 4$ pixels the box has the centre
    $(s(j + u), s(i + v))$ and the sides $8s\,a$ and $8s\,b$.

    Args:
        num_classes: kinds of objects.
        in_channels: channels of the images.
        widths: channels at a quarter of the size, at half of that, and so on.
        norm_layer: from channels to a normalizer.
        detections: how many are given for an image, the best first.

    Shape:
        (N, in_channels, H, W), H and W multiples of ``4 * 2 ** (len(widths) - 1)`` -> in training
        the maps (N, num_classes + 4, H / 4, W / 4), whose scores are before the sigmoid; in eval
        mode detections (N, K, 6): left, top, right, bottom in pixels, score in [0, 1], class.

    Examples:
        >>> CentreDetector(3).eval()(torch.zeros(2, 3, 64, 96)).shape
        torch.Size([2, 100, 6])

    References:
        Zhou, Wang, Krähenbühl, "Objects as points", arXiv:1904.07850 (2019).
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        widths: Sequence[int] = (32, 64, 128),
        norm_layer: NormLayer = nn.BatchNorm2d,
        detections: int = 100,
    ) -> None:
        super().__init__()
        self.num_classes, self.detections = num_classes, detections
        self.multiple = STRIDE * 2 ** (len(widths) - 1)
        self.stem = nn.Sequential(
            conv_norm_relu(in_channels, widths[0] // 2, norm_layer, stride=2),
            conv_norm_relu(widths[0] // 2, widths[0], norm_layer, stride=2),
        )
        self.features = UNetFeatures(widths[0], widths, norm_layer)
        outputs = nn.Conv2d(2 * widths[0], num_classes + 4, 1)
        self.head = nn.Sequential(conv_norm_relu(widths[0], 2 * widths[0], norm_layer), outputs)
        assert outputs.bias is not None
        with torch.no_grad():
            outputs.bias[:num_classes] = -math.log(1 / RARE - 1)
            outputs.bias[num_classes:] = 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Maps in training, detections in eval mode."""
        require_multiples(x, self.multiple)
        maps: Tensor = self.head(self.features(self.stem(x)))
        return maps if self.training else self.found(maps)

    def found(self, maps: Tensor) -> Tensor:
        """The best detections of maps."""
        maps = _exact(maps)
        scores, boxes = maps[:, : self.num_classes].sigmoid(), maps[:, self.num_classes :]
        scores = scores * (F.max_pool2d(scores, 3, 1, padding=1) == scores)
        width, cells = maps.shape[3], maps.shape[2] * maps.shape[3]
        best, at = scores.flatten(1).topk(min(self.detections, self.num_classes * cells))
        cell = at % cells
        u, v, a, b = boxes.flatten(2).gather(2, cell[:, None].expand(-1, 4, -1)).unbind(1)
        x, y = (cell % width + u) * STRIDE, (cell // width + v) * STRIDE
        half_x, half_y = a.clamp_min(0) * (SIZE_UNIT / 2), b.clamp_min(0) * (SIZE_UNIT / 2)
        sides = [x - half_x, y - half_y, x + half_x, y + half_y]
        return torch.stack([*sides, best, (at // cells).to(best.dtype)], 2)


def _exact(maps: Tensor) -> Tensor:
    """In float32 at least."""
    return maps if maps.dtype == torch.float64 else maps.float()


SPREAD = 0.54 / 6
"""Deviation of the bump around a centre, as a share of the box's side."""


def centre_loss(maps: Tensor, boxes: Tensor) -> Tensor:
    r"""What a :class:`CentreDetector` learns by: where centres are, and the boxes there.

    Of a box with sides $w, h$ the map of its class should be $t = e^{-(\Delta x/0.09w)^2/2 -
    (\Delta y/0.09h)^2/2}$ around the cell of its centre, where $t = 1$; with $n$ boxes in all

    $$ -\tfrac1n \sum \begin{cases} (1 - p)^2 \ln p & t = 1 \\
       (1 - t)^4\,p^2 \ln(1 - p) & \text{else} \end{cases}
       \;+\; \tfrac1n \sum_{t = 1} |u - \hat u| + |v - \hat v| + |a - \hat a| + |b - \hat b| $$

    Args:
        maps: of a network in training, (N, classes + 4, H / 4, W / 4).
        boxes: (N, M, 6) as :func:`evenkeel.data.coco_detection` gives them; class -1 is no box.

    References:
        Zhou et al. 2019, as above; the bumps are those of Liu et al., "Training-time-friendly
        network for real-time object detection", AAAI 2020.
    """
    maps = _exact(maps)
    boxes = F.pad(boxes, (0, 0, 0, 1), value=-1).to(maps.dtype)  # so that there is one
    classes, height, width = maps.shape[1] - 4, *maps.shape[2:]
    real, label = boxes[..., 4] >= 0, boxes[..., 4].long().clamp_min(0)
    sides = (boxes[..., 2:4] - boxes[..., :2]) / STRIDE
    middle = (boxes[..., 2:4] + boxes[..., :2]) / (2 * STRIDE)
    limits = middle.new_tensor([width - 1, height - 1])
    cell = middle.floor().clamp_min(0).minimum(limits)

    def bump(axis: int, number: int) -> Tensor:
        away = torch.arange(number, device=maps.device) - cell[..., axis, None]
        deviation = (SPREAD * sides[..., axis, None]).clamp_min(0.5)
        return (-0.5 * (away / deviation).square()).exp()

    bumps = bump(1, height)[..., :, None] * bump(0, width)[..., None, :]  # (N, M, H, W)
    bumps = bumps * real[..., None, None]
    target = torch.stack(
        [(bumps * (label == c)[..., None, None]).amax(1) for c in range(classes)], 1
    )
    scores = maps[:, :classes]
    hit = -(1 - scores.sigmoid()).square() * F.logsigmoid(scores)
    miss = -(1 - target).pow(4) * scores.sigmoid().square() * F.logsigmoid(-scores)
    of_centres = torch.where(target == 1, hit, miss).sum()

    at = (cell[..., 1] * width + cell[..., 0]).long()
    given = maps[:, classes:].flatten(2).gather(2, at[:, None].expand(-1, 4, -1)).transpose(1, 2)
    wanted = torch.cat([middle - cell, sides * (STRIDE / SIZE_UNIT)], 2)
    of_boxes = ((given - wanted).abs().sum(2) * real).sum()
    return (of_centres + of_boxes) / real.sum().clamp_min(1)


@architecture("centre_detector")
def centre_detector(
    num_classes: int = 3,
    in_channels: int = 3,
    width: int = 32,
    norm: str = "batch",
    normalization_batch: int | None = None,
    weight_standard: bool = False,
) -> nn.Module:
    """Three sizes below a quarter of the image's; options as of :func:`evenkeel.models.unet`."""
    widths = [width * 2**k for k in range(3)]
    example = torch.zeros(2, in_channels, 32, 32)
    return built_with(
        lambda norm_layer: CentreDetector(num_classes, in_channels, widths, norm_layer),
        example, norm, normalization_batch, weight_standard,
    )  # fmt: skip
