"""Balancing: the least point, the way there and back, and all that goes along with it."""

import copy
import json
import math
from datetime import timedelta
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import evenkeel as ek
from evenkeel.balance.apply import move
from evenkeel.balance.balance import blocks_of
from evenkeel.balance.solve import _moving, _Problem, reach, solve
from evenkeel.errors import ConfigError, GraphError
from evenkeel.graph import Scales, find_scales, viewed
from evenkeel.graph.scales import DEAD
from networks import FREE, IMAGE, NETWORKS, OUTPUT, Net, conv, found, head, mlp

SOME = [
    "mlp", "vgg_bn", "resnet_a", "resnet_b_bn", "resnet_c", "mobilenet", "shufflenet", "unet",
    "vit_fused", "convolutions", "layer_scale", "raw_number", "swiglu", "shared", "halves",
    "embedding", "layer_norm", "shapes",
]  # fmt: skip
OPTIONS = [{}, {"depth_factor": 1.2}, {"p": 1.0}, {"p": 3.0}, {"biases": False}]
FEW = ["resnet_a", "vit_fused", "layer_scale"]
COMBINED = [(name, {}) for name in SOME] + [(name, o) for name in FEW for o in OPTIONS[1:]]
combined = pytest.mark.parametrize(("name", "options"), COMBINED, ids=str)
NORM = {"p": 2.0, "depth_factor": 1.0, "biases": True}


def built(name: str, dtype: torch.dtype = torch.float64):
    network = NETWORKS[name]
    x = network.inputs()
    return network.build().to(dtype), x.to(dtype) if x.is_floating_point() else x


def scattered_(model: nn.Module, scales: Scales, spread: float = 1.0) -> nn.Module:
    """Another network of the same function."""
    z = spread * torch.randn(scales.number + 1, dtype=torch.float64)
    z[-1] = 0
    by = move(scales.places, z)
    for path, parameter in model.named_parameters():
        by.rescale_(path, parameter)
    return model


def unbalanced(*widths: int, dtype: torch.dtype = torch.float32, **options):
    """A small network far from balance, and inputs."""
    model, x = mlp(*widths, **options).to(dtype), torch.randn(16, widths[0], dtype=dtype)
    return scattered_(model, found_in_mlp(*widths, **options)), x


@cache
def found_in_mlp(*widths: int, **options) -> Scales:
    return find_scales(mlp(*widths, **options), torch.randn(2, widths[0]))


