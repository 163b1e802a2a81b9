"""balance_arrays_: digital scales around each layer that make its array's noise least."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.balance.outputs import is_same, largest_change, numbers_in, require_same
from evenkeel.balance.rescaled import KINDS, Rescaled, bare, columns, kernel_rank, product, wrap
from evenkeel.batches import Forward, default_forward
from evenkeel.errors import ConfigError
from evenkeel.layers import in_eval, weight_layer

SHARPNESS = (4, 16, 64)
"""Powers that stand for the largest weight of a row, each solved from the last one's answer."""
SILENT = 1e-4
"""A silent input counts for this share of the mean: it may wake up on other samples."""
FARTHEST = 12.0
"""Bound on the log of an input's scale."""


@dataclass
class ArrayBalance:
    r"""The certificate of :func:`balance_arrays_`.

    Attributes:
        noise_before: by layer, expected noise power at the outputs, summed over them, for noise of
            variance 1 on weights of which the largest is 1.
        noise_after: the same, afterwards.
        skipped: the other layers with weights, and why each was left alone.
        error: largest change of an output on the first batch, relative to the largest output.
    """

    noise_before: dict[str, float]
    noise_after: dict[str, float]
    skipped: dict[str, str]
    error: float
    _model: nn.Module = field(repr=False)
    _kept: dict[str, tuple[nn.Module, dict[str, Tensor]]] = field(repr=False)

    def undo(self) -> None:
        """Take the scales out again; weights and biases are as they were, bit for bit."""
        _take_out(self._model, self._kept)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "noise_before": self.noise_before,
            "noise_after": self.noise_after,
            "skipped": self.skipped,
            "error": self.error,
        }

    def table(self) -> str:
        """A row per layer: by what factor its noise power has fallen."""
        width = max(map(len, [*self.noise_before, *self.skipped, "layer"]))
        rows = [f"{'layer':<{width}}  noise power, before / after"]
        rows += [
            f"{path:<{width}}  {before / self.noise_after[path]:.2f}"
            for path, before in self.noise_before.items()
        ]
        rows += [f"{path:<{width}}  {why}" for path, why in self.skipped.items()]
        return "\n".join(rows)


@torch.no_grad()
def balance_arrays_(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward = default_forward
) -> ArrayBalance:
    r"""Scale every layer's inputs and outputs digitally, so that its array makes the least noise.

    An array's noise goes by its largest weight. Its digital side may multiply each input by $s_i$
    and each output by $u_o$, if the array holds $w_{oi} / (u_o s_i)$ instead of $w_{oi}$: the layer
    computes what it did, and with a largest weight of 1 on the array, noise of variance
    $\sigma^2$ on each weight has the expected power at the outputs

    $$ \sigma^2 \sum_{oi} u_o^2\, s_i^2\, \mathrm{E}[x_i^2], \qquad |w_{oi}| \le u_o s_i, $$

    which is least at one point, as its logarithm is convex in $\log s$. The inputs' second moments
    are measured; nothing is assumed of activations or of what the layers are joined to.

    Use before programming, where one scale serves a whole array; calibrate the chips as before. Not
    where each column has a scale of its own in hardware already: then only the inputs are left.
    Costs a multiplication for each input and output of a layer. Attention and recurrent layers must
    be taken apart first: :func:`evenkeel.layers.take_apart_`.

    Args:
        model: the digital network; changed in place, or left as it was if anything fails.
        batches: unlabelled inputs like those in use; a few hundred samples will do.
        forward: how to run the model on a batch.

    Returns:
        The certificate: noise power before and after by layer, layers skipped and why, ``undo()``.

    Raises:
        ConfigError: no batches, no layer that can be scaled, or activations that are not finite.
        CalibrationError: a batch of which it is not known how it enters; give ``forward``.
        GraphError: outputs changed; the network is as it was.

    Examples:
        >>> import torch, evenkeel as ek
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> done = ek.balance.balance_arrays_(net, [x * torch.logspace(-2, 0, 8)])
        >>> all(done.noise_after[layer] < before for layer, before in done.noise_before.items())
        True

    References:
        evenkeel's own. Equalising maxima of two layers: Nagel et al., arXiv 1906.04721; scaling by
        activations: Xiao et al., "SmoothQuant", arXiv 2211.10438.
    """
    batches = list(batches)
    if not batches:
        raise ConfigError("balance_arrays_ needs at least one batch of inputs; got none.")
    layers, skipped = _layers(model)
    power, expected = _second_moments(model, layers, batches, forward)
    for path in [path for path in layers if path not in power]:
        skipped[path] = "it was not called"
        del layers[path]
    if not layers:
        said = "; ".join(f"'{path}': {why}" for path, why in skipped.items())
        raise ConfigError(
            f"balance_arrays_ needs a linear layer or a convolution; {type(model).__name__} has "
            f"none to scale ({said or 'no layer has weights'})."
        )
    before, after, kept = {}, {}, {}
    try:
        scales = {path: least_noise(layer, power[path]) for path, layer in layers.items()}
        for exact in (False, True):
            for path, layer in layers.items():
                kept[path] = layer, {n: p.detach().clone() for n, p in layer.named_parameters()}
                s, u = (x.log2().round().exp2() if exact else x for x in scales[path])
                most = layer.weight.abs().max()
                before[path] = float(
                    _noise(layer, power[path], torch.ones_like(s), u.new_tensor([most]))
                )
                most_now = (layer.weight.abs().cpu().double() / product(layer, s, u)).max()
                after[path] = float(_noise(layer, power[path], s, u * most_now))
                _put_in(model, layer, s, u)
            with in_eval(model):
                error = largest_change(expected, numbers_in(forward(model, batches[0])))
            if is_same(error, model) or exact:
                break
            # Near equals that a network ranks change places by rounding; powers of two have none.
            _take_out(model, kept)
        require_same(error, model)
    except BaseException:
        _take_out(model, kept)
        raise
    return ArrayBalance(before, after, skipped, error, model, kept)


