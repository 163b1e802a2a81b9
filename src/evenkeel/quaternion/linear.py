"""The quaternion linear layer."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from evenkeel.errors import ShapeError
from evenkeel.quaternion.init import Init, Scale
from evenkeel.quaternion.layer import Algorithm, QuaternionLayer, require_quaternions
from evenkeel.quaternion.product import in_eight


class QuaternionLinear(QuaternionLayer):
    r"""$y_o = \sum_i w_{oi} \otimes x_i + b_o$, a quarter of the parameters of ``nn.Linear``.

    Args:
        in_features: real numbers, a multiple of 4, as [all r | all i | all j | all k].
        out_features: likewise.
        bias: whether there is one; a real number for each output.
        algorithm: see :class:`evenkeel.quaternion.QuaternionLayer`.
        init: see :func:`evenkeel.quaternion.quaternion_init_`; with He's scale.
        device: of parameters.
        dtype: of parameters.

    Shape:
        (..., in_features) -> (..., out_features).

    Raises:
        ShapeError: features that are no multiple of 4, or an input of others.

    Examples:
        >>> import torch
        >>> layer = QuaternionLinear(8, 16)
        >>> layer(torch.randn(2, 5, 8)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 5, 16]), 48)
    """

    scale: Scale = "he"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        algorithm: Algorithm = "auto",
        init: Init = "isotropic",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        require_quaternions(in_features=in_features, out_features=out_features)
        shape = (out_features // 4, in_features // 4)
        terms = min(in_features, out_features)
        outputs = out_features if bias else None
        super().__init__(shape, outputs, terms, algorithm, init, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """The products, by one form or the other."""
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ShapeError(
                f"The layer needs {self.in_features} features on the last axis; got shape "
                f"{tuple(x.shape)}."
            )
        if not self.is_fast(x.numel() // self.in_features):
            return F.linear(x, self.kernel(fast=False), self.bias)
        return in_eight(x, self.kernel(fast=True), self.bias, F.linear, -1)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, algorithm={self.algorithm!r}"
        )
