"""Batches of any form: tensors in tuples, lists, mappings; the first axis counts samples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.errors import CalibrationError, ConfigError

Forward = Callable[[nn.Module, Any], Any]
"""How to run a model on a batch."""


def size(batch: Any) -> int:
    """Number of samples, by the first tensor that has an axis, or of images in a list."""
    if (listed := listed_images(batch)) is not None:
        return len(listed)
    leaves, _ = torch.utils._pytree.tree_flatten(batch)
    return next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 0)


def listed_images(batch: Any) -> Sequence[Tensor] | None:
    """The images (C, H, W) of ``([image, ...], targets)``, as detectors take them."""
    if not (isinstance(batch, list | tuple) and batch and isinstance(batch[0], list | tuple)):
        return None
    images = batch[0]
    each = bool(images) and all(isinstance(x, Tensor) and x.dim() == 3 for x in images)
    return images if each and not any(isinstance(x, Tensor) for x in batch[1:]) else None


def narrow(batch: Any, start: int, stop: int) -> Any:
    """The samples from ``start`` to before ``stop``, in the same form."""
    if listed_images(batch) is not None:
        return type(batch)(part[start:stop] for part in batch)
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch
    )


def owned(batch: Any) -> Any:
    """The batch with tensors that hold their own elements only.

    A part of a larger tensor is sent to another process with all of the larger one.
    """
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and _is_part(leaf) else leaf, batch
    )


def _is_part(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


def first(batches: Iterable[Any], samples: int) -> list[Any]:
    """As many samples from the start, in whole batches but for the last.

    Examples:
        >>> [len(batch) for batch in first([torch.zeros(4), torch.zeros(4)], 6)]
        [4, 2]
    """
    taken: list[Any] = []
    for batch in batches:
        if samples <= 0:
            break
        taken.append(narrow(batch, 0, samples))
        samples -= size(batch)
    return taken


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Run a batch: a tensor, a mapping of arguments, or a tuple whose first item is the input."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple) and batch:
        return model(batch[0])
    raise CalibrationError(
        f"A batch must be a tensor, a mapping, or a tuple whose first item is the input; got "
        f"{type(batch).__name__}. Pass forward=lambda model, batch: ... for anything else."
    )


def example_of(batch: Any) -> Tensor:
    """Two samples of a batch's input, to capture a network with."""
    x = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if isinstance(x, Tensor):
        return x[:2]
    raise ConfigError(
        f"To capture a network, batches must be a tensor, or a tuple whose first item is one; got "
        f"{type(batch).__name__}. Call ek.balance_(model, example_inputs) with what the network "
        f"takes."
    )
