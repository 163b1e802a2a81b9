"""What a controller is trained to do in an episode."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from evenkeel.memory.key_value import KeyValueMemory

Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From keys (n, d) and queries (q, d), each with their classes, numbered from 0, to the loss."""

TINY = 1e-7


def attention_loss(
    keys: Tensor, owners: Tensor, queries: Tensor, labels: Tensor, *, sharpening: str = "softabs"
) -> Tensor:
    r"""The logarithmic loss of a memory's scores, element by element.

    With $P$ the attention of each class and $y$ the one-hot label, over queries b and classes c,

    $$ L = -\operatorname{mean}_{b,c} \left[ y \log P + (1 - y) \log(1 - P) \right]. $$

    Args:
        keys: supports (n, d).
        owners: their classes (n,), numbered from 0 as they first come.
        queries: (q, d).
        labels: their classes (q,).
        sharpening: one of :data:`evenkeel.memory.SHARPENINGS`; with softmax, vectors of
            different classes are driven apart instead of towards a right angle.

    References:
        Karunaratne et al., Nature Communications 12, 2468 (2021).
    """
    memory = KeyValueMemory(keys.shape[1], sharpening=sharpening, device=keys.device)
    memory.write(keys.float(), owners)
    scores = memory.read(queries.float()).scores.clamp(TINY, 1 - TINY)
    return F.binary_cross_entropy(scores, F.one_hot(labels, scores.shape[1]).to(scores.dtype))


def prototypical_loss(keys: Tensor, owners: Tensor, queries: Tensor, labels: Tensor) -> Tensor:
    r"""Cross entropy of minus the squared distances to each class's mean of keys.

    References:
        Snell et al., "Prototypical networks for few-shot learning", NeurIPS 2017.
    """
    return F.cross_entropy(-to_prototypes(keys.float(), owners, queries.float()), labels)


def to_prototypes(keys: Tensor, owners: Tensor, queries: Tensor) -> Tensor:
    """Squared distances (q, classes) of queries (q, d) to each class's mean of its keys (n, d)."""
    count = torch.bincount(owners)
    total = keys.new_zeros(len(count), keys.shape[1]).index_add(0, owners, keys)
    means = total / count.unsqueeze(1)
    inner = queries @ means.T
    return queries.square().sum(1, keepdim=True) - 2 * inner + means.square().sum(1)


OBJECTIVES: Mapping[str, Objective] = {
    "softabs": attention_loss,
    "softmax": functools.partial(attention_loss, sharpening="softmax"),
    "prototypes": prototypical_loss,
}
"""By name; softmax is the control that shows what softabs is for."""