def kept(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def is_as(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def assert_close(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> None:
    """All parameters, relative to the largest of each."""
    for (path, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p - q).abs().max() <= tolerance * q.abs().max(), path


def problem_of(model: nn.Module, scales: Scales, options: dict | None = None):
    options = NORM | (options or {})
    blocks = blocks_of(model, scales, **options)
    alive = torch.logical_and(*reach(blocks, scales.number))
    problem = _Problem([_moving(b, alive) for b in blocks], alive, options["p"])
    return problem, torch.zeros(scales.number + 1, dtype=torch.float64)


def assert_balanced(model: nn.Module, scales: Scales, options: dict | None = None) -> None:
    """Every live channel."""
    problem, z = problem_of(model, scales, options)
    into, out = (flow[problem.alive] for flow in problem.flows(z))
    assert len(into) > 0
    assert (out / into).log().abs().max() < 1e-5


# ---- the least point


@combined
def test_wherever_it_starts_it_comes_to_where_mass_that_comes_in_goes_out(name, options):
    model, x = built(name)
    other = scattered_(copy.deepcopy(model), found(name))
    for each in (model, other):
        ek.balance_(each, x, tolerance=1e-13, **options)
    assert_close(other, model)
    assert_balanced(other, found(name), options)


@pytest.mark.parametrize("name", [*FEW, "convolutions", "unet"])
def test_what_is_balanced_stays(name):
    model, x = built(name)
    ek.balance_(model, x, tolerance=1e-13)
    before = copy.deepcopy(model)
    again = ek.balance_(model, x, tolerance=1e-13)
    assert again.objective_after == pytest.approx(again.objective_before, rel=1e-12)
    assert_close(model, before)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_layers_of_a_chain_without_biases_have_equal_norms(p):
    model, x = unbalanced(5, 8, 6, 7, 3, bias=False)
    ek.balance_(model, x, p=p, tolerance=1e-12)
    norms = torch.stack([w.detach().norm(p) for w in model.parameters()])
    torch.testing.assert_close(norms, norms.mean().expand(4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("c", [1.2, 0.8])
def test_a_depth_factor_makes_norms_grow_with_depth(c):
    model, x = unbalanced(5, 8, 6, 7, 3, bias=False)
    ek.balance_(model, x, depth_factor=c, tolerance=1e-12)
    norms = torch.stack([w.detach().norm() for w in model.parameters()])
    torch.testing.assert_close(norms[1:] / norms[:-1], torch.full((3,), c), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["mlp", "resnet_a", "vit_fused", "rnn_from_the_first"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_least_point_of_the_norm(name, options):
    model, x = built(name)
    scales, options = found(name), NORM | options
    scattered_(model, scales, 0.5)
    values = dict(model.named_parameters())
    z = torch.zeros(scales.number, dtype=torch.float64, requires_grad=True)

    def norm() -> torch.Tensor:
        full, total = torch.cat([z, z.new_zeros(1)]), 0.0
        for place in scales.places:
            if options["biases"] or not place.bias:
                power = viewed(values[place.leaf.path].detach(), place.leaf.view).abs()
                power = (options["depth_factor"] ** -place.depth * power) ** options["p"]
                steps = full[place.rows] - full[place.columns]
                total = total + (power * (options["p"] * steps).exp()).sum()
        return total

    minimizer = torch.optim.LBFGS(
        [z], max_iter=500, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        minimizer.zero_grad()
        value = norm()
        value.backward()
        return value

    minimizer.step(closure)
    least = float(norm().detach())
    blocks = blocks_of(model, scales, **options)
    solution = solve(blocks, scales.number, p=options["p"], tolerance=1e-14)
    assert z.detach().abs().max() > 0.1
    torch.testing.assert_close(solution.z[:-1], z.detach(), rtol=0, atol=1e-5)
    before = sum(float(block.mass.sum()) for block in blocks)
    done = ek.balance_(model, x, tolerance=1e-14, **options)
    assert done.objective_before == pytest.approx(before)
    assert done.objective_after == pytest.approx(least, rel=1e-9)


# ---- the way there


@pytest.mark.parametrize(
    ("name", "p"), [*((name, 2.0) for name in SOME), *((name, p) for name in FEW for p in (1, 5))]
)
@pytest.mark.parametrize("simultaneous", [False, True])
def test_sweeps_never_raise_the_norm(name, simultaneous, p):
    model, _ = built(name)
    problem, z = problem_of(scattered_(model, found(name), 2.0), found(name), {"p": p})
    first = value = problem.value(z)
    for _ in range(8):
        problem.sweep_(z, simultaneous)
        now = problem.value(z)
        assert now <= value * (1 + 1e-14)
        value = now
    assert value < 0.9 * first


def test_a_sweep_of_one_layer_falls_by_what_it_says():
    model, _ = unbalanced(5, 8, 3, dtype=torch.float64)
    problem, z = problem_of(model, found_in_mlp(5, 8, 3))
    before = problem.value(z)
    decrease = problem.sweep_(z, False)
    assert decrease > 0.01 * before
    assert before - problem.value(z) == pytest.approx(decrease, rel=1e-10)


@pytest.mark.parametrize("name", [*FEW, "mlp", "resnet_c", "unet"])
def test_the_bound_is_above_the_excess_and_near_it(name):
    model, scales = scattered_(built(name)[0], found(name), 2.0), found(name)
    blocks = blocks_of(model, scales, **NORM)
    least = solve(blocks, scales.number, tolerance=1e-14).value
    seen = []
    for rounds in (1, 2, 3, 4):
        at = solve(blocks, scales.number, simultaneous=True, tolerance=1e-14, max_rounds=rounds)
        excess = at.value / least - 1
        assert at.excess >= excess * (1 - excess) - 1e-13
        if 1e-10 < excess < 1e-2:
            seen.append(at.excess / excess)
    assert seen
    assert max(seen) < 4


@pytest.mark.parametrize(("simultaneous", "most"), [(False, 8), (True, 20)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("layers", [7, 21, 51])
def test_depth_does_not_make_it_slow(layers, width, bias, simultaneous, most):
    widths = [width] * (layers + 1)
    model, _ = unbalanced(*widths, dtype=torch.float64, bias=bias)
    scales = found_in_mlp(*widths, bias=bias)
    blocks = blocks_of(model, scales, **NORM)
    solution = solve(blocks, scales.number, simultaneous=simultaneous)
    assert solution.excess <= 1e-8
    assert solution.rounds <= most


def test_the_certificates_excess_is_within_the_tolerance():
    for tolerance in (1e-2, 1e-12):
        done = ek.balance_(*unbalanced(5, 8, 6, 3), tolerance=tolerance)
        assert done.excess <= tolerance


# ---- the function

SHARED = {
    "layer_scale", "rnn_as_a_loop", "rnn_from_the_first", "shared", "shared_by_name",
    "shared_module", "shared_with_zeros",
}  # fmt: skip
"""Those of which a layer is used several times; a certificate counts it once."""


@pytest.mark.parametrize("name", FREE)
def test_outputs_stay_in_both_modes(name):
    model, x = built(name, torch.float32)
    scattered_(model, found(name))
    other = copy.deepcopy(model)
    done = ek.balance_(other, x)
    for train in (False, True):
        y, now = (copy.deepcopy(m).train(train)(x).detach() for m in (model, other))
        assert (now - y).abs().max() <= 1e-5 * y.abs().max()
    assert done.error < 1e-5
    assert done.objective_after < done.objective_before
    assert done.free == NETWORKS[name].free or name in SHARED


@pytest.mark.parametrize(("name", "free"), [("shared", 12), ("layer_scale", 25), ("halves", 8)])
def test_a_certificate_counts_each_channel_once(name, free):
    model, x = built(name)
    done = ek.balance_(model, x)
    assert done.free == free
    assert {c.layer: c.channels for c in done.coverage} == {
        k: len(v) for k, v in done.scales.items()
    }


@pytest.mark.parametrize("name", SOME)
def test_exact_scales_are_powers_of_two_and_outputs_stay_bit_for_bit(name):
    model, x = built(name, torch.float32)
    scattered_(model, found(name))
    other = copy.deepcopy(model)
    done = ek.balance_(other, x, exact=True)
    changed = 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        factors = (q.detach() / p.detach())[p.detach() != 0]
        assert torch.equal(factors.frexp().mantissa, torch.full_like(factors, 0.5))
        changed += int((factors != 1).sum())
    assert changed > 0
    assert done.error == 0
    for train in (False, True):
        a, b = (copy.deepcopy(m).train(train)(x) for m in (model, other))
        assert torch.equal(a, b)


def test_an_exact_norm_is_at_most_a_fourth_above_the_least():
    model, x = unbalanced(5, 8, 6, 3)
    other = copy.deepcopy(model)
    least = ek.balance_(model, x).objective_after
    assert least < ek.balance_(other, x, exact=True).objective_after < 1.25 * least


@pytest.mark.parametrize("exact", [False, True])
def test_the_certificate_tells_the_scales(exact):
    model, x = unbalanced(5, 8, 3)
    before = kept(model)
    done = ek.balance_(model, x, exact=exact)
    factors = (model[0].weight / before["0.weight"]).detach().double()
    told = done.scales["0.weight"]
    torch.testing.assert_close(factors, told[:, None].expand(8, 5), rtol=1e-5, atol=0)
    assert torch.equal(done.scales["2.weight"], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float64, 1e-13)])
def test_other_precisions(dtype, tolerance):
    model, x = unbalanced(5, 8, 6, 3, dtype=dtype)
    y = model(x)
    done = ek.balance_(model, x)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert (model(x) - y).abs().max() <= tolerance * y.abs().max()
    assert done.objective_after < done.objective_before


def test_frozen_parameters_are_scaled_too():
    model, x = unbalanced(5, 8, 3)
    model[0].requires_grad_(False)
    before, y = kept(model), model(x)
    ek.balance_(model, x)
    assert not torch.allclose(model[0].weight, before["0.weight"], rtol=0.01)
    torch.testing.assert_close(model(x), y)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("name", ["shared_by_name", "shared_module"])
def test_one_parameter_under_two_names(name):
    model, x = built(name)
    y = model(x)
    ek.balance_(model, x)
    torch.testing.assert_close(model(x), y)
    assert model[2].weight is model[4].weight


def test_modes_buffers_gradients_and_random_numbers_are_left_alone():
    model, x = built("resnet_b_bn", torch.float32)
    model[3].eval()
    modes, buffers = [m.training for m in model.modules()], dict(model.named_buffers())
    before, random = {k: v.clone() for k, v in buffers.items()}, torch.get_rng_state()
    ek.balance_(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert all(v is buffers[k] for k, v in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


# ---- dead channels


def zero_(model: nn.Module, *at: tuple) -> None:
    """Parts of parameters: the path, and indices."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, *index in at:
            parameters[path][tuple(index)] = 0


ALL = slice(None)


def residual() -> tuple[nn.Module, torch.Tensor]:
    """Of the stream's channel 0 and the block's unit 0, each is fed by the other alone."""
    net = Net(
        lambda m, x: m.head(F.relu(m.stem(x) + m.body(F.relu(m.stem(x))))),
        stem=nn.Linear(5, 6), body=mlp(6, 7, 6), head=nn.Linear(6, 3),
    )  # fmt: skip
    zero_(
        net, ("stem.weight", 0), ("stem.bias", 0), ("body.0.bias", 0), ("body.2.bias", 0),
        ("body.0.weight", 0, slice(1, 6)), ("body.2.weight", 0, slice(1, 7)),
    )  # fmt: skip
    return net, torch.randn(8, 5)


def recurrent() -> tuple[nn.Module, torch.Tensor]:
    """Units 0 and 1 feed each other, and nothing feeds them."""
    net = Net(
        lambda m, x: m.head(m.loop(m, x)), into=nn.Linear(5, 6, bias=False),
        state=nn.Linear(6, 6, bias=False), head=nn.Linear(6, 3),
    )  # fmt: skip

    def loop(m, x):
        h = F.relu(m.into(x[:, 0]))
        for step in x[:, 1:].unbind(1):
            h = F.relu(m.into(step) + m.state(h))
        return h

    net.loop = loop
    zero_(net, ("into.weight", slice(0, 2)), ("state.weight", slice(0, 2), slice(2, 6)))
    zero_(net, ("state.weight", 0, 0), ("state.weight", 1, 1))
    return net, torch.randn(8, 4, 5)


def plain(*at: tuple) -> tuple[nn.Module, torch.Tensor]:
    net = mlp(5, 8, 6, 3)
    zero_(net, *at)
    return net, torch.randn(8, 5)


def two_branches() -> tuple[nn.Module, torch.Tensor]:
    net = Net(
        lambda m, x: m.head(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)),
        a=nn.Linear(5, 4), b=nn.Linear(5, 6), head=nn.Linear(10, 3),
    )  # fmt: skip
    zero_(net, ("head.weight", ALL, slice(0, 4)))
    return net, torch.randn(8, 5)


def of_batch_norm() -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(conv(3, 6, bn=True), nn.ReLU(), *head(6))
    zero_(net, ("0.1.weight", 2), ("0.1.bias", 2))
    return net, torch.randn(4, *IMAGE)


# by case: how many channels of each layer are dead
CASES = {
    "a row, and its bias": (lambda: plain(("0.weight", 2), ("0.bias", 2)), {"0.weight": 1}),
    "a row, whose bias is not": (lambda: plain(("0.weight", 2)), {}),
    "a column": (lambda: plain(("2.weight", ALL, 3)), {"0.weight": 1}),
    "a bias": (lambda: plain(("0.bias", ALL), ("2.bias", ALL)), {}),
    "a layer": (lambda: plain(("2.weight", ALL)), {"0.weight": 8}),
    "all but one": (lambda: plain(("4.weight", ALL, slice(1, 6))), {"2.weight": 5}),
    "a row and what only reads it": (
        lambda: plain(("0.weight", 2), ("0.bias", 2), ("2.weight", 1, slice(0, 2)),
                      ("2.weight", 1, slice(3, 8)), ("2.bias", 1)),
        {"0.weight": 1, "2.weight": 1},
    ),
    "a branch": (two_branches, {"a.weight": 4}),
    "a stream": (residual, {"stem.weight": 1, "body.0.weight": 1, "body.2.weight": 1}),
    "recurrent units": (recurrent, {"into.weight": 2, "state.weight": 2}),
    "a batch norm": (of_batch_norm, {"0.1.weight": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [*OPTIONS[:4], {"exact": True}], ids=str)
def test_what_is_dead_is_left_alone_and_reported(case, options):
    make, dead = CASES[case]
    model, x = make()
    model.eval()
    y = model(x)
    done = ek.balance_(model, x, **options)
    assert all(p.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert {c.layer: c.pinned[DEAD] for c in done.coverage if DEAD in c.pinned} == dead
    for layer in done.coverage:
        assert layer.free + sum(layer.pinned.values()) == layer.channels
    assert math.isfinite(done.objective_after)
    assert done.objective_after <= done.objective_before * (
        1.25 if "exact" in options else 1 + 1e-9
    )


@pytest.mark.parametrize("case", CASES)
def test_the_rest_is_balanced(case):
    model, x = CASES[case][0]()
    model, x = model.double(), x.double()
    scales = find_scales(model, x)
    other = scattered_(copy.deepcopy(model), scales)
    ek.balance_(other, x, tolerance=1e-13)
    assert_balanced(other, scales)


def test_a_bias_that_does_not_count_keeps_no_channel_alive():
    model, x = plain(("0.weight", 2))
    done = ek.balance_(model, x, biases=False)
    assert done.coverage[0].pinned == {DEAD: 1}


def test_dead_channels_of_a_view_of_a_parameter_are_counted_once():
    net = NETWORKS["halves"].build()
    with torch.no_grad():
        net.head.weight[:, 2:] = 0  # two of the first half, all of the second
    done = ek.balance_(net, NETWORKS["halves"].inputs())
    assert (done.free, sum(c.pinned.get(DEAD, 0) for c in done.coverage)) == (2, 6)
    assert all(c.free >= 0 for c in done.coverage)


# ---- refusals


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("path", ["0.weight", "2.bias", "4.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(path, value):
    model, x = unbalanced(5, 8, 6, 3)
    with torch.no_grad():
        dict(model.named_parameters())[path].view(-1)[1] = value
    before = kept(model)
    with pytest.raises(ConfigError, match=f"finite.*'{path}'"):
        ek.balance_(model, x)
    for key, now in model.state_dict().items():
        torch.testing.assert_close(now, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["gelu", "product", "shared_transposed"])
def test_nothing_to_move_is_an_error_with_the_reasons(name):
    model, x = built(name, torch.float32)
    before = kept(model)
    with pytest.raises(GraphError, match=r"no channel whose scale may be moved: ") as error:
        ek.balance_(model, x)
    assert all(part in str(error.value) for part in NETWORKS[name].pins)
    assert is_as(model, before)


def test_a_network_without_weights_or_with_dead_ones_only():
    with pytest.raises(GraphError, match="it has no layer with weights"):
        ek.balance_(nn.ReLU(), torch.randn(2, 3))
    model, x = plain(("2.weight", ALL), ("2.bias", ALL))
    with pytest.raises(GraphError, match=DEAD):
        ek.balance_(model, x)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((ek.balance_, name) for name in ("p", "depth_factor", "tolerance")),
        *((ek.Balancer, name) for name in ("p", "depth_factor")),
    ],
)
@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_options_out_of_range(make, name, value):
    model, x = unbalanced(5, 8, 3)
    before = kept(model)
    with pytest.raises(ConfigError, match=f"{name} must be above 0; got {value!r}"):
        make(model, x, **{name: value})
    assert is_as(model, before)


def test_outputs_that_are_random_are_refused():
    net = Net(lambda m, x: m.net(x + torch.randn_like(x)), net=mlp(5, 8, 3))
    before = kept(net)
    with pytest.raises(GraphError, match="random"):
        ek.balance_(net, torch.randn(2, 5))
    assert is_as(net, before)


# ---- the way back


@pytest.mark.parametrize("name", ["resnet_b_bn", "vit_fused", "halves", "raw_number"])
def test_undo_is_bit_for_bit(name):
    model, x = built(name, torch.float32)
    scattered_(model, found(name))
    before = kept(model)
    done = ek.balance_(model, x)
    assert not is_as(model, before)
    done.undo()
    assert is_as(model, before)


def test_undo_takes_what_was_carried_along():
    model, x = unbalanced(5, 8, 3)
    optimizer, average = torch.optim.Adam(model.parameters()), copy.deepcopy(model)
    trained_(model, optimizer, x, 3)
    before, state = kept(average), states(optimizer)
    done = ek.balance_(model, x, optimizer=optimizer, copies=[average], exact=True)
    assert not is_as(average, before)
    done.undo()
    assert is_as(average, before)
    assert all(torch.equal(a, b) for a, b in zip(states(optimizer), state, strict=True))


def test_undo_may_be_called_twice():
    model, x = unbalanced(5, 8, 3)
    average = copy.deepcopy(model)
    before = kept(model)
    done = ek.balance_(model, x, copies=[average], exact=True)
    done.undo()
    done.undo()
    assert is_as(model, before)
    assert is_as(average, before)


def test_undo_after_training_is_refused():
    model, x = unbalanced(5, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    done = ek.balance_(model, x, optimizer=optimizer)
    trained_(model, optimizer, x, 1)
    trained = kept(model)
    with pytest.raises(ConfigError, match=r"has changed since .*'0.weight'"):
        done.undo()
    assert is_as(model, trained)


def test_undo_of_a_network_that_has_lost_a_layer_is_refused():
    model, x = unbalanced(5, 8, 3)
    done = ek.balance_(model, x)
    model[0] = nn.Identity()
    with pytest.raises(ConfigError, match=r"has changed since .*'0.weight'"):
        done.undo()


# ---- the certificate


def test_the_certificate_for_json_and_for_people():
    model, x = built("resnet_b_bn", torch.float32)
    zero_(model, ("0.1.weight", 0), ("0.1.bias", 0))
    done = ek.balance_(model, x)
    read = json.loads(json.dumps(done.to_dict()))
    assert read["free"] == done.free == sum(layer["free"] for layer in read["layers"])
    assert read["objective_after"] == done.objective_after
    table = done.table()
    for layer in done.coverage:
        (row,) = [row for row in table.splitlines() if row.split()[0] == layer.layer]
        assert row.split()[1:3] == [str(layer.channels), str(layer.free)]
        assert all(f"{why} ({n})" in row for why, n in layer.pinned.items())
    assert f"{OUTPUT} (3)" in table
    assert str(done) in table


# ---- optimizers


OPTIMIZERS = {
    "sgd": (lambda p, **k: torch.optim.SGD(p, momentum=0.9, **k), {"momentum_buffer": -1}),
    "nesterov": (
        lambda p, **k: torch.optim.SGD(p, momentum=0.9, nesterov=True, **k),
        {"momentum_buffer": -1},
    ),
    "adam": (torch.optim.Adam, {"exp_avg": -1, "exp_avg_sq": -2}),
    "amsgrad": (
        lambda p, **k: torch.optim.AdamW(p, amsgrad=True, weight_decay=0, **k),
        {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
    ),
    "nadam": (torch.optim.NAdam, {"exp_avg": -1, "exp_avg_sq": -2, "mu_product": 0}),
    "radam": (torch.optim.RAdam, {"exp_avg": -1, "exp_avg_sq": -2}),
    "adamax": (torch.optim.Adamax, {"exp_avg": -1, "exp_inf": -1}),
    "rmsprop": (
        lambda p, **k: torch.optim.RMSprop(p, centered=True, **k),
        {"square_avg": -2, "grad_avg": -1},
    ),
    "adagrad": (torch.optim.Adagrad, {"sum": -2}),
}


def trained_(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int):
    """On fixed batches; gradients of the last step stay."""
    for step in range(steps):
        optimizer.zero_grad()
        model(x.roll(step, 0)[:4]).square().sum().backward()
        optimizer.step()


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    values = [v for state in optimizer.state.values() for v in state.values()]
    return [v.clone() for v in values if isinstance(v, torch.Tensor)]


def factors(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {path: p.detach() / before[path] for path, p in model.named_parameters()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("exact", [True, False])
def test_an_optimizers_state_and_gradients_go_along(kind, exact):
    make, powers = OPTIMIZERS[kind]
    model, x = unbalanced(5, 8, 6, 3, dtype=torch.float64)
    optimizer = make(model.parameters(), lr=1e-3)
    trained_(model, optimizer, x, 3)
    before, state = kept(model), copy.deepcopy(optimizer.state_dict()["state"])
    grads = [p.grad.clone() for p in model.parameters()]
    ek.balance_(model, x, optimizer=optimizer, exact=exact)
    moved = 0
    for i, (path, t) in enumerate(factors(model, before).items()):
        parameter = dict(model.named_parameters())[path]
        now = optimizer.state[parameter]
        assert now.keys() == state[i].keys() >= powers.keys()
        for name, value in now.items():
            if isinstance(value, torch.Tensor):
                expected = state[i][name] * t ** powers[name] if value.dim() else state[i][name]
                torch.testing.assert_close(value, expected, rtol=0 if exact else 1e-12, atol=0)
        torch.testing.assert_close(parameter.grad, grads[i] / t, rtol=1e-12, atol=0)
        moved += int((t != 1).sum())
    assert moved > 50


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_is_as_if_it_had_been_accumulated_there(kind):
    make, _ = OPTIMIZERS[kind]
    model, x = unbalanced(5, 8, 6, 3, dtype=torch.float64)
    optimizer, path = make(model.parameters(), lr=1e-3), []
    for step in range(4):
        path.append(kept(model))
        trained_(model, optimizer, x.roll(step, 0), 1)
    before = kept(model)
    ek.balance_(model, x, optimizer=optimizer)
    t = factors(model, before)

    # the same points of training, rescaled; their own gradients, in an optimizer that stands still
    other = copy.deepcopy(model)
    still = make(other.parameters(), lr=0.0)
    for step, point in enumerate(path):
        other.load_state_dict({k: v * t[k] for k, v in point.items()})
        trained_(other, still, x.roll(step, 0), 1)
    for a, b in zip(states(optimizer), states(still), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_the_state_of_a_single_number_goes_along():
    model, x = built("raw_number")
    scattered_(model, found("raw_number"))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    trained_(model, optimizer, x, 3)
    before, buffer = kept(model), optimizer.state[model.raw]["momentum_buffer"].clone()
    ek.balance_(model, x, optimizer=optimizer)
    t = factors(model, before)["raw"]
    assert abs(t - 1) > 0.01
    torch.testing.assert_close(optimizer.state[model.raw]["momentum_buffer"], buffer / t)


def test_parameters_without_state_are_skipped():
    model, x = unbalanced(5, 8, 3)
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    ek.balance_(model, x, optimizer=optimizer)
    assert len(optimizer.state) == 0
    trained_(model, optimizer, x, 1)
    ek.balance_(model, x, optimizer=optimizer)
    assert len(optimizer.state) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (torch.optim.LBFGS, "no rule .* LBFGS"),
        (torch.optim.Adadelta, "no rule .* Adadelta"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), "RMSprop with momentum"),
    ],
)
def test_optimizers_without_a_rule_are_refused_first(make, says):
    model, x = unbalanced(5, 8, 3)
    before = kept(model)
    for balancing in (
        lambda o: ek.balance_(model, x, optimizer=o), lambda o: ek.Balancer(model, x, o)
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            balancing(make(model.parameters()))
    assert is_as(model, before)


def test_a_state_without_a_rule_is_refused_before_anything_changes():
    model, x = unbalanced(5, 8, 3)
    optimizer, average = (
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        copy.deepcopy(model),
    )
    trained_(model, optimizer, x, 2)
    optimizer.state[model[2].weight]["drift"] = torch.ones_like(model[2].weight)
    before, state, other = kept(model), states(optimizer), kept(average)
    with pytest.raises(ConfigError, match="SGD keeps 'drift'"):
        ek.balance_(model, x, optimizer=optimizer, copies=[average])
    assert is_as(model, before)
    assert is_as(average, other)
    assert all(torch.equal(a, b) for a, b in zip(states(optimizer), state, strict=True))


# ---- copies


def test_copies_keep_their_functions():
    model, x = unbalanced(5, 8, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    own = copy.deepcopy(model)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        trained_(model, optimizer, x, 1)
        theirs.update_parameters(model)
    before = [own(x), theirs(x)]
    weights = [kept(own), kept(theirs.module)]
    ek.balance_(model, x, copies=[own, theirs.module])
    for copied, y, was in zip([own, theirs.module], before, weights, strict=True):
        torch.testing.assert_close(copied(x), y, rtol=1e-4, atol=1e-5)
        assert not is_as(copied, was)


# ---- Balancer


def norm_of(model: nn.Module, scales: Scales, options: dict) -> float:
    return sum(float(b.mass.sum()) for b in blocks_of(model, scales, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [*(("vit_fused", o) for o in OPTIONS), *((n, {}) for n in ("resnet_b_bn", "shared", "unet"))],
    ids=str,
)
def test_steps_never_raise_the_norm_and_keep_outputs(name, options):
    model, x = built(name)
    scattered_(model, found(name))
    options = NORM | options
    balancer = ek.Balancer(model, x, **options)
    y, first = copy.deepcopy(model)(x), norm_of(model, balancer.scales, options)
    value = first
    for _ in range(4):
        balancer.step()
        now = norm_of(model, balancer.scales, options)
        assert now <= value * (1 + 1e-12)
        value = now
    assert value < first
    torch.testing.assert_close(copy.deepcopy(model)(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp", "resnet_a", "shared"])
@pytest.mark.parametrize("options", [{}, {"depth_factor": 1.2, "p": 3.0}], ids=str)
def test_steps_without_training_come_to_the_least_point(name, options):
    model, x = built(name)
    scattered_(model, found(name))
    other, options = copy.deepcopy(model), NORM | options
    balancer = ek.Balancer(model, x, **options)
    steps = 0
    while balancer.step() > 1e-9:
        steps += 1
        assert steps < 2000
    ek.balance_(other, x, tolerance=1e-14, **options)
    assert_close(model, other)
    assert ek.Balancer(other, x, **options).step() < 1e-5


def test_steps_leave_biases_out_by_default():
    model, x = unbalanced(5, 8, 3)
    with torch.no_grad():
        model[0].bias.mul_(100)
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    ek.Balancer(model, x).step()
    ek.Balancer(one, x, biases=False).step()
    ek.Balancer(two, x, biases=True).step()
    assert is_as(model, kept(one))
    assert not is_as(model, kept(two))


def test_steps_in_training_carry_the_optimizer_and_copies_along():
    model, x = unbalanced(5, 8, 6, 3, dtype=torch.float64)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    average = copy.deepcopy(model)
    y = average(x)
    balancer = ek.Balancer(model, x, optimizer, copies=[average])
    for _ in range(3):
        trained_(model, optimizer, x, 1)
        before, state = kept(model), states(optimizer)
        assert balancer.step() > 0
        t = factors(model, before)
        for value, was, factor in zip(states(optimizer), state, t.values(), strict=True):
            torch.testing.assert_close(value, was / factor, rtol=1e-12, atol=0)
    torch.testing.assert_close(average(x), y)
    assert not is_as(average, kept(other))


def test_a_balancer_that_finds_nothing_does_nothing():
    model, x = built("gelu", torch.float32)
    before = kept(model)
    assert ek.Balancer(model, x).step() == 0
    assert is_as(model, before)


@pytest.mark.parametrize("case", CASES)
def test_steps_with_dead_channels_keep_outputs_and_never_raise_the_norm(case):
    model, x = CASES[case][0]()
    model.eval()
    y, balancer, value = model(x), ek.Balancer(model, x, biases=True), math.inf
    for _ in range(5):
        assert math.isfinite(balancer.step())
        now = norm_of(model, balancer.scales, NORM)
        assert now <= value * (1 + 1e-6)
        value = now
    assert all(p.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def work(rank: int, folder: str) -> None:
    """What one of two processes does: its own network is not that of the other."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    wait = timedelta(seconds=30)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=wait
    )
    model, x = unbalanced(5, 8, 6, 3, dtype=torch.float64)
    before = kept(model)
    ek.Balancer(model, x).step()
    torch.save(factors(model, before), f"{folder}/{rank}.pt")
    dist.barrier()  # one that leaves early may take the other with it
    dist.destroy_process_group()


def test_processes_take_the_first_ones_scales(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for path, factor in first.items():
        torch.testing.assert_close(second[path], factor)
    torch.manual_seed(1)  # which is not where the second would have gone
    model, x = unbalanced(5, 8, 6, 3, dtype=torch.float64)
    before = kept(model)
    ek.Balancer(model, x).step()
    assert not torch.allclose(factors(model, before)["0.weight"], first["0.weight"], rtol=1e-2)
