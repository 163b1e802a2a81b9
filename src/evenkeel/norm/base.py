"""What normalizers with running statistics have in common."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from evenkeel.errors import ConfigError, ShapeError
from evenkeel.layers import lowered, restore_precision
from evenkeel.norm.functional import require_channels
from evenkeel.norm.running import Recent

KEPT = ("running_mean", "running_var")
"""Buffers that are never below float32."""


class RunningNorm(_NormBase):
    """Running statistics in float32 or better, whatever the dtype of parameters.

    Args:
        num_features: channels, C.
        normalization_batch: samples that are normalized together; None for all.
        eps: added to variances.
        momentum: as in torch.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
    """

    dims: tuple[int, ...] | None = None
    """Dimensions of input that are accepted; None for any from two on."""
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        normalization_batch: int | None,
        *,
        eps: float,
        momentum: float | None,
        device: Any,
        dtype: Any,
    ) -> None:
        if normalization_batch is not None and normalization_batch < 1:
            raise ConfigError(
                f"normalization_batch must be 1 or more; got {normalization_batch!r}."
            )
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype)
        for name in KEPT:
            wide = torch.promote_types(getattr(self, name).dtype, torch.float32)
            self._buffers[name] = getattr(self, name).to(wide)
        self.normalization_batch = normalization_batch
        self._recent = Recent()

    def _check_input_dim(self, x: Tensor) -> None:
        require_channels(x, self.num_features, type(self).__name__)
        if self.dims is not None and x.dim() not in self.dims:
            wanted = " or ".join(str(d) for d in self.dims)
            raise ShapeError(
                f"{type(self).__name__} needs an input of {wanted} dimensions, (N, C, *spatial); "
                f"got shape {tuple(x.shape)}."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # In half precision a running statistic would stop short of where it is going.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_precision(self, before, lowered(self._buffers, before, KEPT))
        self._recent.clear()
        return self
