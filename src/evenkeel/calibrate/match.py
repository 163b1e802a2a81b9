"""Layers that no normalizer follows: a scale and an offset behind them, for calibration to fit."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from evenkeel.batches import Forward, default_forward, size
from evenkeel.calibrate.collect import measured
from evenkeel.calibrate.statistics import in_eval, uncompiled
from evenkeel.errors import CalibrationError
from evenkeel.layers import (
    chosen_paths,
    restore_precision,
    running_normalizers,
    weight_layer,
)
from evenkeel.layers.wrapper import Wrapper
from evenkeel.moments import BatchMoments

EPS = 1e-5
"""Added to variances, as a share of the layer's mean variance: a dead channel stays dead."""


class OutputMatch(nn.Module):
    r"""Gives a layer's output channels the moments that they had on the digital network.

    $$ y_c = \sqrt{\frac{v_c + \varepsilon}{\sigma_c^2 + \varepsilon}}\,(x_c - \mu_c) + m_c $$

    with the digital moments $m, v$ (``mean``, ``var``) and those of the present hardware
    $\mu, \sigma^2$ (``running_mean``, ``running_var``), which start equal: then nothing changes,
    bit for bit.

    Args:
        mean: (C,) of the digital outputs.
        var: (C,) of the digital outputs.
        channel_dim: axis of the channels: 1 behind a convolution, -1 behind a linear layer.
    """

    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, mean: Tensor, var: Tensor, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.register_buffer("mean", mean.clone())
        self.register_buffer("var", var.clone())
        self.register_buffer("running_mean", mean.clone())
        self.register_buffer("running_var", var.clone())

    @property
    def eps(self) -> float:
        """What is added to variances."""
        return max(EPS * float(self.var.mean()), TINY)

    def forward(self, x: Tensor) -> Tensor:
        """The output with its digital moments, in the same shape and dtype."""
        eps = (EPS * self.var.mean()).clamp_min(TINY)
        scale = ((self.var + eps) / (self.running_var + eps)).sqrt()
        shift = self.mean - self.running_mean * scale
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_precision(self, before, before)
        return self

    def extra_repr(self) -> str:
        """Number of channels."""
        return f"{len(self.mean)}, channel_dim={self.channel_dim}"


TINY = torch.finfo(torch.float32).tiny


