"""Normalizers as functions of their input and all of their state."""

from torch import Tensor

from evenkeel.errors import ConfigError, ShapeError
from evenkeel.moments import Moments, measure, normalize, normalize_and_tell
from evenkeel.norm.programs import BatchChannel, BatchKalman
from evenkeel.norm.running import observe


def batch_channel_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    group_weight: Tensor,
    group_bias: Tensor,
    *,
    num_groups: int,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    r"""Batch normalization, and group normalization of what it gives, in one read and one write.

    $$ z = \gamma_c \frac{x - \mu_c}{\sqrt{v_c + \varepsilon}} + \beta_c, \qquad
       y = \gamma_g \frac{z - \bar z_{ng}}{\sqrt{\bar s_{ng} + \varepsilon}} + \beta_g $$

    Args:
        x: (N, C, *spatial).
        weight: $\gamma_c$, (C,).
        bias: $\beta_c$, (C,).
        group_weight: $\gamma_g$, (num_groups,), or (C,) for one of each channel.
        group_bias: $\beta_g$, likewise.
        num_groups: groups of channels, a divisor of C.
        mean: $\mu$, (C,), as a constant; default: the batch's own, with gradients through it.
        var: $v$, (C,), likewise.
        eps: added to variances.
        relu: whether ReLU follows, in the same write.

    Returns:
        Of the shape, dtype and layout of ``x``.

    Raises:
        ConfigError: ``num_groups`` does not divide C; only one of mean and var.
        ShapeError: ``x`` does not have the channels of ``weight``.

    Examples:
        >>> import torch
        >>> x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
        >>> one, none = torch.ones(8), torch.zeros(8)
        >>> y = batch_channel_norm(x, one, none, one, none, num_groups=4)
        >>> z = torch.nn.functional.batch_norm(x, None, None, training=True)
        >>> torch.allclose(y, torch.nn.functional.group_norm(z, 4), atol=1e-5)
        True

    References:
        Qiao et al., "Rethinking Normalization and Elimination Singularity in Neural Networks",
        arXiv 1911.09738.
    """
    if (mean is None) != (var is None):
        raise ConfigError("batch_channel_norm needs both mean and var as constants, or neither.")
    require_groups(len(weight), num_groups)
    require_channels(x, len(weight), "batch_channel_norm")
    require_sizes(num_groups, weight, bias, group_weight, group_bias)
    moments = measure(x)
    if mean is None or var is None:
        seen = observe(moments)
        program = BatchChannel(num_groups, eps, seen.mean, seen.var, seen.share)
    else:
        mean, var = (t.view(1, 1, -1).to(moments.mean.dtype) for t in (mean, var))
        program = BatchChannel(num_groups, eps, mean, var)
    return normalize(x, moments, program, weight, bias, group_weight, group_bias, relu=relu)


def batch_kalman_norm(
    x: Tensor,
    prior: Moments | None,
    weight: Tensor,
    bias: Tensor,
    *,
    gain: float | Tensor = 0.1,
    parts: int = 1,
    eps: float = 1e-5,
) -> tuple[Tensor, Moments]:
    r"""Batch normalization by statistics fused from those predicted and those observed.

    $$ m = m_p + q(m_o - m_p), \qquad v = v_p + q(v_o - v_p) + q(1-q)(m_o - m_p)^2, \qquad
       y = \gamma\frac{x - m}{\sqrt{v + \varepsilon}} + \beta $$

    Args:
        x: (N, C, *spatial).
        prior: $m_p, v_p$, (K, C); None for batch norm.
        weight: $\gamma$, (C,).
        bias: $\beta$, (C,).
        gain: $q$; a tensor where it is learned.
        parts: K; the batch is split into so many, each with statistics of its own.
        eps: added to variances.

    Returns:
        ``y``, of the shape, dtype and layout of ``x``; and $m, v$, (K, C), with gradients to all.

    Raises:
        ConfigError: ``parts`` does not divide N.
        ShapeError: ``x`` or the prior is not of the channels of ``weight``.

    Examples:
        >>> import torch
        >>> x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
        >>> prior = Moments(torch.zeros(1, 8), torch.ones(1, 8), 1)
        >>> y, (mean, var, _) = batch_kalman_norm(x, prior, torch.ones(8), torch.zeros(8), gain=0.1)
        >>> torch.allclose(mean, 0.1 * x.mean((0, 2, 3)))
        True

    References:
        Wang et al., "Batch Kalman Normalization", arXiv 1802.03133.
    """
    require_channels(x, len(weight), "batch_kalman_norm")
    if parts < 1 or len(x) % parts:
        raise ConfigError(f"parts must divide the batch; got {parts} for {len(x)} samples.")
    given = None if prior is None else tuple(prior[:2])
    shapes = [tuple(p.shape) for p in given or ()]
    if any(shape != (parts, len(weight)) for shape in shapes):
        raise ShapeError(
            f"The prior's mean and variance must be (parts, channels) = ({parts}, {len(weight)}); "
            f"got {shapes}."
        )
    moments = measure(x)
    program = BatchKalman(parts, eps, None if isinstance(gain, Tensor) else gain)
    y, mean, var, *_ = kalman_normalized(x, moments, program, given, weight, bias, gain)
    return y, Moments(mean, var, len(x) // parts * moments.positions)


def kalman_normalized(
    x: Tensor,
    moments: Moments,
    program: BatchKalman,
    prior: tuple[Tensor, ...] | None,
    weight: Tensor,
    bias: Tensor,
    gain: float | Tensor,
) -> tuple[Tensor, ...]:
    """``y``; fused mean and variance, (K, C); observed ones."""
    others = () if prior is None else (*prior, gain) if isinstance(gain, Tensor) else prior
    return normalize_and_tell(x, moments, program, weight, bias, *others)


def require_groups(channels: int, groups: int) -> None:
    """Refuse a number of groups that does not divide the channels, or leaves one to a group."""
    if groups < 1 or channels % groups or groups == channels > 1:
        fitting = [g for g in range(1, max(2, channels // 2 + 1)) if channels % g == 0]
        near = min(fitting, key=lambda g: (abs(g - groups), g))
        raise ConfigError(
            f"num_groups must divide the number of channels, with two or more in a group (of a "
            f"channel alone, the group's statistics undo all that batch statistics do); got "
            f"{groups} groups of {channels} channels. The nearest that fits is num_groups={near}."
        )


def require_sizes(groups: int, *affine: Tensor) -> None:
    """Refuse affine parameters of other sizes than C, C, and G or C twice."""
    shapes = [tuple(t.shape) for t in affine]
    channels = len(affine[0])
    if shapes not in ([(channels,)] * 2 + [(groups,)] * 2, [(channels,)] * 4):
        raise ShapeError(
            f"Batch-channel normalization needs weight and bias of shape ({channels},), and "
            f"group_weight and group_bias both of shape ({groups},) or both of ({channels},); got "
            f"{shapes}."
        )


def require_channels(x: Tensor, channels: int, who: str) -> None:
    """Refuse an input without so many channels on its second axis."""
    if x.dim() < 2 or x.shape[1] != channels:
        raise ShapeError(
            f"{who} needs input of shape (N, {channels}, *spatial); got {tuple(x.shape)}. Channels "
            f"are axis 1: construct it for the number of channels that comes, or permute."
        )