def least_noise(layer: Any, power: Tensor) -> tuple[Tensor, Tensor]:
    r"""Scales of inputs $s$ and outputs $u$ that make a layer's noise least, float64.

    Args:
        layer: linear or convolution.
        power: $\mathrm{E}[x_i^2]$ of its inputs.
    """
    largest, read = _largest(layer), columns(layer).expand(len(layer.weight), -1)
    power = (power.double() + SILENT * power.double().mean()).clamp_min(1e-30)
    log_w, log_q = largest.clamp_min(1e-30).log(), power.log()
    log_s = torch.zeros_like(power, requires_grad=True)
    with torch.enable_grad():
        for sharpness in SHARPNESS:
            solver = torch.optim.LBFGS([log_s], max_iter=60, line_search_fn="strong_wolfe")

            def log_noise(sharpness: int = sharpness, solver: Any = solver) -> Tensor:
                solver.zero_grad()
                s = log_s[read]
                log_u = ((log_w - s) * sharpness).logsumexp(1, keepdim=True) / sharpness
                value = (2 * (log_u + s) + log_q[read]).logsumexp((0, 1))
                value.backward()
                return value

            solver.step(log_noise)
    log_s = log_s.detach()
    s = (log_s - log_s.mean()).clamp(-FARTHEST, FARTHEST).exp()
    u = (largest / s[read]).amax(1)
    return s, torch.where(u > 0, u, u.max().clamp_min(1e-30))


def _noise(layer: Any, power: Tensor, s: Tensor, u: Tensor) -> Tensor:
    """Expected power at the outputs, for weights on the array of which the largest is 1."""
    read = columns(layer).expand(len(layer.weight), -1)
    positions = layer.weight[0, 0].numel()
    by_output = (s.square() * power)[read].sum(1)
    power_: Tensor = positions * (u.square() * by_output).sum()
    return power_


def _largest(layer: Any) -> Tensor:
    """Largest weight of each output and input channel, (O, I / groups)."""
    weight: Tensor = layer.weight.detach().cpu().double().abs()
    return weight.flatten(2).amax(2) if weight.dim() > 2 else weight


def _layers(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Layers that can be scaled; the others with weights, and why not."""
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for path, module in model.named_modules():
        weights = weight_layer(module)
        if weights is None:
            continue
        if not path:
            skipped[type(module).__name__] = "it is the whole network"
        elif not isinstance(module, KINDS):
            skipped[path] = f"{type(module).__name__} is not a kind of layer that can be scaled"
        elif not torch.equal(weights.matrix(module), module.weight.flatten(1)) or (
            module._parameters.get("weight") is None
        ):
            skipped[path] = "its weight is computed at each forward"
        elif not bool(module.weight.any()):
            skipped[path] = "all its weights are zero"
        else:
            found[path] = module
    return found, skipped


def _second_moments(
    model: nn.Module, layers: dict[str, Any], batches: Sequence[Any], forward: Forward
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Mean square of each layer's input channels, float64 on the CPU; the first batch's output."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook_of(path: str) -> Any:
        def hook(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            channels = x.transpose(-1, -kernel_rank(layer) - 1)
            rows = channels.reshape(-1, channels.shape[-1]).double()
            sums[path] = sums.get(path, torch.zeros(())) + rows.square().sum(0).cpu()
            counts[path] = counts.get(path, 0) + len(rows)

        return hook

    hooks = [
        layer.register_forward_hook(hook_of(path), with_kwargs=True)
        for path, layer in layers.items()
    ]
    try:
        with in_eval(model):
            outputs = [numbers_in(forward(model, batch)) for batch in batches[:1]]
            for batch in batches[1:]:
                forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {path: total / max(counts[path], 1) for path, total in sums.items()}
    for path, power in found.items():
        if not bool(power.isfinite().all()):
            raise ConfigError(f"The inputs of '{path}' must be finite; they hold NaN or infinity.")
    return found, outputs[0]


def _put_in(model: nn.Module, layer: Any, s: Tensor, u: Tensor) -> None:
    """Scale a layer's weights, and what comes to them and from them the other way."""
    layer.weight.div_(product(layer, s, u).to(layer.weight.device))
    if layer.bias is not None:
        layer.bias.div_(u.to(layer.bias.device))
    scales = (scale.to(layer.weight.device, torch.float32) for scale in (s, u))
    wrap(model, layer, Rescaled(layer, *scales))


def _take_out(model: nn.Module, kept: dict[str, tuple[nn.Module, dict[str, Tensor]]]) -> None:
    for wrapper in [module for module in model.modules() if isinstance(module, Rescaled)]:
        if any(bare(wrapper) is layer for layer, _ in kept.values()):  # a match may lie between
            wrap(model, wrapper, wrapper.layer)
    with torch.no_grad():
        for layer, parameters in kept.values():
            for name, value in parameters.items():
                layer.get_parameter(name).copy_(value)
