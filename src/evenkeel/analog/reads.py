"""What one read of noisy devices gives: its mean and its variance, in closed form."""

import math

import torch
from torch import Tensor

TINY = 1e-30
FAR = 13.0
"""In deviations: the density is as good as 0, and still no subnormal number, which are slow."""


def read_moments(g: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of $\max(0, g + s\xi)$: a read, of which none is below zero.

    $$ m = g\,\Phi(g/s) + s\,\varphi(g/s), \qquad
       v = (g^2 + s^2)\,\Phi(g/s) + g s\,\varphi(g/s) - m^2 $$

    The sum of many such reads, as a column of an array gives it, is Gaussian by the central limit,
    so two products stand for a read of every device.

    Args:
        g: conductances, of any shape.
        std: s, of the same shape; 0 where reads are exact.

    Examples:
        >>> read_moments(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        (tensor([1.0000, 0.3989]), tensor([0.0000, 0.3408]))
    """
    # Where reads are exact, a is as large as counts, and what follows gives g and no variance.
    a = (g / std.clamp_min(TINY)).clamp_(-FAR, FAR)
    square = a.square()
    density = square.mul(-0.5).exp_().div_(math.sqrt(2 * math.pi))
    above, below = torch.special.ndtr(a), torch.special.ndtr(-a)
    mean = (g * above).addcmul_(std, density)
    # In units of std, and gathered so that nothing large cancels where reads are nearly exact.
    share = above.mul(1 + square * below).sub_(density.square())
    share.addcmul_(a.mul_(density), below - above)
    return mean, share.clamp_min_(0).mul_(std.square())
