"""One engine under every normalizer: measure, decide on numbers per sample and channel, write.

Any normalizer gives ``y = scale * (x - mean) + shift``, where scale and shift, (N, C), are a small
program over the mean and variance of every sample and channel. :func:`measure` reads the
activations once; the program works on N times C numbers; :func:`normalize` writes once. Backward is
one pass that reduces, the program's own backward on tiny tensors, and one pass that writes. Of the
activations only the input is kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from evenkeel.errors import ShapeError
from evenkeel.moments import passes
from evenkeel.moments.barrier import barrier


class Moments(NamedTuple):
    """What a normalizer knows of its input.

    Attributes:
        mean: (N, C) over positions, in float32 or better.
        var: (N, C) about that mean, biased.
        positions: numbers that each of them is taken over.
    """

    mean: Tensor
    var: Tensor
    positions: int


Program = Callable[..., tuple[Tensor, ...]]
"""From moments and parameters to scale and shift, (N, C) each, in plain differentiable operations.

It must be pure: it runs again where a second derivative is taken. What it gives besides is handed
on, see :func:`normalize_and_tell`.
"""


class Derived(Protocol):
    """A program that brings its derivative along, which saves small networks the autograd."""

    def __call__(self, moments: Moments, *parameters: Any) -> tuple[Tensor, ...]:
        """As every program."""

    def forward(self, moments: Moments, *parameters: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The same values, and whatever ``backward`` needs of the way to them."""

    def backward(self, kept: Any, *gradients: Tensor) -> Sequence[Tensor | None]:
        """From the values' gradients those of mean, variance (None for zero), every parameter."""


def measure(x: Tensor) -> Moments:
    """The moments of ``x``, (N, C, *spatial), for a program to work on.

    In eager mode they carry no gradient: :func:`normalize` accounts for how they depend on ``x``.

    Examples:
        >>> mean, var, positions = measure(torch.tensor([[[1.0, 3.0]], [[5.0, 5.0]]]))
        >>> mean.tolist(), var.tolist(), positions
        ([[2.0], [5.0]], [[1.0], [0.0]], 2)
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ShapeError(
            f"A normalizer needs a floating input of shape (N, C, *spatial); got shape "
            f"{tuple(x.shape)}, {x.dtype}."
        )
    if _wants_plain():
        return _plain_moments(x)
    with torch.no_grad():
        return Moments(*passes.sample_moments(x), x.shape[2:].numel())


def normalize(
    x: Tensor, moments: Moments, program: Program, *parameters: Tensor, relu: bool = False
) -> Tensor:
    """Normalize ``x`` by what ``program(moments, *parameters)`` decides.

    Args:
        x: (N, C, *spatial).
        moments: what :func:`measure` gave for it.
        program: see :data:`Program`, and :class:`Derived`.
        parameters: all tensors that gradients shall reach through the program, which gets them in
            the statistics' dtype.
        relu: whether ReLU follows; its mask is not kept, but made again in backward.

    Returns:
        Of the shape, dtype and layout of ``x``.

    Examples:
        >>> def instance_norm(moments, weight):
        ...     scale = weight * (moments.var + 1e-5).rsqrt()
        ...     return scale, torch.zeros_like(scale)
        >>> x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> y = normalize(x, measure(x), instance_norm, torch.ones(3))
        >>> torch.allclose(y, torch.nn.functional.instance_norm(x), atol=1e-5)
        True
    """
    return normalize_and_tell(x, moments, program, *parameters, relu=relu)[0]


def normalize_and_tell(
    x: Tensor, moments: Moments, program: Program, *parameters: Tensor, relu: bool = False
) -> tuple[Tensor, ...]:
    """As :func:`normalize`; besides, all that the program gives after scale and shift.

    Gradients come back through that too, to the parameters and, by way of the moments, to ``x``.
    """
    if _wants_plain():
        return _plain(x, moments, program, parameters, relu=relu)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
        return _Normalize.apply(x, moments, program, relu, *parameters)  # type: ignore
    scale, shift, *told = program(moments, *_promoted(parameters, moments))
    y = passes.affine(x, scale, _offset(moments.mean, scale, shift), relu=relu)
    return y, *told


class _Normalize(torch.autograd.Function):
    """The two passes forward and the two backward, with the program in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, moments: Moments, program: Any, relu: bool, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.derived = program if hasattr(program, "backward") else _Traced(program)
        promoted = _promoted(parameters, moments)
        (scale, shift, *told), ctx.kept = ctx.derived.forward(moments, *promoted)
        ctx.save_for_backward(x, *parameters)
        ctx.program, ctx.relu, ctx.moments = program, relu, moments
        ctx.scale, ctx.offset = scale, _offset(moments.mean, scale, shift)
        return passes.affine(x, scale, ctx.offset, relu=relu), *told

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *d_told: Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # by is_grads_batched=True
        if torch.is_grad_enabled() or batched:  # the former where a further derivative follows
            return _plain_gradients(ctx, (dy, *d_told), x, parameters)
        mean, positions = ctx.moments.mean, max(1, ctx.moments.positions)
        given = {"scale": ctx.scale, "offset": ctx.offset, "relu": ctx.relu}
        d_shift, d_scale = passes.paired_sums(dy, x, mean, **given)
        d_mean, d_var, *gradients = ctx.derived.backward(ctx.kept, d_scale, d_shift, *d_told)
        dx = None
        if ctx.needs_input_grad[0]:
            # y = scale * (x - mean) + shift: the mean is also what x is taken about.
            level = -ctx.scale * d_shift if d_mean is None else d_mean - ctx.scale * d_shift
            level /= positions
            slope = torch.zeros_like(level) if d_var is None else d_var * (2 / positions)
            level.addcmul_(slope, mean, value=-1)
            dx = passes.combine(dy, x, slope=slope, shift=level, **given)
        wanted = [
            g.to(p.dtype) if g is not None and p.requires_grad else None
            for g, p in zip(gradients, parameters, strict=True)
        ]
        return dx, None, None, None, *wanted