class Matched(Wrapper):
    """A layer with an :class:`OutputMatch` behind it, which runs in the digital periphery."""

    def __init__(self, layer: nn.Module, match: OutputMatch) -> None:
        super().__init__(layer)
        self.match = match

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, matched."""
        y: Tensor = self.match(self.layer(*args, **kwargs))
        return y


@dataclass
class Matching:
    """The certificate of :func:`match_`.

    Attributes:
        matched: paths of the layers that got a scale and an offset.
        skipped: the other layers with weights, and why each got none.
        samples: number of samples that the digital moments were taken of.
    """

    matched: list[str]
    skipped: dict[str, str]
    samples: int
    _model: nn.Module = field(repr=False)
    _wrappers: list[Matched] = field(repr=False)

    def undo(self) -> None:
        """Take them out again."""
        for path, module in list(self._model.named_modules(remove_duplicate=False)):
            if isinstance(module, Matched) and module in self._wrappers:
                self._model.set_submodule(path, module.layer)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"matched": self.matched, "skipped": self.skipped, "samples": self.samples}

    def table(self) -> str:
        """A row per layer."""
        said = dict.fromkeys(self.matched, "matched") | self.skipped
        width = max(map(len, said))
        return "\n".join(f"{path:<{width}}  {what}" for path, what in said.items())


class NothingToMatchError(CalibrationError):
    """Every layer has a normalizer behind it, or cannot be matched."""


@torch.no_grad()
def match_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Collection[str] | None = None,
    forward: Forward = default_forward,
) -> Matching:
    """Put a scale and an offset behind the layers that no normalizer follows, in place.

    Calibration fits the statistics that normalizers keep. Group norm and layer norm keep none, many
    networks have no norm, and nothing normalizes behind a classifier. This records, once and on
    the digital network, the moments of each output channel, and puts an :class:`OutputMatch` behind
    each layer, which does nothing yet. Once the network is on hardware, :func:`calibrate_` fits
    them like normalizers.

    Use when layers have no batch norm behind them. Not when the outputs' moments differ much
    between inputs, as those of a class do, and the inputs are few or of one class; nor with a few
    small batches that differ in kind: calibration normalizes each by its own statistics, which then
    say other things of a layer than this saw, and an exact chip is taken for one with an error.
    Attention and recurrent layers must be taken apart first: :func:`evenkeel.layers.take_apart_`.

    Args:
        model: the digital network, before it is programmed; changed in place.
        batches: unlabelled inputs like those in use.
        layers: paths or patterns of the layers to match. Default: every layer with weights whose
            output does not itself enter a normalizer that keeps running statistics.
        forward: how to run the model on a batch.

    Returns:
        The certificate: layers matched and skipped, with the reasons; ``undo()``.

    Raises:
        NothingToMatchError: no layer to match; a CalibrationError.
        CalibrationError: outputs are not finite, or a layer named cannot be matched.

    Examples:
        >>> import torch, evenkeel as ek
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.ReLU(),
        ...     torch.nn.Flatten(), torch.nn.Linear(288, 10)).eval()
        >>> images = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> ek.calibrate.match_(net, images.split(64)).matched
        ['0', '4']
        >>> chip = ek.analog.program(net, ek.analog.Gaussian(0.2), seed=0)
        >>> ek.calibrate_(chip, images.split(64)).kept
        True
    """
    model = uncompiled(model)
    outputs = _Outputs(model)
    with in_eval(model, {}), contextlib.ExitStack() as hooks:
        outputs.watch(hooks)
        for batch in batches:
            outputs.whole = size(batch) > 0
            forward(model, batch)
            outputs.end_of_forward()
    skipped = outputs.why_not()
    named = None if layers is None else chosen_paths(layers, outputs.paths)
    if named is None:
        skipped |= {path: f"'{n}' follows" for path, n in outputs.followed.items()}
    else:
        if refused := sorted(named & set(skipped)):
            raise CalibrationError(f"'{refused[0]}' cannot be matched: {skipped[refused[0]]}.")
        skipped |= {path: "left out by `layers`" for path in outputs.paths if path not in named}
    found = {path: m for path, m in outputs.moments.items() if path not in skipped}
    if not found:
        said = "; ".join(f"'{path}': {why}" for path, why in skipped.items())
        raise NothingToMatchError(
            f"match_ needs a layer with weights that no normalizer with running statistics "
            f"follows; {type(model).__name__} has none ({said or 'no layer has weights'}). On a "
            f"network that is on a chip already it is too late: match first, then program."
        )
    put = [put_behind(model, path, BatchMoments.pool(moments)) for path, moments in found.items()]
    samples = max(sum(m.samples for m in moments) for moments in found.values())
    return Matching(list(found), skipped, samples, model, put)


def put_behind(model: nn.Module, path: str, moments: BatchMoments) -> Matched:
    """Wrap the layer at ``path``, to keep the moments given."""
    layer = model.get_submodule(path)
    weight = next(layer.parameters())
    mean, var = (m.to(weight.device, torch.float32) for m in (moments.mean, moments.unbiased_var))
    return _wrap(model, layer, OutputMatch(mean, var, channel_dim(layer)))


def put_behind_empty(model: nn.Module, matched: Mapping[str, int]) -> None:
    """Wrap the layers at the paths given, with so many channels each, for a file to fill."""
    for path, channels in matched.items():
        layer = model.get_submodule(path)
        device = next(layer.parameters()).device
        mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        _wrap(model, layer, OutputMatch(mean, var, channel_dim(layer)))


def _wrap(model: nn.Module, layer: nn.Module, match: OutputMatch) -> Matched:
    wrapper = Matched(layer, match)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is layer:  # one that goes by two names is wrapped under both
            model.set_submodule(path, wrapper)
    return wrapper


def matched_paths(model: nn.Module) -> dict[str, int]:
    """Paths of the layers that are matched, and their numbers of channels."""
    return {
        path: len(module.match.mean)
        for path, module in model.named_modules()
        if isinstance(module, Matched)
    }


def channel_dim(layer: nn.Module) -> int:
    """Axis of a layer's output that its weights' rows stand for."""
    return -1 if hasattr(layer, "out_features") else 1


class _Outputs:
    """What the layers with weights put out while the network runs, and what it flows into."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.whole = False  # whether the batch has samples
        self.paths = [p for p, m in model.named_modules() if weight_layer(m) is not None]
        self.moments: dict[str, list[BatchMoments]] = {}
        self.followed: dict[str, str] = {}
        self._calls: dict[str, int] = {}
        self._most: dict[str, int] = {}
        self._alive: dict[int, tuple[Tensor, str]] = {}  # kept, so that no identity is used twice

    def watch(self, hooks: contextlib.ExitStack) -> None:
        """Set the hooks."""
        for path in self.paths:
            layer = self.model.get_submodule(path)
            hooks.callback(layer.register_forward_hook(self._saw(path)).remove)
        for path, normalizer in running_normalizers(self.model):
            assert isinstance(normalizer, nn.Module)
            hooks.callback(normalizer.register_forward_pre_hook(self._enters(path)).remove)

    def _saw(self, path: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            if len(output) == 0 and self.whole:  # a head in whose images nothing was found
                return
            self._calls[path] = self._calls.get(path, 0) + 1
            self._alive[id(output)] = output, path
            seen = measured(output, path, channel_dim(layer), who="match_")
            self.moments.setdefault(path, []).append(seen)

        return hook

    def _enters(self, normalizer: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in self._alive:
                self.followed[self._alive[id(args[0])][1]] = normalizer

        return hook

    def end_of_forward(self) -> None:
        """Take note of how often each layer was called."""
        for path, calls in self._calls.items():
            self._most[path] = max(calls, self._most.get(path, 0))
        self._calls.clear()
        self._alive.clear()

    def why_not(self) -> dict[str, str]:
        """Layers that cannot be matched, and why."""
        reasons = {}
        for path in self.paths:
            calls = self._most.get(path, 0)
            if not path:
                reasons[path] = "it is the whole network, and has no place to be replaced in"
            elif calls == 0:
                reasons[path] = "it was not called"
            elif sum(m.samples for m in self.moments[path]) < 2:
                reasons[path] = "one sample says nothing of how its outputs vary"
            elif calls > 1:
                reasons[path] = f"it is called {calls} times in a forward, each with its own input"
        return reasons
