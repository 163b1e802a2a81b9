"""Hardening: training goes on under the noise that the weights will meet."""

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evenkeel.batches import Forward, default_forward, narrow, size
from evenkeel.draws import keyed_noise, read_key
from evenkeel.errors import ConfigError
from evenkeel.layers import chosen_paths, is_composite, require_own_weight, weight_layer


class InjectedNoise(nn.Module):
    r"""A weight, clipped, and in training with Gaussian noise of a share of its largest value.

    $$ \tilde w = \mathrm{clip}(w, \pm c\,\mathrm{std}(w)) + \eta\,\max|w|\,\xi,
       \qquad \xi \sim N(0, 1) $$

    drawn anew each time the weight is used; the gradient reaches $w$ through the noisy weights.
    """

    key: Tensor
    uses: Tensor

    def __init__(self, level: float, clip: float = 2.5, seed: int = 0, path: str = "") -> None:
        super().__init__()
        self.level, self.clip = level, clip
        self.register_buffer("key", read_key(seed, path, "hardening"), persistent=False)
        self.register_buffer("uses", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        """The weight that is used."""
        if math.isfinite(self.clip):
            limit = self.clip * w.detach().std(correction=0)
            limit = torch.where(limit > 0, limit, torch.inf)  # equal weights stay
            w = w.clamp(-limit, limit)
        if not self.training or self.level == 0:
            return w
        noise: Tensor = keyed_noise(w.detach(), self.key, self.uses)
        self.uses += 1
        return w + (self.level * w.detach().abs().max()) * noise


@contextlib.contextmanager
def hardening(
    model: nn.Module,
    level: float,
    *,
    clip: float = 2.5,
    seed: int = 0,
    layers: Collection[str] | None = None,
) -> Iterator[nn.Module]:
    """Train a network further with noise on its weights, by any loop and optimizer of one's own.

    Inside, in training mode, every layer that a chip would hold has noise on its weights, see
    :class:`InjectedNoise`; in eval mode they are only clipped. Make the optimizer inside, as the
    parameters are other objects there. Behind it the network has plain weights again, clipped as
    they were trained; a further time clips further. After an exception the weights are those from
    before.

    Args:
        model: changed in place.
        level: deviation of the noise, as a share of the layer's largest weight; take what the
            hardware is expected to have, or somewhat more.
        clip: in standard deviations of the layer's weights, to which they are clipped; 2.0 to 2.5
            by Joshi et al.; ``math.inf`` for none.
        seed: of the noise; torch's global generator does not move.
        layers: paths or patterns; default: all that a chip would hold, frozen ones too.

    Raises:
        ConfigError: a level or clip out of range, or a layer whose weight is not its own.

    Examples:
        >>> import torch, evenkeel as ek
        >>> net, x, y = torch.nn.Linear(8, 2), torch.randn(64, 8), torch.randint(0, 2, (64,))
        >>> with ek.analog.hardening(net, 0.1):
        ...     optimizer = torch.optim.SGD(net.parameters(), 0.1)
        ...     for _ in range(5):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(net(x), y).backward()
        ...         optimizer.step()
        >>> type(net.weight)
        <class 'torch.nn.parameter.Parameter'>

    References:
        Joshi et al., "Accurate deep neural network inference using computational phase-change
        memory", Nature Communications 11, 2473 (2020).
    """
    if not 0 <= level < math.inf:
        raise ConfigError(f"level must be 0 or more and finite; got {level!r}.")
    if not clip > 0:
        raise ConfigError(f"clip must be above 0, in standard deviations; got {clip!r}.")
    known = {path: m for path, m in model.named_modules() if weight_layer(m) is not None}
    missed = [path for path, m in model.named_modules() if is_composite(m)]
    if missed and layers is None:
        raise ConfigError(
            f"The noise does not reach the weights of '{missed[0]}', a "
            f"{type(model.get_submodule(missed[0])).__name__}. Name the layers to harden, "
            f"layers=[...]."
        )
    chosen = set(known) if layers is None else chosen_paths(layers, list(known))
    for path in chosen:
        require_own_weight(known[path], path)
        if parametrize.is_parametrized(known[path], "weight"):
            raise ConfigError(f"The weight of '{path}' is made of other parameters; harden those.")
    before = {path: known[path].weight.detach().clone() for path in sorted(chosen)}
    try:
        for path, weight in before.items():
            noise = InjectedNoise(level, clip, seed, path).to(weight.device)
            parametrize.register_parametrization(known[path], "weight", noise)
        yield model
    except BaseException:
        _end(known, before)
        raise
    hooks = [known[path].parametrizations.weight.eval() for path in before]
    _end(known, {path: hook().detach() for path, hook in zip(before, hooks, strict=True)})


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


PART = 32


def _numbers(output: Any) -> Tensor:
    """All floating-point numbers of an output, in a row."""
    leaves = torch.utils._pytree.tree_leaves(output)
    numbers = [x.flatten() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    if not numbers:
        raise ConfigError("harden_ needs a network that puts out floating-point numbers.")
    return torch.cat(numbers)


def _end(known: dict[str, nn.Module], weights: dict[str, Tensor]) -> None:
    """Plain parameters again, of these values."""
    for path in weights:
        if parametrize.is_parametrized(known[path], "weight"):
            known[path].parametrizations.weight.eval()  # type: ignore[union-attr]
            parametrize.remove_parametrizations(known[path], "weight")
            own = known[path]._parameters  # the weight stands first again, as it did
            own.update({name: own.pop(name) for name in list(own) if name != "weight"})
    with torch.no_grad():
        for path, weight in weights.items():
            known[path].weight.copy_(weight)  # type: ignore[operator]
