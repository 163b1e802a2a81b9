"""A normalizer with the activation that follows it, as one module."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from evenkeel.norm.batch_channel import BatchChannelNorm


class NormAct(nn.Module):
    """``act(drop(norm(x)))``, with a ReLU written by the normalizer itself where it can.

    Args:
        norm: a normalizer.
        act: what follows it.
        drop: what comes in between.

    Examples:
        >>> import torch, evenkeel as ek
        >>> layer = NormAct(ek.norm.BatchChannelNorm2d(8, 4), nn.ReLU())
        >>> x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(layer(x), layer.norm(x).relu())
        True
    """

    norm: nn.Module
    act: nn.Module
    drop: nn.Module

    def __init__(self, norm: nn.Module, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.drop = drop or nn.Identity()
        self.act = act

    @property
    def weight(self) -> Any:
        """The normalizer's: some networks start it at zero."""
        return self.norm.weight

    @property
    def bias(self) -> Any:
        """The normalizer's."""
        return self.norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        norm, parts = self.norm, (self.norm, self.drop, self.act)
        plain = type(self.drop) is nn.Identity and type(self.act) is nn.ReLU
        if plain and isinstance(norm, BatchChannelNorm) and not any(map(_is_special, parts)):
            return norm.normalized(x, relu=True)
        y: Tensor = self.act(self.drop(self.norm(x)))
        return y


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_special(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or a forward of its own."""
    own = isinstance(module, BatchChannelNorm) and (
        type(module).forward is not BatchChannelNorm.forward
    )
    return own or "forward" in vars(module) or any(vars(module)[hooks] for hooks in _HOOKS)


def norm_act(
    factory: Callable[[int], nn.Module], act_layer: Callable[..., nn.Module] = nn.ReLU
) -> Callable[..., NormAct]:
    """A maker of :class:`NormAct` for timm's models that want norm and activation in one.

    What it makes takes timm's arguments: ``apply_act``, ``act_layer``, ``act_kwargs``, ``inplace``,
    ``drop_layer``, ``device``, ``dtype``. (Models that want a plain norm take ``factory`` itself.)

    Args:
        factory: from the number of channels to a normalizer.
        act_layer: the activation, unless the model names another.

    Examples:
        >>> import evenkeel as ek
        >>> make = ek.norm.norm_act(lambda channels: ek.norm.BatchChannelNorm2d(channels, 8))
        >>> make(16, apply_act=False).act
        Identity()
    """

    def make(
        channels: int,
        *,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | None = act_layer,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
        eps: float | None = None,
    ) -> NormAct:
        norm = factory(channels).to(device=device, dtype=dtype)
        if eps is not None:
            norm.eps = eps  # type: ignore[assignment]
        if not apply_act or act_layer is None:
            act: nn.Module = nn.Identity()
        else:
            act = act_layer(**(act_kwargs or {}))
        return NormAct(norm, act, drop_layer() if drop_layer is not None else None)

    return make
