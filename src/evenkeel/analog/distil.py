"""Hardening without labels: the network is its own teacher."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.analog.harden import InjectedNoise, hardening
from evenkeel.batches import Forward, default_forward, narrow, size
from evenkeel.errors import ConfigError

PART = 32
"""Samples of a step, at most."""


def harden_(
    model: nn.Module,
    batches: Sequence[Any],
    level: float,
    *,
    clip: float = 2.5,
    passes: int = 10,
    learning_rate: float = 1e-3,
    seed: int = 0,
    forward: Forward = default_forward,
) -> nn.Module:
    r"""Harden a network by itself: under noise it learns what it gives without. No labels.

    $$ \min_w\; \mathrm{E}_{\xi}\,\frac{\lVert f_{w + \eta\max|w|\,\xi}(x) - f_0(x) \rVert^2}
       {\mathrm{Var}\,f_0} $$

    with Adam and one cycle, on parts of batches of 32 samples at most. Normalizers keep their
    statistics, and dropout is off.

    Use before programming, where a minute of training is no trouble and inputs like those in use
    are at hand; thousands rather than hundreds. Not for networks that put out a ranked list, as
    detectors do: what is ranked cannot be compared place by place.

    Args:
        model: changed in place, and left in eval mode.
        batches: unlabelled inputs.
        level: of the noise, as of :func:`hardening`.
        clip: as of :func:`hardening`.
        passes: over the batches.
        learning_rate: peak of the cycle.
        seed: of the noise.
        forward: how to run the model on a batch.

    Raises:
        ConfigError: an option out of its range, nothing to train, outputs that cannot be compared,
            or a training that diverges; the network is then as it was.

    Examples:
        >>> import torch, evenkeel as ek
        >>> x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.ReLU(), torch.nn.Linear(9, 2))
        >>> net = ek.analog.harden_(net, x.split(64), 0.1)
    """
    if not (isinstance(passes, int) and passes >= 1) or not learning_rate > 0:
        raise ConfigError(
            f"passes must be a whole number, 1 or more, and learning_rate above 0; got {passes!r} "
            f"and {learning_rate!r}."
        )
    parts = [
        narrow(batch, start, start + PART)
        for batch in batches
        for start in range(0, size(batch), PART)
    ]
    if not parts:
        raise ConfigError("harden_ needs at least one sample to learn from; there is none.")
    if reason := why_not_harden(model):
        raise ConfigError(f"harden_ cannot train {type(model).__name__}. {reason}")
    before = {p: (p.detach().clone(), p.grad) for p in model.parameters()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            _learn(model.eval(), parts, level, clip, passes, learning_rate, seed, forward)
    except BaseException:
        for p, (weight, _) in before.items():
            p.data.copy_(weight)
        for module, training in modes:
            module.training = training
        raise
    finally:
        for p, (_, grad) in before.items():
            p.grad = grad
    return model.eval()


def why_not_harden(model: nn.Module) -> str | None:
    """Why a network cannot be trained like that."""
    parameters = list(model.parameters())
    if not any(p.requires_grad for p in parameters):
        return "It has no parameters that require gradients."
    if any(p.is_inference() for p in parameters):
        return "It was made in inference mode; make it outside."
    if any(p.dtype == torch.float16 for p in parameters):
        return "Adam does not work in float16; train it in float32."
    return None


def _learn(
    model: nn.Module,
    parts: Sequence[Any],
    level: float,
    clip: float,
    passes: int,
    learning_rate: float,
    seed: int,
    forward: Forward,
) -> None:
    """The training itself; what it leaves is good only if it raises nothing."""
    parts = [torch.utils._pytree.tree_map(_usable, part) for part in parts]
    with torch.no_grad():
        wanted = [_numbers(forward(model, part)) for part in parts]
    known = torch.cat(wanted).float()
    scale = known[known.isfinite()].var(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    with hardening(model, level, clip=clip, seed=seed):
        for module in model.modules():
            if isinstance(module, InjectedNoise):
                module.train()
        learnt = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learnt, learning_rate)
        steps = passes * len(parts)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        for _ in range(passes):
            for part, aim in zip(parts, wanted, strict=True):
                optimizer.zero_grad(set_to_none=True)
                given = _numbers(forward(model, part))
                if given.shape != aim.shape:
                    raise ConfigError(
                        f"harden_ needs outputs of one size at every run; got {len(aim)} numbers "
                        f"and then {len(given)}."
                    )
                error = (given - aim)[aim.isfinite()]  # where it masks with infinity, it need not
                (error.square().mean() / scale).backward()
                optimizer.step()
                schedule.step()
        if not all(bool(p.isfinite().all()) for p in learnt):
            raise ConfigError(
                "harden_ diverged, and the network is as it was. Check the inputs for NaN, or give "
                "a lower learning_rate."
            )


def _usable(leaf: Any) -> Any:
    """A tensor that was made in inference mode as one that training can keep."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _numbers(output: Any) -> Tensor:
    """All floating-point numbers of an output, in a row."""
    leaves = torch.utils._pytree.tree_leaves(output)
    numbers = [x.flatten() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    if not numbers:
        raise ConfigError("harden_ needs a network that puts out floating-point numbers.")
    return torch.cat(numbers)
