"""balance_: move a network to the least-norm point of its function, and the certificate of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.balance.apply import Carried, Move, move, steps
from evenkeel.balance.masses import Block, block_of
from evenkeel.balance.outputs import largest_change, numbers_in, require_same
from evenkeel.balance.solve import solve
from evenkeel.draws import Draws
from evenkeel.errors import ConfigError, GraphError
from evenkeel.graph import Coverage, Scales, find_scales
from evenkeel.layers import in_eval


@dataclass
class Balance:
    """The certificate of :func:`balance_`: what was moved, how far, and the way back.

    Attributes:
        error: largest change of an output on the probes, relative to the largest output.
        objective_before: sum of $|w|^p$, weighted by depth.
        objective_after: the same, afterwards.
        excess: bound on how far the objective is above its least value, relative to it, before
            ``exact`` rounding.
        rounds: of the solver.
        coverage: by layer, channels that could be moved, and why the others could not.
        unknown: operations without a rule, at which scales were pinned.
        scales: by layer, what each output channel was multiplied by.
    """

    error: float
    objective_before: float
    objective_after: float
    excess: float
    rounds: int
    coverage: Sequence[Coverage]
    unknown: dict[str, int]
    scales: dict[str, Tensor] = field(repr=False)
    _model: nn.Module = field(repr=False)
    _before: dict[str, Tensor] = field(repr=False)
    _move: Move = field(repr=False)
    _carried: Carried = field(repr=False)
    _versions: dict[str, int] = field(repr=False)
    _undone: bool = field(default=False, repr=False)

    @property
    def free(self) -> int:
        """Channels whose scale could be moved, over all layers."""
        return sum(layer.free for layer in self.coverage)

    def undo(self) -> None:
        """Put the parameters back bit for bit, and what was carried along by its factors.

        Raises:
            ConfigError: parameters have changed since, by training or otherwise.
        """
        if self._undone:
            return
        now = {path: p._version for path, p in self._model.named_parameters()}
        changed = [path for path, version in self._versions.items() if now.get(path) != version]
        if changed:
            raise ConfigError(
                f"The network has changed since it was balanced ('{changed[0]}'), and undoing "
                f"would lose that. Undo at once, or keep a copy of your own."
            )
        _write(self._model, self._before)
        self._carried.rescale_(self._move, back=True)
        self._undone = True

    def to_dict(self) -> dict[str, Any]:
        """All but the scales themselves, for JSON."""
        return {
            "error": self.error,
            "objective_before": self.objective_before,
            "objective_after": self.objective_after,
            "excess": self.excess,
            "rounds": self.rounds,
            "free": self.free,
            "unknown": self.unknown,
            "layers": [vars(layer) for layer in self.coverage],
        }

    def table(self) -> str:
        """A row per layer: channels, those that were free, and why the others were pinned."""
        width = max(len(layer.layer) for layer in self.coverage)
        rows = [f"{'layer':<{width}}  channels  free  pinned"]
        for layer in self.coverage:
            why = "; ".join(f"{reason} ({n})" for reason, n in layer.pinned.items())
            row = f"{layer.layer:<{width}}  {layer.channels:8d}  {layer.free:4d}  {why}"
            rows.append(row.rstrip())
        return "\n".join([*rows, str(self)])

    def __str__(self) -> str:
        return (
            f"Norm {self.objective_before:.6g} -> {self.objective_after:.6g} over {self.free} free "
            f"channels, at most {self.excess:.1e} above the least; outputs changed by "
            f"{self.error:.1e}."
        )


def balance_(
    model: nn.Module,
    example_inputs: Any,
    *,
    p: float = 2.0,
    depth_factor: float = 1.0,
    biases: bool = True,
    exact: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    copies: Sequence[nn.Module] = (),
    tolerance: float = 1e-8,
) -> Balance:
    r"""Rescale a network, in place, to the least-norm point among all that compute the same.

    Where ReLU and its like stand between two layers, what leaves a channel may be scaled by
    $e^{z}$ if what reads it is scaled by $e^{-z}$. Over all such scales, the norm

    $$ F(z) = \sum_l c^{-p\,\mathrm{depth}(l)} \sum_{rc} |w^l_{rc}|^p\, e^{p(z_r - z_c)} $$

    is convex, and has one least point: there, the mass that comes into every channel is the mass
    that goes out. Channels and what ties them are found in the network's own graph, through
    additions, concatenations and reshapes. Train and eval mode both keep their function: behind a
    batch norm, its weight and bias are what is scaled.

    Use before training goes on, to compare weights across networks, or before low-precision
    arithmetic with one scale per layer. Not where activations are GELU, SiLU or tanh: nothing
    passes those, and the certificate says so.

    Args:
        model: any network that torch can export.
        example_inputs: a tensor, or the tuple of the network's positional arguments; outputs are
            compared on it.
        p: power of the norm, above 0; large ones come near the largest weight.
        depth_factor: $c$, the published method's; above 1 moves mass from early layers to late.
        biases: whether biases count; they are scaled in any case.
        exact: round scales to powers of two. Outputs then stay the same bit for bit, and the norm
            is up to a fourth above its least value, for p = 2.
        optimizer: whose state is carried along: SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop
            without momentum, Adagrad. A weight decay that has gone into the state stays as it is.
        copies: networks with the same parameters, such as a running average; scaled likewise.
        tolerance: on the excess of the norm over its least value.

    Returns:
        The certificate: change of outputs, norm before and after, free and pinned channels with the
        reason of each pin, ``undo()``.

    Raises:
        ConfigError: an option out of its range, weights that are not finite, or an optimizer
            without a rule.
        GraphError: the network cannot be captured, nothing in it is free, or its outputs changed;
            it is then as it was.

    Examples:
        >>> import torch, evenkeel as ek
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.mul_(100), net[0].bias.mul_(100), net[2].weight.div_(100)
        >>> balance = ek.balance_(net, torch.randn(2, 4))
        >>> balance.free, balance.error < 1e-5, balance.objective_after < balance.objective_before
        (8, True, True)

    References:
        Stock et al., "Equi-normalization of Neural Networks", ICLR 2019; Osborne, "On
        pre-conditioning of matrices", J. ACM 7 (1960).
    """
    for name, value in (("p", p), ("depth_factor", depth_factor), ("tolerance", tolerance)):
        if not value > 0:
            raise ConfigError(f"{name} must be above 0; got {value!r}.")
    carried = Carried(model, optimizer, copies)
    scales = find_scales(model, example_inputs)
    blocks = blocks_of(model, scales, p=p, depth_factor=depth_factor, biases=biases)
    solution = solve(blocks, scales.number, p=p, tolerance=tolerance)
    coverage = scales.covered(solution.live)
    if not any(layer.free for layer in coverage):
        reasons = {why for layer in coverage for why in layer.pinned}
        raise GraphError(
            f"{type(model).__name__} has no channel whose scale may be moved: "
            f"{'; '.join(sorted(reasons)) or 'it has no layer with weights'}."
        )
    by = move(scales.places, solution.z, exact=exact)
    before = {p: v.detach().clone() for p, v in model.named_parameters() if p in by.factors}
    probes = _probes(example_inputs)
    expected = [_outputs(model, probe) for probe in probes]
    try:
        for path, parameter in model.named_parameters():
            by.rescale_(path, parameter)
        error = max(
            largest_change(then, _outputs(model, probe))
            for then, probe in zip(expected, probes, strict=True)
        )
        require_same(error, model)
    except BaseException:
        _write(model, before)
        raise
    carried.rescale_(by)
    value = sum(float(block.mass.sum()) for block in blocks)
    after = sum(
        float(block.mass.sum())
        for block in blocks_of(model, scales, p=p, depth_factor=depth_factor, biases=biases)
    )
    return Balance(
        error=error,
        objective_before=value,
        objective_after=after,
        excess=solution.excess,
        rounds=solution.rounds,
        coverage=coverage,
        unknown=scales.unknown,
        scales=_by_layer(scales, steps(solution.z, exact=exact)),
        _model=model,
        _before=before,
        _move=by,
        _carried=carried,
        _versions=_versions(model, before),
    )


def _by_layer(scales: Scales, factors: Tensor) -> dict[str, Tensor]:
    """What each layer's outputs were multiplied by."""
    found: dict[str, list[Tensor]] = {}
    for place in scales.places:
        if not place.bias:
            found.setdefault(place.leaf.path, []).append(factors[place.channels])
    return {path: torch.cat(of) for path, of in found.items()}


