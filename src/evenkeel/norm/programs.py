"""What normalizers decide on, between the engine's two passes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evenkeel.errors import ConfigError
from evenkeel.moments import Moments, processes


def batch_statistics(moments: Moments, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each part of the batch, (K, 1, C)."""
    mean, var = (m.view(parts, -1, m.shape[1]) for m in moments[:2])
    middle = mean.mean(1, keepdim=True)
    away = mean - middle
    return middle, torch.addcmul(var, away, away).mean(1, keepdim=True)


class _Kept(NamedTuple):
    """Of the way forward, all of (K, N / K, G, C / G) or broadcast against that."""

    weight: Tensor
    away: Tensor  # means of the samples, about the batch's
    var: Tensor  # variances of the samples
    inverse: Tensor  # one over the batch's deviation
    gain: Tensor  # weight times that
    squared: Tensor  # its square
    zc: Tensor  # means after batch normalization, about the group's
    inverse_g: Tensor  # one over the group's deviation
    gain_g: Tensor  # group weight times that
    affine_shape: torch.Size  # of the group's weight


@dataclass(frozen=True, slots=True)
class BatchChannel:
    r"""Batch normalization, then group normalization of what it gives, as one scale and one shift.

    With the batch's mean $\mu$ and variance $v$, and $a = \gamma/\sqrt{v+\varepsilon}$, a channel
    of a sample with mean $m$ and variance $s$ has $z = a(m - \mu) + \beta$ and $a^2 s$ after the
    first. From these follow the group's mean $\bar z$ and variance $\bar s$, and with $r =
    \gamma_g/\sqrt{\bar s + \varepsilon}$ the whole is

    $$ y = r a\,(x - m) + r(z - \bar z) + \beta_g. $$

    It brings its derivative along: by autograd the small tensors take as long as all four passes
    over a (2, 256, 28, 28) input.

    Attributes:
        groups: number of groups, G.
        eps: added to variances.
        mean: $\mu$ of each part of the batch, (K, 1, C).
        var: $v$ of each part of the batch, (K, 1, C).
        share: what one sample's moments count for in these two, where they are the batch's own, so
            that gradients flow through them; None where they are constants.
        synchronized: whether they are those of the batches of all processes.
    """

    groups: int
    eps: float
    mean: Tensor
    var: Tensor
    share: float | Tensor | None = None
    synchronized: bool = False

    def __call__(self, moments: Moments, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, in plain operations."""
        if self.share is None:
            return self._decide(moments, self.mean, self.var, *parameters)[0]
        if self.synchronized:
            raise ConfigError(
                "Statistics that are synchronized over processes have first derivatives only, in "
                "eager mode; for others, construct the layer without synchronize=True."
            )
        seen = batch_statistics(moments, self.mean.shape[0])
        return self._decide(moments, *seen, *parameters)[0]

    def forward(self, moments: Moments, *parameters: Tensor) -> tuple[tuple[Tensor, Tensor], _Kept]:
        """The same, with what :meth:`backward` needs."""
        return self._decide(moments, self.mean, self.var, *parameters)

    def _decide(
        self,
        moments: Moments,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight_g: Tensor,
        bias_g: Tensor,
    ) -> tuple[tuple[Tensor, Tensor], _Kept]:
        shape = moments.mean.shape
        m, s, mean, var = (self._grouped(t) for t in (*moments[:2], mean, var))
        weight, bias = (t.view(self.groups, -1) for t in (weight, bias))
        affine_shape = weight_g.shape
        weight_g, bias_g = (t.view(self.groups, -1) for t in (weight_g, bias_g))
        away = m - mean
        inverse = (var + self.eps).rsqrt()
        gain = weight * inverse
        squared = gain * gain
        z = torch.addcmul(bias, away, gain)
        zc = z - z.mean(3, keepdim=True)
        spread = torch.addcmul(s * squared, zc, zc).mean(3, keepdim=True)
        inverse_g = (spread + self.eps).rsqrt()
        gain_g = inverse_g * weight_g
        scale, shift = gain_g * gain, torch.addcmul(bias_g, zc, gain_g)
        kept = _Kept(weight, away, s, inverse, gain, squared, zc, inverse_g, gain_g, affine_shape)
        return (scale.view(shape), shift.view(shape)), kept

    def backward(self, kept: _Kept, d_scale: Tensor, d_shift: Tensor) -> tuple[Tensor, ...]:
        """The chain rule through :meth:`_decide`, from its end to its start."""
        shape = d_scale.shape
        weight, away, s, inverse, gain, squared, zc, inverse_g, gain_g, affine_shape = kept
        ds, dh = self._grouped(d_scale), self._grouped(d_shift)
        d_gain_g = torch.addcmul(ds * gain, dh, zc)
        over = (0, 1) if affine_shape[0] > self.groups else (0, 1, 3)
        d_weight_g, d_bias_g = (d_gain_g * inverse_g).sum(over), dh.sum(over)
        # Of the group's variance, as each of its channels has a share in it.
        d_spread = (d_gain_g * gain_g).mean(3, keepdim=True) * (inverse_g * inverse_g)
        d_spread *= -0.5
        dz = torch.addcmul(dh * gain_g, zc, d_spread, value=2)
        dz -= dz.mean(3, keepdim=True)
        # Of the gain, by the three ways in which it is used.
        d_gain = torch.addcmul(dz * away, gain_g, ds)
        d_gain = d_gain.addcmul_(s * gain, d_spread, value=2).sum(1, keepdim=True)
        d_weight, d_bias = (d_gain * inverse).sum((0, 1)), dz.sum((0, 1))
        d_mean, d_var = dz * gain, d_spread * squared
        if self.share is not None:
            d_v = (d_gain * weight).mul_(inverse).mul_(inverse).mul_(inverse).mul_(-0.5)
            d_mu = d_mean.sum(1, keepdim=True)
            if self.synchronized:
                d_v, d_mu = processes.summed(d_v, d_mu)
            d_v = d_v * self.share
            d_var = d_var + d_v
            d_mean.addcmul_(away, d_v, value=2).sub_(d_mu * self.share)
        gradients = d_weight.view(-1), d_bias.view(-1), d_weight_g.view(-1), d_bias_g.view(-1)
        return d_mean.view(shape), d_var.view(shape), *gradients

    def _grouped(self, t: Tensor) -> Tensor:
        """(N, C) or (K, 1, C) -> (K, N / K or 1, G, C / G)."""
        return t.view(self.mean.shape[0], -1, self.groups, t.shape[-1] // self.groups)


UNTRUSTED = 100.0
"""Ratio of predicted to observed variances, on average, from which a prior is left aside."""


@dataclass(frozen=True, slots=True)
class BatchKalman:
    r"""Batch normalization by statistics fused from those predicted and those observed.

    With $q$ the gain, $m_p, v_p$ the prior and $m_o, v_o$ the statistics of a part of the batch,

    $$ m = m_p + q(m_o - m_p), \qquad v = v_p + q(v_o - v_p) + q(1-q)(m_o - m_p)^2, $$

    the moments of a mixture of both, told besides scale and shift, as are the observed ones.

    Attributes:
        parts: of the batch, each with statistics of its own, K.
        eps: added to the variance.
        gain: $q$; None where it is the last parameter.
        guarded: whether a prior out of reach is left aside.

    The parameters are weight and bias, (C,), then those of the prior, (K, C), where there is one.
    """

    parts: int
    eps: float
    gain: float | None
    guarded: bool = True

    def __call__(
        self, moments: Moments, weight: Tensor, bias: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """Scale and shift (N, C); fused mean and variance (K, C); observed ones."""
        observed = batch_statistics(moments, self.parts)  # (K, 1, C)
        mean, var = observed
        if others:
            prior = others[0].unsqueeze(1), others[1].unsqueeze(1)
            if self.guarded:
                prior = trusted(prior, observed)
            mean, var = fused(prior, observed, others[2] if self.gain is None else self.gain)
        away = moments.mean.view(*observed[0].shape[:1], -1, len(weight)) - mean
        scale = weight * (var + self.eps).rsqrt()
        shift = torch.addcmul(bias, away, scale)
        scale = scale.expand_as(shift)
        decided = (t.reshape(moments.mean.shape) for t in (scale, shift))
        return *decided, *(t.squeeze(1) for t in (mean, var, *observed))


def fused(
    prior: tuple[Tensor, Tensor], observed: tuple[Tensor, Tensor], gain: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The moments of the mixture of both."""
    (mean, var), (seen_mean, seen_var) = prior, observed
    away = seen_mean - mean
    return mean + gain * away, var + gain * (seen_var - var) + gain * (1 - gain) * away.square()


def trusted(prior: tuple[Tensor, Tensor], observed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The prior, or in its place the observed moments where it is out of reach."""
    use = is_trusted(prior, observed[1])
    return torch.where(use, prior[0], observed[0]), torch.where(use, prior[1], observed[1])


@torch.no_grad()
def is_trusted(prior: tuple[Tensor, Tensor], observed: Tensor) -> Tensor:
    """Whether it is finite and its variances are, on average, not many times the observed ones."""
    seen = observed > 0
    ratio = torch.where(seen, prior[1] / torch.where(seen, observed, 1), 0)
    finite = prior[0].isfinite().all() & prior[1].isfinite().all()
    return finite & (ratio.sum() < UNTRUSTED * seen.sum().clamp_min(1))
