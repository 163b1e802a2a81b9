"""Batch norm over parts of the batch, as on as many devices."""

from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError, ShapeError
from evenkeel.moments import Moments, measure, normalize
from evenkeel.norm.programs import batch_statistics
from evenkeel.norm.running import is_recomputation, observe, remember_


class GhostBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that in train mode normalizes every few samples by themselves.

    What training on so many samples per device does, on one device. Published results for small
    batches are often of this kind: a small normalization batch within an ordinary batch of SGD.

    Args:
        num_features: channels.
        normalization_batch: samples of a part; what is left over is a part of its own.
        eps: as in torch.
        momentum: as in torch; the running statistics follow the average over the parts.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        ConfigError: ``normalization_batch`` below 1.
        ShapeError: a part with one value per channel, in train mode.

    Examples:
        >>> import torch, evenkeel as ek
        >>> layer, plain = ek.norm.GhostBatchNorm2d(3, 2), torch.nn.BatchNorm2d(3)
        >>> x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(layer(x)[:2], plain(x[:2]), atol=1e-5)
        True
    """

    def __init__(
        self,
        num_features: int,
        normalization_batch: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if normalization_batch < 1:
            raise ConfigError(
                f"normalization_batch must be 1 or more; got {normalization_batch!r}."
            )
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype)
        self.normalization_batch = normalization_batch

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        if not self.training or x.numel() == 0:
            return super().forward(x)
        self._check_input_dim(x)
        size = min(self.normalization_batch, x.shape[0])
        if x.shape[0] % size:
            whole = x.shape[0] // size * size
            return torch.cat([self(part) for part in x.tensor_split([whole])])
        moments, parts = measure(x), x.shape[0] // size
        if size * moments.positions == 1:
            raise ShapeError(
                f"{type(self).__name__} needs more than one value per channel in each part to "
                f"train on; got parts of {size} sample with 1 position."
            )
        if not is_recomputation():
            remember_(self, observe(moments, parts=parts))

        def program(moments: Moments, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            mean, var = batch_statistics(moments, parts)  # (K, 1, C)
            away = moments.mean.view(parts, size, -1) - mean
            gain = weight * (var + self.eps).rsqrt()
            shape = moments.mean.shape
            scale = gain.expand_as(away).reshape(shape)
            return scale, torch.addcmul(bias, away, gain).view(shape)

        return normalize(x, moments, program, self.weight, self.bias)

    def options(self) -> dict[str, Any]:
        """What it was made with, besides the number of channels."""
        return {
            "normalization_batch": self.normalization_batch,
            "eps": self.eps,
            "momentum": self.momentum,
        }

    def extra_repr(self) -> str:
        """What it was made with."""
        return f"{self.num_features}, normalization_batch={self.normalization_batch}"
