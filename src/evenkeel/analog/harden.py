"""Hardening: training goes on under the noise that the weights will meet."""

import contextlib
import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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
