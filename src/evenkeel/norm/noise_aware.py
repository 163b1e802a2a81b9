"""Batch norm that follows the hardware it runs on while it serves."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.errors import ConfigError
from evenkeel.layers import restore_precision

WARM_UP = 1024
"""Samples in which the layer takes over what it sees: before, it has no yardstick to doubt it."""
PRIOR = 4
"""What the statistics it starts with are worth, in samples."""
CALLS = 8
"""A later window spans at least so many calls: noise that is new at each read averages out."""
SURPRISE = 4.0
"""Times the expected squared distance, so two standard errors, beyond which it is doubted."""


class NoiseAwareBatchNorm(nn.modules.batchnorm._BatchNorm):
    r"""Batch norm whose running statistics follow the activations in eval mode.

    $$ y = \gamma\,\frac{x-\mu}{\sqrt{\sigma^2+\varepsilon}}+\beta, \qquad
       \mu \leftarrow \mu + r\,h\,(\bar x - \mu), \quad
       \sigma^2 \leftarrow \sigma^2 + r\,h\,(s^2 - \sigma^2) $$

    Over the first 1024 samples it warms up: each batch is taken into the statistics before it is
    normalized, the first almost entirely, so that all layers of a deep network come right together.
    Then an update is made once for every ``window`` samples (and 8 batches), whose activations have
    the mean $\bar x$ and the variance $s^2$, and a sample's output no longer depends on its batch.

    From then on the guard is on. A window counts ($h = 1$) if its means are within two standard
    errors of $\mu$: their sampling error, measured from how much the window's samples differ from
    each other, and what batches differed by while warming up. A run of one class is further off
    than its own samples explain: such windows are left out ($h = 0$), until ``patience`` samples in
    a row have been. Then it is the hardware, or the world, that has changed, and the layer warms up
    anew.

    In train mode it is batch norm. ``tracking = False`` freezes the statistics.

    Use when a network serves on noisy or slowly drifting hardware and there is no time to
    calibrate. Not when the first 1024 samples, or ``patience`` later ones, may be of one class; nor
    when one input must always give one output.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: of the running statistics in train mode, as in torch.
        affine: whether there are $\gamma$ and $\beta$.
        window: samples whose moments make one update.
        update_rate: $r$ in the long run.
        patience: surprising samples in a row after which the layer warms up anew.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape:
        (N, C, *spatial) -> the same.

    Examples:
        >>> import torch, evenkeel as ek
        >>> layer = ek.norm.NoiseAwareBatchNorm2d(3).eval()
        >>> images = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 5
        >>> for batch in images.split(8):
        ...     _ = layer(batch)
        >>> bool((layer.running_mean - 5).abs().max() < 0.2)
        True

    References:
        After Tsai et al., "Robust Processing-In-Memory Neural Networks via Noise-Aware
        Normalization", arXiv 2007.03230, as told in its abstracts, which do not give the rule;
        warm-up, windows and guard are evenkeel's.
    """

    running_mean: Tensor
    running_var: Tensor
    samples_tracked: Tensor
    windows_tracked: Tensor
    doubted: Tensor
    unrest: Tensor
    window_samples: Tensor
    window_calls: Tensor
    window_sums: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        window: int = 256,
        update_rate: float = 0.1,
        patience: int = 2048,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device=device, dtype=dtype)
        if window < 2 or not 0 < update_rate <= 1 or patience < 0:
            raise ConfigError(
                f"{type(self).__name__} needs a window of 2 samples or more, an update_rate "
                f"above 0 and at most 1, a patience of 0 or more; got {window!r}, {update_rate!r}, "
                f"{patience!r}."
            )
        self.window = window
        self.update_rate = update_rate
        self.patience = patience
        self.tracking = True
        whole = {"device": device, "dtype": torch.int64}
        real = {"device": device, "dtype": torch.float32}
        self.register_buffer("samples_tracked", torch.zeros((), **whole))
        self.register_buffer("windows_tracked", torch.zeros((), **whole))
        self.register_buffer("doubted", torch.zeros((), **whole))
        self.register_buffer("unrest", torch.zeros((), **real))
        # What is served since the last update: not saved, so gone on loading.
        self.register_buffer("window_samples", torch.zeros((), **whole), persistent=False)
        self.register_buffer("window_calls", torch.zeros((), **whole), persistent=False)
        sums = torch.zeros(3, num_features, **real)
        self.register_buffer("window_sums", sums, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, and in eval mode take note of what came."""
        if self.training or not self.tracking or not x.numel():
            return super().forward(x)
        self._check_input_dim(x)
        with torch.no_grad():
            sums = self._sums(x)
            seen = self._warm_up(sums, x.shape[0])
        # Copies, as a gradient may need what this batch was normalized by after it has moved on.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        y = F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        with torch.no_grad():
            self._follow(sums, x.shape[0], seen)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of shape (N, C, *spatial), got {input.shape}")

    def _sums(self, x: Tensor) -> Tensor:
        """(3, C): over samples, of their means, of those squared, and of their mean squares.

        All about the present running mean, which keeps digits where the mean is large.
        """
        about = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)  # (N, C, P)
        real = self.window_sums.dtype
        about = about.to(real) - self.running_mean.to(real)[:, None]
        shift = about.mean(2)  # (N, C)
        return torch.stack([shift.sum(0), shift.square().sum(0), about.square().mean(2).sum(0)])

    def _warm_up(self, sums: Tensor, samples: int) -> Tensor:
        """Take a batch into the statistics before it is normalized by them; whether it was."""
        cold = (self.samples_tracked < WARM_UP) & torch.isfinite(sums).all()
        rate = cold * (samples / (samples + PRIOR + self.samples_tracked / 4))
        mean, var, distance, error = self._moments(
            sums, torch.ones_like(self.samples_tracked) * samples
        )
        self._move(rate, mean, var + (1 - rate) * mean.square())
        self.unrest += rate * ((distance - error).clamp_min(0).nan_to_num() - self.unrest)
        self.samples_tracked += samples * cold
        return cold

    def _follow(self, sums: Tensor, samples: int, seen: Tensor) -> None:
        """Add a batch to the window, and the window to the statistics once it is full."""
        self.window_sums += sums.masked_fill(seen, 0)
        self.window_samples += samples * ~seen
        self.window_calls += ~seen
        full = (self.window_samples >= self.window) & (self.window_calls >= CALLS)
        mean, var, distance, error = self._moments(self.window_sums, self.window_samples)
        expected = error + self.unrest / self.window_calls.clamp_min(1)
        doubt = full & (distance > SURPRISE * expected)
        sound = torch.isfinite(self.window_sums).all()
        rate = (1 / (2 + self.windows_tracked)).clamp_min(self.update_rate)
        self._move(rate * (full & sound & ~doubt), mean, var)
        self.windows_tracked += full & sound & ~doubt
        self.doubted += self.window_samples * (doubt & sound)
        self.doubted.masked_fill_(full & sound & ~doubt, 0)
        anew = self.doubted > self.patience
        for count in (self.samples_tracked, self.windows_tracked, self.doubted):
            count.masked_fill_(anew, 0)
        for kept in (self.window_sums, self.window_samples, self.window_calls):
            kept.masked_fill_(full, 0)

    def options(self) -> dict[str, Any]:
        """What it was made with, besides the number of channels."""
        return {
            "window": self.window,
            "update_rate": self.update_rate,
            "patience": self.patience,
            "eps": self.eps,
            "momentum": self.momentum,
        }

    def forget_window_(self, *, warm: bool) -> None:
        """Drop what was seen since the last update, as the statistics have been set from outside.

        Args:
            warm: whether the new statistics are to be trusted: there is no warming up then.
        """
        for kept in (self.window_sums, self.window_samples, self.window_calls, self.doubted):
            kept.zero_()
        self.samples_tracked.fill_(WARM_UP if warm else 0)
        self.windows_tracked.zero_()

    def reset_running_stats(self) -> None:
        """As in torch; what has been tracked goes too."""
        super().reset_running_stats()
        if hasattr(self, "window_sums"):  # torch calls this before there is anything to forget
            self.forget_window_(warm=False)
            self.unrest.zero_()

    def _moments(self, sums: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean about the running one and variance, (C,); the mean's squared distance, its error."""
        n = samples.clamp_min(2)
        mean, square, power = sums / samples.clamp_min(1)
        var = (power - mean.square()).clamp_min(0)
        unit = self.running_var.to(sums.dtype) + self.eps
        error = ((square - mean.square()).clamp_min(0) / (n - 1) / unit).mean()
        return mean, var, (mean.square() / unit).mean(), error

    def _move(self, rate: Tensor, mean: Tensor, var: Tensor) -> None:
        self.running_mean += (rate * mean).nan_to_num()
        self.running_var += (rate * (var - self.running_var)).nan_to_num()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_precision(self, before, ("unrest", "window_sums"))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "running_mean" in state_dict:  # a BatchNorm's state has none of the rest
            self.forget_window_(warm=False)
            for name in ("samples_tracked", "windows_tracked", "doubted", "unrest"):
                state_dict.setdefault(prefix + name, torch.zeros_like(getattr(self, name)))
        super()._load_from_state_dict(state_dict, prefix, *args)


class NoiseAwareBatchNorm1d(NoiseAwareBatchNorm):
    """:class:`NoiseAwareBatchNorm` for (N, C) and (N, C, L)."""

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class NoiseAwareBatchNorm2d(NoiseAwareBatchNorm):
    """:class:`NoiseAwareBatchNorm` for (N, C, H, W)."""

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class NoiseAwareBatchNorm3d(NoiseAwareBatchNorm):
    """:class:`NoiseAwareBatchNorm` for (N, C, D, H, W)."""

    _check_input_dim = nn.BatchNorm3d._check_input_dim
