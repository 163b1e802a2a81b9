"""Batch-channel normalization: what batches know, for networks that must train on one or two."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError, ShapeError, nearest
from evenkeel.moments import Moments, barrier, measure, normalize
from evenkeel.norm.base import RunningNorm
from evenkeel.norm.functional import require_groups
from evenkeel.norm.programs import BatchChannel
from evenkeel.norm.running import is_recomputation, observe, remember_, trail_

STATISTICS = ("batch", "running")


class BatchChannelNorm(RunningNorm):
    r"""Batch normalization, and group normalization of what it gives, in one read and one write.

    $$ z = \gamma_c \frac{x - \mu_c}{\sqrt{v_c + \varepsilon}} + \beta_c, \qquad
       y = \gamma_g \frac{z - \bar z_{ng}}{\sqrt{\bar s_{ng} + \varepsilon}} + \beta_g $$

    with group mean $\bar z$ and variance $\bar s$ of each sample. Channel normalization alone lets
    single channels drift far from mean 0 and deviation 1, where a ReLU behind them is off for every
    input; knowledge of the batch keeps them there.

    ``statistics="batch"``: $\mu, v$ are the batch's, with gradients through them, and in eval mode
    their running averages: batch norm followed by group norm. ``statistics="running"``, for batches
    of one or two: they are estimates that every training batch corrects at the rate $r$, then uses
    as constants,

    $$ \mu \leftarrow \mu + r\,(\bar x - \mu), \qquad
       v \leftarrow v + r\,(\overline{(x - \mu_\mathrm{old})^2} - v), $$

    so that train and eval mode are the same function but for the last update.

    Use when memory allows one or two samples. Not when batches are large: batch norm is as accurate
    there, and folds into the convolution at inference, which this does not.

    Args:
        num_features: channels, C.
        num_groups: groups, a divisor of C, with two channels or more in each.
        statistics: "batch" or "running".
        update_rate: $r$, above 0 and at most 1.
        normalization_batch: split the batch into parts of so many samples, each with statistics of
            its own, as on as many devices; "running" takes the parts one after the other, so that
            a part is normalized by what those before it have told, too.
        affine: $\gamma_g, \beta_g$ for each "group", as published, or for each "channel".
        synchronize: statistics of the batches of all processes together; in every process the layer
            must be called as often, with an empty batch if need be. A compiled graph breaks there.
        eps: added to variances.
        momentum: of the running averages for "batch", as in torch; None for the plain average.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape:
        (N, C, *spatial) -> the same, any layout.

    State:
        ``weight``, ``bias`` are $\gamma_c, \beta_c$; with ``running_mean``, ``running_var``,
        ``num_batches_tracked`` named as batch norm's, whose checkpoints load. ``group_weight``,
        ``group_bias`` are $\gamma_g, \beta_g$. A channel whose batch is not finite leaves its
        running statistics alone. Running statistics are kept in float32 or better. Under
        ``DistributedDataParallel`` without ``synchronize`` each process has its own, until its
        ``broadcast_buffers`` (on by default) gives all of them the first one's. Recomputation
        under activation checkpointing updates nothing, in eager mode; compiled, a checkpointed
        layer is updated twice, as torch's batch norm is, and for "running" its gradients are those
        of the later statistics: do not combine the two.

    Numerics:
        Statistics in float32 (float64 for float64), exact also where the mean is large.

    Raises:
        ConfigError: an option out of its range.
        ShapeError: another number of channels; one value per channel with statistics of the batch.

    Examples:
        >>> import torch, evenkeel as ek
        >>> layer = ek.norm.BatchChannelNorm2d(8, 4, statistics="running", update_rate=0.5)
        >>> x = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0))
        >>> y = layer(x)  # a batch of one is enough
        >>> torch.equal(y, layer.eval()(x))
        True

    References:
        Qiao et al., "Rethinking Normalization and Elimination Singularity in Neural Networks",
        arXiv 1911.09738. Their released code starts with $r = 0$ and never sets it, which leaves
        group norm; here a rate of 0 is refused.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        *,
        statistics: Literal["batch", "running"] = "batch",
        update_rate: float = 0.1,
        normalization_batch: int | None = None,
        affine: Literal["group", "channel"] = "group",
        synchronize: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        require_groups(num_features, num_groups)
        if statistics not in STATISTICS:
            raise ConfigError(
                f"Unknown statistics {statistics!r}. {nearest(statistics, STATISTICS)}"
            )
        if affine not in ("group", "channel"):
            raise ConfigError(f"affine must be 'group' or 'channel'; got {affine!r}.")
        if not 0 < update_rate <= 1:
            raise ConfigError(
                f"update_rate must be above 0 and at most 1; got {update_rate!r}. At 0 the "
                f"statistics would stay at mean 0 and variance 1; to freeze them, use eval mode."
            )
        if synchronize and normalization_batch is not None:
            raise ConfigError("Choose one of synchronize=True and normalization_batch=.")
        super().__init__(
            num_features,
            normalization_batch,
            eps=eps,
            momentum=momentum,
            device=device,
            dtype=dtype,
        )
        self.num_groups = num_groups
        self.statistics = statistics
        self.update_rate = update_rate
        self.synchronize = synchronize
        if synchronize:
            _break_graphs()
        size = num_groups if affine == "group" else num_features
        self.group_weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.group_bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """As in torch; group weights to 1 and biases to 0."""
        super().reset_parameters()
        if hasattr(self, "group_bias"):  # torch calls this before they are there
            nn.init.ones_(self.group_weight)
            nn.init.zeros_(self.group_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; in train mode, update the running statistics."""
        return self.normalized(x)

    def normalized(self, x: Tensor, *, relu: bool = False) -> Tensor:
        """As ``forward``, with a ReLU in the same write where asked for."""
        if self.synchronize and torch.compiler.is_compiling():
            return _outside_of_the_graph(self, x, relu)
        self._check_input_dim(x)
        size = self.normalization_batch
        if self.training and size is not None and x.shape[0] > size and x.shape[0] % size:
            whole = x.shape[0] // size * size  # what is left over is a part of its own
            self._require_values(x.shape[0] - whole, x.shape[2:].numel())
            return torch.cat([self.normalized(part, relu=relu) for part in x.tensor_split([whole])])
        moments = measure(x)
        program = BatchChannel(self.num_groups, self.eps, **self._statistics(moments))
        given = self.weight, self.bias, self.group_weight, self.group_bias
        return normalize(x, moments, program, *given, relu=relu)

    @torch.no_grad()
    def _statistics(self, moments: Moments) -> dict[str, Any]:
        """What to normalize each part of the batch by."""
        samples = moments.mean.shape[0]
        empty = samples * moments.positions == 0
        if not self.training or (empty and not self.synchronize):
            return self._constants(moments)
        parts = max(1, samples // (self.normalization_batch or max(1, samples)))
        if self.statistics == "running":
            return self._estimates(moments, parts)
        self._require_values(samples // parts, moments.positions)
        seen = observe(moments, parts=parts, synchronize=self.synchronize)
        if not is_recomputation():
            remember_(self, seen)
        return {
            "mean": seen.mean,
            "var": seen.var,
            "share": seen.share,
            "synchronized": self.synchronize,
        }

    def _require_values(self, samples: int, positions: int) -> None:
        if samples * positions == 1 and self.statistics == "batch" and not self.synchronize:
            raise ShapeError(
                f"{type(self).__name__} with statistics='batch' needs more than one value per "
                f"channel to train on; got one sample of one position"
                f"{'' if self.normalization_batch is None else ' as a part of the batch'}. Use "
                f"statistics='running'."
            )

    def _estimates(self, moments: Moments, parts: int) -> dict[str, Any]:
        """Correct the running statistics by each part in turn; what each is normalized by."""
        if is_recomputation():
            return self._as_before(moments)
        seen = observe(moments, parts=parts, synchronize=self.synchronize)
        of_parts = trail_(self._running(), (seen.mean, seen.var), self.update_rate)
        self.num_batches_tracked.add_(1)
        mean, var = barrier(*(t.to(moments.mean.dtype) for t in of_parts))
        self._recent.add(moments.mean, (mean, var))
        return {"mean": mean, "var": var}

    def _as_before(self, moments: Moments) -> dict[str, Any]:
        """What a batch that is recomputed was normalized by."""
        known = self._recent.like(moments.mean, type(self).__name__)
        return (
            self._constants(moments)
            if known is None
            else dict(zip(("mean", "var"), known, strict=True))
        )

    def _constants(self, moments: Moments) -> dict[str, Any]:
        # Copies, as a second derivative may ask for them after they have moved on.
        mean, var = (t.to(moments.mean.dtype, copy=True) for t in self._running())
        return {"mean": mean.view(1, 1, -1), "var": var.view(1, 1, -1)}

    def _running(self) -> tuple[Tensor, Tensor]:
        return self.running_mean, self.running_var

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.synchronize:
            _break_graphs()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        # Batch norm has no group weights: those there are stay.
        if f"{prefix}weight" in state:
            for name in ("group_weight", "group_bias"):
                state.setdefault(prefix + name, getattr(self, name).detach())
        super()._load_from_state_dict(state, prefix, *args)

    def options(self) -> dict[str, Any]:
        """What it was made with, besides the number of channels."""
        return {
            "num_groups": self.num_groups,
            "statistics": self.statistics,
            "update_rate": self.update_rate,
            "normalization_batch": self.normalization_batch,
            "affine": "channel" if len(self.group_weight) > self.num_groups else "group",
            "synchronize": self.synchronize,
            "eps": self.eps,
            "momentum": self.momentum,
        }

    def extra_repr(self) -> str:
        """What it was made with."""
        rate = f", update_rate={self.update_rate}" if self.statistics == "running" else ""
        part = self.normalization_batch
        return (
            f"{self.num_features}, {self.num_groups}, statistics={self.statistics!r}{rate}"
            + (", affine='channel'" if len(self.group_weight) > self.num_groups else "")
            + (f", normalization_batch={part}" if part is not None else "")
            + (", synchronize=True" if self.synchronize else "")
        )


def _outside_of_the_graph(layer: BatchChannelNorm, x: Tensor, relu: bool) -> Tensor:
    """Where processes talk to each other, a compiled graph breaks."""
    return layer.normalized(x, relu=relu)


def _break_graphs() -> None:
    # Only for those who synchronize: this loads the compiler.
    global _outside_of_the_graph  # noqa: PLW0603
    _outside_of_the_graph = torch.compiler.disable(_outside_of_the_graph)


class BatchChannelNorm1d(BatchChannelNorm):
    """:class:`BatchChannelNorm` for (N, C) or (N, C, L)."""

    dims = (2, 3)


class BatchChannelNorm2d(BatchChannelNorm):
    """:class:`BatchChannelNorm` for (N, C, H, W)."""

    dims = (4,)


class BatchChannelNorm3d(BatchChannelNorm):
    """:class:`BatchChannelNorm` for (N, C, D, H, W)."""

    dims = (5,)
