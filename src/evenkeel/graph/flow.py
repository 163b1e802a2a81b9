r"""How mean and variance of activations flow through a network. Nothing is drawn.

Every element is taken for a Gaussian of its own, independent of all others. So a sum of weighted
elements has the weighted sum of the means, and of the variances with squared weights, and ReLU has
known moments. Other functions, maxima, and ReLU of what is no Gaussian are integrated.

At the borders of a padded convolution fewer elements are summed. But most positions of a map are
alike: those on one axis fall into a few classes, and only one of each is worked out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evenkeel.graph import positions
from evenkeel.graph.positions import OUTSIDE, Axis

FAR = 40.0
"""Deviations beyond which nothing of a Gaussian is left, in float64."""
WIDE = 6.0
"""Deviations on each side that a Gaussian is integrated over."""
REACH = 8.0
"""Deviations within which the largest of a window is looked for."""
Table = tuple[tuple[float, ...], tuple[float, ...]]
"""Nodes and weights."""


def _fejer(n: int) -> Table:
    """Of Fejér's first rule on (0, 1), which has a closed form and integrates smooth functions."""
    angles = [(2 * k + 1) * math.pi / (2 * n) for k in range(n)]
    series = [[math.cos(2 * j * a) / (4 * j * j - 1) for j in range(1, n // 2 + 1)] for a in angles]
    nodes = tuple((1 - math.cos(a)) / 2 for a in angles)
    return nodes, tuple((1 - 2 * sum(terms)) / n for terms in series)


MANY, FEW = _fejer(24), _fejer(8)
"""For each side of the bend of a ReLU; few where it is one of two that are integrated over."""
_steps = [k / 4 for k in range(-24, 25)]
_weights = [math.exp(-z * z / 2) for z in _steps]
NORMAL: Table = tuple(_steps), tuple(w / sum(_weights) for w in _weights)
"""For a standard normal: even steps lose nothing on smooth functions, and little at a bend."""


@dataclass(frozen=True)
class Gaussian:
    """The moments of an activation.

    Attributes:
        mean: (K, C, *classes), of K parts of a batch.
        var: likewise.
        axes: the classes of each spatial axis.
        slope: elements are still to go through a ReLU with so much slope below zero; 1 for none.
        skewed: what of it is no Gaussian: one summand that has been through a ReLU.
    """

    mean: Tensor
    var: Tensor
    axes: tuple[Axis, ...] = ()
    slope: float | Tensor = 1.0
    skewed: "Gaussian | None" = None

    @classmethod
    def alike(cls, mean: Tensor, var: Tensor, sizes: Sequence[int]) -> "Gaussian":
        """The same moments (K, C) at every position of a map."""
        shape = (*mean.shape, *(1 for _ in sizes))
        return cls(mean.view(shape), var.view(shape), tuple((0,) * size for size in sizes))

    def detached(self) -> tuple["Gaussian", bool]:
        """Without its graph, and whether it had one."""
        skewed = self.skewed and self.skewed.detached()[0]
        bare = replace(self, mean=self.mean.detach(), var=self.var.detach(), skewed=skewed)
        return bare, self.mean.requires_grad

    def leaf(self, needs: bool) -> "Gaussian":
        """The beginning of another graph, where that needs gradients."""
        needs = needs and torch.is_grad_enabled()
        mean, var = (t.detach().requires_grad_(needs) for t in (self.mean, self.var))
        skewed = self.skewed and self.skewed.leaf(needs)
        return replace(self, mean=mean, var=var, skewed=skewed)

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (K, C) over all positions together."""
        given = realised(self)
        mean = _averaged(given.mean, given.axes)
        away = given.mean - mean.view(*mean.shape, *(1 for _ in given.axes))
        return mean, _averaged(given.var + away.square(), given.axes)


def realised(x: Gaussian) -> Gaussian:
    r"""What has been through its ReLU.

    With $a = m/\sigma$, the positive part has $p = E[x^+] = m\Phi(a) + \sigma\varphi(a)$, the
    negative one $n = E[x^-] = \sigma\varphi(a) - m\Phi(-a)$, and with slope $s$ for that

    $$ E = p - s n, \qquad Var = \sigma^2 (\Phi(a) + s^2\Phi(-a)) - (1 - s)^2 p n, $$

    which loses no digits where the mean is large. A skewed summand is integrated over.
    """
    s = x.slope
    if isinstance(s, float) and s == 1:
        return x
    if x.skewed is not None:
        return _mixed(x, x.skewed)
    std = x.var.clamp_min(torch.finfo(x.var.dtype).tiny).sqrt()
    a = (x.mean / std).clamp(-FAR, FAR)
    above, below = torch.special.ndtr(a), torch.special.ndtr(-a)
    middle = std * _density(a)
    up = torch.addcmul(middle, x.mean, above)
    down = torch.addcmul(middle, x.mean, below, value=-1)
    if isinstance(s, float) and s == 0:
        return Gaussian(up, torch.addcmul(x.var * above, up, down, value=-1), x.axes)
    both = x.var * (above + s * s * below) - (1 - s) ** 2 * up * down
    return Gaussian(up - s * down, both, x.axes)


def _mixed(x: Gaussian, skewed: Gaussian) -> Gaussian:
    """What ReLU makes of a Gaussian and a summand that has been through one already."""
    own = realised(skewed)
    nodes, weights = _table(FEW, x.mean.device, x.mean.dtype)
    std = skewed.var.clamp_min(torch.finfo(skewed.var.dtype).tiny).sqrt().unsqueeze(-1)
    middle = skewed.mean.unsqueeze(-1)
    bend = (-middle / std).clamp(-WIDE, WIDE)
    right = bend + (WIDE - bend) * nodes
    share = (WIDE - bend) * weights * _density(right)
    if isinstance(skewed.slope, float) and skewed.slope == 0:  # all on the left is one value
        z, share = torch.cat([bend, right], -1), torch.cat([torch.special.ndtr(bend), share], -1)
    else:
        left = (bend + WIDE) * nodes - WIDE
        z = torch.cat([left, right], -1)
        share = torch.cat([(bend + WIDE) * weights * _density(left), share], -1)
    share = share / share.sum(-1, keepdim=True)
    values = _leaky(middle + std * z, skewed.slope)
    # Its moments are known better than by that: it may have had a skewed summand itself.
    mean = (values * share).sum(-1, keepdim=True)
    away = values - mean
    spread = (away.square() * share).sum(-1).clamp_min(torch.finfo(away.dtype).tiny)
    values = away * (own.var / spread).sqrt().unsqueeze(-1) + own.mean.unsqueeze(-1)
    rest = (x.mean - own.mean).unsqueeze(-1), (x.var - own.var).clamp_min(0).unsqueeze(-1)
    slope = x.slope.unsqueeze(-1) if isinstance(x.slope, Tensor) else x.slope
    given = realised(Gaussian(rest[0] + values, rest[1].expand_as(values), slope=slope))
    total = (given.mean * share).sum(-1)
    var = ((given.var + (given.mean - total.unsqueeze(-1)).square()) * share).sum(-1)
    return Gaussian(total, var, x.axes)


def _leaky(x: Tensor, slope: float | Tensor) -> Tensor:
    slope = slope.unsqueeze(-1) if isinstance(slope, Tensor) else slope
    return torch.where(x < 0, slope * x, x)


def _density(a: Tensor) -> Tensor:
    return (a * a * -0.5).exp() * math.sqrt(0.5 / math.pi)


def rectified(x: Gaussian, slope: float | Tensor = 0.0) -> Gaussian:
    """Through a ReLU, or a leaky one; worked out when a sum needs it."""
    if isinstance(x.slope, float) and isinstance(slope, float) and x.slope >= 0:
        return replace(x, slope=x.slope * slope)
    x = realised(x)
    if isinstance(slope, Tensor):  # of one or every channel
        slope = slope.view(1, -1, *(1 for _ in x.axes))
    return replace(x, slope=slope)


def applied(x: Gaussian, name: str, args: Sequence[Any] = ()) -> Gaussian:
    """Through any function of single elements, by quadrature.

    Args:
        x: what it is applied to.
        name: of the ATen operation.
        args: its further arguments.
    """
    x = realised(x)
    nodes, weights = _table(NORMAL, x.mean.device, x.mean.dtype)
    std = x.var.clamp_min(torch.finfo(x.var.dtype).tiny).sqrt()
    values = x.mean.unsqueeze(-1) + std.unsqueeze(-1) * nodes
    y: Tensor = getattr(torch.ops.aten, name)(values, *args)
    mean = y @ weights
    return Gaussian(mean, (y - mean.unsqueeze(-1)).square() @ weights, x.axes)


def convolved(
    x: Gaussian,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> Gaussian:
    """Through a convolution of any rank, with zeros around."""
    x, weight = realised(x), weight.to(x.mean.dtype)
    found = [
        positions.windows(axis, taps, step, around, apart)
        for axis, taps, step, around, apart in zip(
            x.axes, weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    chosen = tuple(windows for _, windows in found)
    mean = _summed(x.mean, weight, chosen, groups)
    var = _summed(x.var, weight.square(), chosen, groups)
    if bias is not None:
        mean = mean + bias.to(mean.dtype).view(1, -1, *(1 for _ in x.axes))
    return Gaussian(mean, var, tuple(axis for axis, _ in found))


def mapped(x: Gaussian, weight: Tensor, bias: Tensor | None) -> Gaussian:
    """Through a linear layer, (K, I) -> (K, O)."""
    x, weight = realised(x), weight.to(x.mean.dtype)
    mean = F.linear(x.mean, weight, None if bias is None else bias.to(x.mean.dtype))
    return Gaussian(mean, F.linear(x.var, weight.square()))


def added(x: Gaussian, y: Gaussian, factor: float = 1.0) -> Gaussian:
    """``x + factor * y``."""
    bent = [of for of in (x, y) if not (isinstance(of.slope, float) and of.slope == 1)]
    (x, y), axes = _met([x, y])
    skewed = bent[0] if len(bent) == 1 and factor == 1 and bent[0].axes == axes else None
    total = Gaussian(x.mean + factor * y.mean, x.var + factor**2 * y.var, axes)
    return replace(total, skewed=skewed)


def multiplied(x: Gaussian, y: Gaussian) -> Gaussian:
    """Element by element; an axis of one position goes with all of the other's."""
    (x, y), axes = _met([x, y])
    var = x.var * y.var + x.var * y.mean.square() + y.var * x.mean.square()
    return Gaussian(x.mean * y.mean, var, axes)


def scaled(x: Gaussian, factor: float, shift: float = 0.0) -> Gaussian:
    """``factor * x + shift``."""
    x = realised(x)
    return Gaussian(factor * x.mean + shift, factor**2 * x.var, x.axes)


def concatenated(*parts: Gaussian) -> Gaussian:
    """Along the channels."""
    met, axes = _met(parts)
    return Gaussian(torch.cat([p.mean for p in met], 1), torch.cat([p.var for p in met], 1), axes)


def dropped(x: Gaussian, share: float) -> Gaussian:
    """Through a dropout in train mode."""
    x = realised(x)
    return Gaussian(x.mean, (x.var + share * x.mean.square()) / (1 - share), x.axes)


def flattened(x: Gaussian) -> Gaussian:
    """(K, C, *spatial) -> (K, C * positions)."""
    x = realised(x)
    mean, var = x.mean, x.var
    for i, axis in enumerate(x.axes):
        at = positions.index(axis, mean.device)
        mean, var = mean.index_select(2 + i, at), var.index_select(2 + i, at)
    return Gaussian(mean.flatten(1), var.flatten(1))


def repeated(x: Gaussian, factors: Sequence[int]) -> Gaussian:
    """Each position so many times."""
    x, axes = realised(x), zip(x.axes, factors, strict=True)
    more = tuple(tuple(k for k in axis for _ in range(n)) for axis, n in axes)
    return Gaussian(x.mean, x.var, more)


def averaged(x: Gaussian) -> Gaussian:
    """The mean over all positions, which are kept as axes of one."""
    x = realised(x)
    number = math.prod(map(len, x.axes))
    mean, var = _averaged(x.mean, x.axes), _averaged(x.var, x.axes) / number
    return Gaussian.alike(mean, var, [1] * len(x.axes))


def average_pooled(
    x: Gaussian, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Gaussian:
    """Over windows, with zeros around that count."""
    x = realised(x)
    channels, taps = x.mean.shape[1], math.prod(kernel)
    return convolved(
        x,
        x.mean.new_full((channels, 1, *kernel), 1 / taps),
        None,
        stride=stride,
        padding=[(p, p) for p in padding],
        dilation=[1] * len(kernel),
        groups=channels,
    )


def max_pooled(
    x: Gaussian,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Gaussian:
    r"""The largest of each window, with what is around never the largest.

    The largest $M$ of independent elements is below $t$ if all of them are. With $h$ for the ReLU
    that they are still to go through, which for the largest comes to the same,

    $$ E[h(M)] = h(l) + \int_l^u h'(t) (1 - P(M < t))\, dt, $$

    likewise its square, by quadrature on both sides of the ReLU's bend.
    """
    x = x if x.skewed is None else replace(realised(x), skewed=None)
    rank, slope = len(x.axes), x.slope
    if isinstance(slope, Tensor):  # below zero is taken for zero
        slope = slope.clamp_min(0).unsqueeze(-1)
    elif slope < 0:
        x, slope = realised(x), 1.0
    std = x.var.clamp_min(torch.finfo(x.var.dtype).tiny).sqrt()
    classes = tuple(range(2, 2 + rank))
    low = (x.mean - REACH * std).amin(classes, keepdim=True).unsqueeze(-1)
    high = (x.mean + REACH * std).amax(classes, keepdim=True).unsqueeze(-1)
    bend = torch.where((low < 0) & (high > 0), 0, (low + high) / 2)
    nodes, weights = _table(MANY, x.mean.device, x.mean.dtype)
    t = torch.cat([low + (bend - low) * nodes, bend + (high - bend) * nodes], -1)
    z = (t - x.mean.unsqueeze(-1)) / std.unsqueeze(-1)
    log_below = torch.special.log_ndtr(z.clamp(-FAR, FAR))
    axes = []
    for how in zip(x.axes, kernel, stride, padding, dilation, strict=True):
        axis, size, step, pad, spread = how
        out, windows = positions.windows(axis, size, step, (pad, pad), spread)
        counts = positions.counts(max(axis) + 1, windows, t.device, t.dtype)
        log_below = torch.tensordot(log_below, counts, dims=([2], [0]))  # the axis goes to the end
        axes.append(out)
    above = -torch.expm1(log_below.movedim(2, -1))
    rise = torch.where(t < 0, slope, 1.0) * torch.cat(
        [(bend - low) * weights, (high - bend) * weights], -1
    )
    start, bent = (torch.where(of < 0, slope * of, of) for of in (low, t))
    more = (rise * above).sum(-1)
    square = (2 * (bent - start) * rise * above).sum(-1)  # about the start
    var = (square - more.square()).clamp_min(0)
    return Gaussian(start.squeeze(-1) + more, var, tuple(axes))


# ---- over classes of positions


def _summed(
    x: Tensor, weight: Tensor, windows: tuple[tuple[Axis, ...], ...], groups: int
) -> Tensor:
    """The sums of a convolution at one position of every class, (K, O, *classes)."""
    sizes = [len(axis) for axis in windows]
    if x[0, 0].numel() == 1:  # all inputs alike: how often is each tap inside?
        rows = weight.unflatten(0, (groups, -1)).flatten(3).transpose(2, 3).flatten(1, 2)
        parts = x.reshape(len(x), groups, -1).transpose(0, 1)  # (groups, K, I)
        taps = torch.bmm(parts, rows.transpose(1, 2)).transpose(0, 1)
        taps = taps.reshape(len(x), len(weight), -1)
        sums = taps @ positions.inside(windows, x.device, x.dtype)
        return sums.view(len(x), -1, *sizes)
    for i, axis in enumerate(windows):  # what each window reads, side by side; zeros outside
        pads = [0, 0] * (x.dim() - 3 - i) + [0, 1]
        zero = x.shape[2 + i]
        at = tuple(zero if k == OUTSIDE else k for window in axis for k in window)
        x = F.pad(x, pads).index_select(2 + i, positions.index(at, x.device))
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(windows) - 1]
    return convolution(x, weight, None, weight.shape[2:], groups=groups)


def _averaged(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Over positions, of which a class has some; (K, C, *classes) -> (K, C)."""
    return x.flatten(2) @ positions.shares(tuple(axes), x.device, x.dtype) if axes else x


def _met(parts: Sequence[Gaussian]) -> tuple[list[Gaussian], tuple[Axis, ...]]:
    """Each with the classes that all together tell apart."""
    parts = [realised(part) for part in parts]
    sizes = [max(map(len, axes)) for axes in zip(*(p.axes for p in parts), strict=True)]
    parts = [replace(part, axes=positions.spread(part.axes, sizes)) for part in parts]
    if all(part.axes == parts[0].axes for part in parts):
        return parts, parts[0].axes
    means, variances = [p.mean for p in parts], [p.var for p in parts]
    joint: list[Axis] = []
    for i, axes in enumerate(zip(*(p.axes for p in parts), strict=True)):
        axis, members = positions.distinct(list(zip(*axes, strict=True)))
        joint.append(axis)
        for k, chosen in enumerate(zip(*members, strict=True)):
            at = positions.index(chosen, means[k].device)
            means[k], variances[k] = (t.index_select(2 + i, at) for t in (means[k], variances[k]))
    made = [Gaussian(m, v, tuple(joint)) for m, v in zip(means, variances, strict=True)]
    return made, tuple(joint)


@positions.once
def _table(rows: Table, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, device=device, dtype=dtype)
