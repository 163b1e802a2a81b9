"""Batch Kalman normalization: a batch's statistics fused with those that the layers before predict.

The layer alone is batch norm. :func:`evenkeel.norm.kalmanize` tells it what to expect.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import ConfigError, ShapeError
from evenkeel.moments import measure
from evenkeel.norm.base import RunningNorm
from evenkeel.norm.functional import kalman_normalized
from evenkeel.norm.programs import BatchKalman, is_trusted
from evenkeel.norm.running import Observed, is_recomputation, remember_
from evenkeel.norm.tape import LinearTransition, Tapes, Visit


class BatchKalmanNorm(RunningNorm):
    r"""Batch normalization by statistics fused from those predicted and those observed.

    With $q$ the gain, $m_p, v_p$ predicted from the layers before and $m_o, v_o$ the batch's,

    $$ m = m_p + q(m_o - m_p), \qquad v = v_p + q(v_o - v_p) + q(1-q)(m_o - m_p)^2, \qquad
       y = \gamma\frac{x - m}{\sqrt{v + \varepsilon}} + \beta. $$

    Gradients flow through all four. $q$ is a weight of blending, fixed or learned; it is not
    computed from covariances. A prior whose variances are on average 100 times the observed ones is
    left aside for that batch.

    The prior comes from :func:`evenkeel.norm.kalmanize`. Without one the layer is batch norm, and
    in eval mode it always is: it folds into the convolution, and exports.

    Args:
        num_features: channels, C.
        gain: $q$, from 0 for the prior alone to 1 for batch norm. Published: 0.1 for two samples,
            0.95 for 128.
        learn_gain: train it, as a parameter ``gain_logit`` that starts there.
        normalization_batch: split the batch into parts of so many samples, K in all, each with
            statistics of its own, as on as many devices; what is left over is a part too.
        eps: added to the variance.
        momentum: of the running averages of $m$ and $v$, as in torch; None for the plain average.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape:
        (N, C, *spatial) -> the same, any layout.

    State:
        Named as batch norm's, whose checkpoints load. Running statistics are of the fused ones,
        over all parts, in float32 or better; a channel whose batch is not finite leaves them alone.

    Raises:
        ConfigError: an option out of its range.
        ShapeError: another number of channels; one value per channel to train on, and no prior.

    Examples:
        >>> import torch, evenkeel as ek
        >>> layer, plain = ek.norm.BatchKalmanNorm2d(3), torch.nn.BatchNorm2d(3)
        >>> x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(layer(x), plain(x), atol=1e-5)
        True

    References:
        Wang et al., "Batch Kalman Normalization", arXiv 1802.03133, and "Kalman Normalization",
        NeurIPS 2018; github.com/wanggrun/Kalman-Normalization, where prior and gain are as here but
        for the prediction, which draws one pseudo-image.
    """

    gain_logit: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        gain: float = 0.1,
        learn_gain: bool = False,
        normalization_batch: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if not 0 <= gain <= 1:
            raise ConfigError(
                f"gain must be from 0, the prior alone, to 1, batch norm; got {gain!r}."
            )
        super().__init__(
            num_features,
            normalization_batch,
            eps=eps,
            momentum=momentum,
            device=device,
            dtype=dtype,
        )
        self.gain = gain
        self.register_parameter("gain_logit", None)
        if learn_gain:
            self.learn_gain_()
        self.transition: LinearTransition | None = None
        self._tapes: Tapes | None = None
        self.path = ""

    def learn_gain_(self) -> None:
        """Make the gain a parameter, from where it is."""
        if not 0 < self.gain < 1:
            raise ConfigError(
                f"A gain that is learned must start between 0 and 1; got {self.gain!r}."
            )
        logit = math.log(self.gain / (1 - self.gain))
        start = torch.tensor(logit, dtype=self.running_mean.dtype, device=self.running_mean.device)
        self.gain_logit = nn.Parameter(start)

    def join(self, tapes: Tapes, path: str) -> None:
        """Tell and hear in the forwards of a network, as the one with this path."""
        self._tapes, self.path = tapes, path

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; in train mode, update the running statistics."""
        self._check_input_dim(x)
        return self._by_fused(x) if self.training and x.numel() else self._by_running(x)

    def _by_running(self, x: Tensor) -> Tensor:
        kept = self.running_mean, self.running_var
        weight, bias = (p.to(kept[0].dtype) for p in self.affine_of(kept[0]))
        visit = self._tapes.visit(self.path) if self._tapes is not None and x.numel() else None
        if visit is not None:  # frozen in a network that trains: a constant to those behind it
            with torch.no_grad():
                moments = [k.clone().expand(len(self._parts(x)), -1) for k in kept]
                visit.tell(self, moments, moments, x.shape[2:])
        return F.batch_norm(x, *kept, weight, bias, False, 0.0, self.eps)

    def _by_fused(self, x: Tensor) -> Tensor:
        sizes = self._parts(x)
        odd = sizes[-1] < sizes[0]  # what is left over is a part too
        pieces = x.tensor_split([len(x) - sizes[-1]]) if odd else [x]
        moments = [measure(piece) for piece in pieces]
        visit = self._visit(moments[0].mean)
        prior, repeat = (None, None) if visit is None else visit.prior(self.transition)
        if prior is not None and prior[0].shape != (len(sizes), self.num_features):
            prior = None  # the network has cut its batch in other parts meanwhile
        if prior is None and sizes[-1] * moments[0].positions == 1:
            raise ShapeError(
                f"{type(self).__name__} needs more than one value per channel to train on, or a "
                f"prior; got one sample of one position. evenkeel.norm.kalmanize gives priors to "
                f"all layers but the first."
            )
        gain = self.gain if self.gain_logit is None else self.gain_logit.sigmoid()
        ys, found, start = [], [], 0
        for piece, of in zip(pieces, moments, strict=True):
            parts = len(sizes) - odd if start == 0 else 1
            rows = prior and tuple(p[start : start + parts] for p in prior)
            fixed = None if isinstance(gain, Tensor) else gain
            program = BatchKalman(parts, self.eps, fixed, guarded=self.transition is None)
            affine = self.affine_of(of.mean)
            y, *told = kalman_normalized(piece, of, program, rows, *affine, gain)
            start += parts
            ys.append(y)
            found.append(told)
        mean, var, *observed = (
            of[0] if len(of) == 1 else torch.cat(of) for of in zip(*found, strict=True)
        )
        if visit is not None:
            visit.tell(self, (mean, var), observed, x.shape[2:])
            if visit.tapes.listener is not None:
                visit.tapes.listener(self.path, prior, (mean, var), (observed[0], observed[1]))
        if not is_recomputation():
            self._recent.add(moments[0].mean, repeat)
            counts = [size * moments[0].positions for size in sizes]
            self._remember(prior, (mean, var), observed[1], counts, gain)
        return ys[0] if len(ys) == 1 else torch.cat(ys)

    def affine_of(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias; ones and zeros where it has none."""
        if self.weight is None:
            return like.new_ones(self.num_features), like.new_zeros(self.num_features)
        return self.weight, self.bias

    def _parts(self, x: Tensor) -> list[int]:
        """Samples of each part of the batch."""
        size = min(self.normalization_batch or len(x), len(x))
        rest = len(x) % size
        return [size] * (len(x) // size) + ([rest] if rest else [])

    def _visit(self, mean: Tensor) -> Visit | None:
        """To the tape of this forward; where that is repeated, to one like it."""
        if self._tapes is None or not is_recomputation():
            return None if self._tapes is None else self._tapes.visit(self.path)
        before = self._recent.like(mean, type(self).__name__)
        return None if before is None else before.visit()

    @torch.no_grad()
    def _remember(
        self,
        prior: tuple[Tensor, Tensor] | None,
        fused: tuple[Tensor, Tensor],
        observed: Tensor,
        counts: list[int],
        gain: Tensor | float,
    ) -> None:
        """Take the fused statistics into the running ones, with the observed variance unbiased."""
        share: Tensor | float = 1.0  # of the observed variance
        if prior is not None:
            guarded = self.transition is None
            share = torch.where(is_trusted(prior, observed), gain, 1.0) if guarded else gain
        more = observed.new_tensor([1 / max(count - 1, 1) for count in counts]).unsqueeze(1)
        mean, var = fused[0], fused[1] + share * observed * more
        remember_(self, Observed(mean.unsqueeze(1), var.unsqueeze(1), share=0.0, bessel=1.0))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        # Batch norm has neither gain nor transition: those there are stay.
        if f"{prefix}weight" in state:
            for name, parameter in self.named_parameters():
                if name not in ("weight", "bias"):
                    state.setdefault(prefix + name, parameter.detach())
        super()._load_from_state_dict(state, prefix, *args)

    def options(self) -> dict[str, Any]:
        """What it was made with, besides the number of channels."""
        return {
            "gain": self.gain,
            "learn_gain": self.gain_logit is not None,
            "normalization_batch": self.normalization_batch,
            "eps": self.eps,
            "momentum": self.momentum,
        }

    def extra_repr(self) -> str:
        """What it was made with."""
        return (
            f"{self.num_features}, gain={self.gain}"
            + (", learn_gain=True" if self.gain_logit is not None else "")
            + (
                f", normalization_batch={self.normalization_batch}"
                if self.normalization_batch is not None
                else ""
            )
        )


class BatchKalmanNorm1d(BatchKalmanNorm):
    """:class:`BatchKalmanNorm` for (N, C) or (N, C, L)."""

    dims = (2, 3)


class BatchKalmanNorm2d(BatchKalmanNorm):
    """:class:`BatchKalmanNorm` for (N, C, H, W)."""

    dims = (4,)


class BatchKalmanNorm3d(BatchKalmanNorm):
    """:class:`BatchKalmanNorm` for (N, C, D, H, W)."""

    dims = (5,)
