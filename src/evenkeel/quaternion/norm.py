"""Batch normalization of quaternions: whitened, or by their length."""

import contextlib
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError, ShapeError, nearest
from evenkeel.quaternion.layer import require_quaternions

Kind = Literal["whitening", "variance"]


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Without autocast, where the device has one."""
    if x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class QuaternionBatchNorm(nn.Module):
    r"""Batch norm that takes the four parts of a quaternion together.

    Over samples and positions, with the mean $\mu$ of each part,

    - whitening: $y = \Gamma L^{-1}(x - \mu) + \beta$ with $LL^T = V + \epsilon$, V the 4x4
      covariance of the parts and $\Gamma$ symmetric, at first half of the identity, so that a
      quaternion begins with a variance of 1;
    - variance: $y = \gamma\,(x - \mu)/\sqrt{\tau^2 + \epsilon} + \beta$ with $\tau^2$ the mean of
      $|x - \mu|^2$, a number for each quaternion, which turns nothing.

    In eval mode with running averages of $\mu$, and of V or $\tau^2$ (unbiased, as ``nn.BatchNorm``
    keeps them). Statistics are float32 or better.

    Args:
        num_features: channels, a multiple of 4, as [all r | all i | all j | all k].
        kind: one of these.
        eps: added to variances.
        momentum: of the running averages; None for the mean of all batches.
        affine: whether there are $\Gamma$ or $\gamma$, and $\beta$.
        device: of parameters and averages.
        dtype: of parameters.

    Shape:
        (N, num_features, ...) -> the same.

    Examples:
        >>> import torch
        >>> norm = QuaternionBatchNorm(8)
        >>> y = norm(torch.randn(64, 8, 5, 5))
        >>> covariance = y[:, ::2].transpose(0, 1).flatten(1).cov()  # of the first quaternion
        >>> torch.allclose(covariance, torch.eye(4) / 4, atol=1e-3)
        True

    References:
        Gaudet and Maida, "Deep quaternion networks", IJCNN 2018 (whitening).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        kind: Kind = "whitening",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        require_quaternions(num_features=num_features)
        if kind not in get_args(Kind):
            raise ConfigError(f"Unknown kind {kind!r}. {nearest(kind, get_args(Kind))}")
        super().__init__()
        self.num_features, self.kind = num_features, kind
        self.eps, self.momentum, self.affine = eps, momentum, affine
        channels, whole = num_features // 4, kind == "whitening"
        where = {"device": device, "dtype": dtype}
        # Of a symmetric matrix what is on and below the diagonal.
        self.rows, self.columns = torch.tril_indices(4, 4, device="cpu").tolist()
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if affine:
            gamma = (channels, 10) if whole else (channels,)
            self.weight = nn.Parameter(torch.empty(gamma, **where))
            self.bias = nn.Parameter(torch.empty(num_features, **where))
        matrix = (channels, 4, 4) if whole else (channels,)
        count = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("running_mean", torch.zeros(4, channels, device=device))
        self.register_buffer("running_var", torch.zeros(matrix, device=device))
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Averages of parts that are independent, with a variance of 1."""
        self.running_mean.zero_()
        one = torch.eye(4) if self.kind == "whitening" else torch.tensor(4.0)
        self.running_var.copy_(one.expand_as(self.running_var))
        self.num_batches_tracked.zero_()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Averages as at first; half of the identity, or 1, and no shift."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            half = torch.eye(4, device=self.weight.device)[self.rows, self.columns] / 2
            first = half if self.kind == "whitening" else torch.ones(())
            self.weight.copy_(first.expand_as(self.weight))
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Normalized quaternions."""
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ShapeError(
                f"The layer needs (N, {self.num_features}, ...); got shape {tuple(x.shape)}."
            )
        with full_precision(x):
            parts = x.reshape(x.shape[0], 4, self.num_features // 4, math.prod(x.shape[2:]))
            parts = parts.to(torch.promote_types(x.dtype, torch.float32))
            mean, variance = self._statistics(parts) if self.training else self._running(parts)
            matrix = self._matrix(variance)
            y = torch.einsum("cpq,nqcl->npcl", matrix, parts - mean[None, :, :, None])
            if self.bias is not None:
                y = y + self.bias.view(1, 4, -1, 1).to(y.dtype)
            return y.to(x.dtype).reshape(x.shape)

    def _statistics(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        number = parts.shape[0] * parts.shape[3]
        if number < 2:
            raise ShapeError(
                f"Batch norm needs 2 values or more of each channel in training; got {number}."
            )
        mean = parts.mean((0, 3))
        mean = mean + (parts - mean[None, :, :, None]).mean((0, 3))  # what rounding has left over
        away = parts - mean[None, :, :, None]
        if self.kind == "whitening":
            variance = torch.einsum("npcl,nqcl->cpq", away, away) / number
        else:
            variance = away.square().sum(1).mean((0, 2))
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = self.momentum
            if share is None:
                share = 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean), share)
            unbiased = variance * (number / (number - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), share)
        return mean, variance

    def _running(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        return self.running_mean.to(parts.dtype), self.running_var.to(parts.dtype)

    def _matrix(self, variance: Tensor) -> Tensor:
        """What is multiplied by, (C, 4, 4)."""
        identity = torch.eye(4, dtype=variance.dtype, device=variance.device)
        if self.kind == "variance":
            scale: Tensor = torch.rsqrt(variance + self.eps)
            scale = scale if self.weight is None else scale * self.weight.to(scale.dtype)
            return scale[:, None, None] * identity
        # Parts that are alike, as of grey, have a covariance whose rounding may pass eps.
        trace = variance.diagonal(dim1=1, dim2=2).sum(1)
        least = (8 * torch.finfo(variance.dtype).eps * trace).clamp_min(self.eps)
        factor = torch.linalg.cholesky_ex(variance + least[:, None, None] * identity).L
        inverse: Tensor = torch.linalg.solve_triangular(
            factor, identity.expand_as(factor), upper=False
        )
        if self.weight is None:
            return inverse
        gamma = variance.new_zeros(len(variance), 4, 4)
        weight = self.weight.to(variance.dtype)
        gamma[:, self.rows, self.columns] = weight
        gamma[:, self.columns, self.rows] = weight
        return gamma @ inverse

    def extra_repr(self) -> str:
        """Channels and options."""
        return (
            f"{self.num_features}, kind={self.kind!r}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}"
        )