class _Traced:
    """A program's derivative by autograd."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def forward(self, moments: Moments, *parameters: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (*moments[:2], *parameters)]
            mean, var, *given = leaves
            decided = self.program(Moments(mean, var, moments.positions), *given)
        return tuple(t.detach() for t in decided), (leaves, decided)

    def backward(self, kept: Any, *gradients: Tensor) -> Sequence[Tensor | None]:
        leaves, decided = kept
        pairs = zip(decided, gradients, strict=True)
        seeded = [(t, d) for t, d in pairs if t.requires_grad]
        if not seeded:
            return [None] * len(leaves)
        ends, seeds = zip(*seeded, strict=True)
        found: Sequence[Tensor | None] = torch.autograd.grad(
            ends, leaves, seeds, retain_graph=True, allow_unused=True
        )
        return found


def _plain_gradients(
    ctx: Any, gradients: Sequence[Tensor], x: Tensor, parameters: Sequence[Tensor]
) -> Any:
    """The gradients as a differentiable function of all that they depend on."""
    needed = ctx.needs_input_grad
    wanted = [t for t, need in zip((x, *parameters), (needed[0], *needed[4:]), strict=True) if need]
    with torch.enable_grad():
        results = _plain(x, _plain_moments(x), ctx.program, parameters, relu=ctx.relu)
        pairs = [(t, d) for t, d in zip(results, gradients, strict=True) if t.requires_grad]
        ends, seeds = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ends, wanted, seeds, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)


def _plain_moments(x: Tensor) -> Moments:
    wide = x.to(passes.statistics_dtype(x))
    positions, spatial = x.shape[2:].numel(), tuple(range(2, x.dim()))
    if not spatial:
        return Moments(wide, torch.zeros_like(wide), 1)
    if positions == 0 or x.shape[0] == 0:
        nothing = wide.sum(spatial)
        return Moments(nothing, nothing.clone(), positions)
    var, mean = torch.var_mean(wide, spatial, correction=0)
    return Moments(*barrier(mean, var), positions)


def _plain(
    x: Tensor, moments: Moments, program: Program, parameters: Sequence[Tensor], *, relu: bool
) -> tuple[Tensor, ...]:
    """The same in operations that compilers and every transform of torch know."""
    scale, shift, *told = program(moments, *_promoted(parameters, moments))
    decided = barrier(scale, shift)
    ones = (1,) * (x.dim() - 2)
    mean, scale, shift = (k.reshape(*k.shape, *ones) for k in (moments.mean, *decided))
    y = (scale * (x.to(scale.dtype) - mean) + shift).to(x.dtype)
    return y.relu() if relu else y, *told


def _promoted(parameters: Sequence[Tensor], moments: Moments) -> list[Tensor]:
    return [p.to(moments.mean.dtype) for p in parameters]


def _offset(mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, scale, mean, value=-1)


def _wants_plain() -> bool:
    """Whether plain operations are wanted: by a compiler, and inside vmap, grad or jvp."""
    return torch.compiler.is_compiling() or bool(torch._C._are_functorch_transforms_active())
