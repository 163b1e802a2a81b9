"""Layers that hold several matrices, as the linear layers that they are made of.

A chip, or any other method that works on matrices, then finds plain ``nn.Linear`` inside. A further
kind is one function and a call of :func:`register_composite`.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evenkeel.errors import ConfigError, ShapeError

Expand = Callable[[Any], nn.Module]
_KINDS: dict[type[nn.Module], Expand] = {}
FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def register_composite(kind: type[nn.Module], expand: Expand) -> None:
    """Make a kind known: from a layer to a module of the same function, made of known layers."""
    _KINDS[kind] = expand


def expanded(layer: nn.Module) -> nn.Module | None:
    """The layer as a module of linear layers with copies of its weights; None for other kinds.

    It has the layer's hooks, and its plain attributes such as ``hidden_size``. One whose weights a
    hook makes anew is refused with a ConfigError.
    """
    kind = next((k for k in type(layer).__mro__ if k in _KINDS), None)
    if kind is None or "forward" in vars(layer) or type(layer).forward is not kind.forward:
        return None
    if made := [name for name, value in vars(layer).items() if isinstance(value, Tensor)]:
        raise ConfigError(
            f"{made[0]!r} of a {type(layer).__name__} is made by a hook at each forward (pruning, "
            f"or weight_norm of old), so what it holds now may be stale. Make it a plain parameter "
            f"first: prune.remove(layer, {made[0]!r}) or remove_weight_norm(layer, {made[0]!r})."
        )
    if parametrize.is_parametrized(layer):
        return None
    whole = _KINDS[kind](layer).train(layer.training)
    for name, value in vars(layer).items():
        if name in FORWARD_HOOKS or not (name.startswith("_") or hasattr(whole, name)):
            vars(whole)[name] = copy.copy(value) if name in FORWARD_HOOKS else value
    return whole


def is_composite(layer: nn.Module) -> bool:
    """Whether it is of such a kind, or derived from one."""
    return isinstance(layer, tuple(_KINDS))


def take_apart_(model: nn.Module) -> list[str]:
    """Put, for each layer that holds several matrices, the linear layers it is made of.

    The network computes what it did, and what works on single layers then reaches all of them:
    weight clipping, output matching, balance for arrays. A chip needs no such preparation.

    Returns:
        Paths of the layers that were taken apart.

    Raises:
        ConfigError: the network is itself such a layer, or weights of one are made by a hook.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(8, 2, dropout=0.0, batch_first=True).eval()
        >>> x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
        >>> y = layer(x)
        >>> take_apart_(layer), torch.allclose(layer(x), y, atol=1e-5)
        (['self_attn'], True)
    """
    if is_composite(model):
        raise ConfigError(
            f"A {type(model).__name__} cannot be taken apart in place when it is the whole "
            f"network; put it into a module of your own, or nn.Sequential."
        )
    found = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if is_composite(m)]
    # All are made before any is put in; a layer in two places stays one.
    made = {module: expanded(module) for module in dict.fromkeys(m for _, m in found)}
    paths = []
    for path, module in found:
        if (whole := made[module]) is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, whole)
            paths.append(path)
    for module in model.modules() if paths else ():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # for that torch computes past the layers
    return paths


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that holds copies of these."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


class Attention(nn.Module):
    """``nn.MultiheadAttention`` of four linear layers; scores and softmax are no layers.

    Args:
        layer: whose weights and options it has.
    """

    _qkv_same_embed_dim = False
    """torch's transformer layers then call it, and do not compute past it."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = layer.embed_dim, layer.num_heads
        self.batch_first, self.dropout = layer.batch_first, layer.dropout
        self.add_zero_attn = layer.add_zero_attn
        self.bias_k, self.bias_v = layer.bias_k, layer.bias_v
        biases: Any = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        weights = (
            layer.in_proj_weight.chunk(3)
            if layer._qkv_same_embed_dim
            else (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        )
        self.q_proj, self.k_proj, self.v_proj = map(linear, weights, biases)
        self.out_proj = linear(layer.out_proj.weight, layer.out_proj.bias)
        self.in_proj_bias = None  # torch's transformer layers look at it

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``."""
        if is_causal and attn_mask is None:
            raise ShapeError("is_causal only says what attn_mask is: give the mask too.")
        single = query.dim() == 2
        swapped = not (self.batch_first or single)
        given = [t.unsqueeze(0) if single else t for t in (query, key, value)]
        given = [t.transpose(0, 1) for t in given] if swapped else given
        q, k, v = self.q_proj(given[0]), self.k_proj(given[1]), self.v_proj(given[2])
        k, v, more = self._with_extras(k, v)
        n, targets, _ = q.shape
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5  # (N, heads, targets, sources)
        for mask in (_over_pairs(attn_mask, n), _over_keys(key_padding_mask, single)):
            if mask is not None:
                scores = scores + nn.functional.pad(_additive(mask, scores.dtype), (0, more))
        weights = nn.functional.dropout(scores.softmax(-1), self.dropout, self.training)
        y = self.out_proj((weights @ v).transpose(1, 2).reshape(n, targets, -1))
        y = y.transpose(0, 1) if swapped else y
        if not need_weights:
            return (y[0] if single else y), None
        shown = weights.mean(1) if average_attn_weights else weights
        return (y[0], shown[0]) if single else (y, shown)

    def _with_extras(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with those that every query may look at besides, and their number."""
        before = k.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            shape = (len(k), 1, -1)
            k = torch.cat([k, self.bias_k.expand(shape)], 1)
            v = torch.cat([v, self.bias_v.expand(shape)], 1)
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(len(t), 1, t.shape[2])], 1) for t in (k, v))
        return k, v, k.shape[1] - before


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _over_pairs(mask: Tensor | None, n: int) -> Tensor | None:
    """(targets, sources) for all, or (N * heads, targets, sources)."""
    return mask if mask is None or mask.dim() == 2 else mask.unflatten(0, (n, -1))


def _over_keys(mask: Tensor | None, single: bool) -> Tensor | None:
    """(N, sources), or (sources,)."""
    if mask is None:
        return None
    return (mask.unsqueeze(0) if single else mask)[:, None, None, :]


register_composite(nn.MultiheadAttention, Attention)