def blocks_of(
    model: nn.Module, scales: Scales, *, p: float, depth_factor: float, biases: bool
) -> list[Block]:
    """The masses of all parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    blocks = [
        block_of(place, parameters[place.leaf.path], p=p, depth_factor=depth_factor, biases=biases)
        for place in scales.places
    ]
    return [replace(block, mass=block.mass.cpu()) for block in blocks]


def _probes(example_inputs: Any) -> list[tuple[Any, ...]]:
    """The example, and normal noise of its shapes."""
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    leaves, spec = torch.utils._pytree.tree_flatten(args)
    noisy = [
        Draws(0, "probe").normal(str(i), tuple(leaf.shape)).to(leaf)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
        else leaf
        for i, leaf in enumerate(leaves)
    ]
    return [args, torch.utils._pytree.tree_unflatten(noisy, spec)]


@torch.no_grad()
def _outputs(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    with in_eval(model):
        return numbers_in(model(*args))


@torch.no_grad()
def _write(model: nn.Module, values: dict[str, Tensor]) -> None:
    for path, parameter in model.named_parameters():
        if path in values:
            parameter.copy_(values[path])


def _versions(model: nn.Module, paths: Any) -> dict[str, int]:
    return {path: p._version for path, p in model.named_parameters() if path in paths}
