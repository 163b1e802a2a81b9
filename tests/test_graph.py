"""Capture, labels, and which scales are found: on networks of every kind, against derivations."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import evenkeel as ek
from evenkeel.balance.apply import move
from evenkeel.errors import GraphError
from evenkeel.graph import Labels, Scales, capture, find_scales, passing, rule
from evenkeel.graph.labels import FIXED, ZERO, compact
from evenkeel.graph.rules import RULES
from networks import FREE, NETWORKS, Net, found, mlp

every_network = pytest.mark.parametrize("name", NETWORKS)


def random_scales(scales: Scales) -> torch.Tensor:
    """Of all variables, and 0 for what is pinned."""
    z = 2 * torch.rand(scales.number + 1, dtype=torch.float64) - 1
    z[-1] = 0
    return z


def moved(model: nn.Module, scales: Scales, z: torch.Tensor, *, exact: bool) -> nn.Module:
    other, by = copy.deepcopy(model), move(scales.places, z, exact=exact)
    for path, parameter in other.named_parameters():
        by.rescale_(path, parameter)
    return other


def output(model: nn.Module, x: torch.Tensor, *, train: bool) -> torch.Tensor:
    return copy.deepcopy(model).train(train)(x).detach()  # whose buffers are as they were


def reasons(scales: Scales) -> set[str]:
    return {why for layer in scales.coverage for why in layer.pinned}


# ---- what is found


@every_network
def test_as_many_scales_as_derived(name):
    network, scales = NETWORKS[name], found(name)
    assert (scales.number, sum(c.free for c in scales.coverage)) == (network.scales, network.free)


@every_network
def test_pins_have_their_reasons(name):
    network, given = NETWORKS[name], reasons(found(name))
    assert [part for part in network.pins if not any(part in why for why in given)] == []
    assert [why for why in given if not any(part in why for part in network.pins)] == []


@every_network
def test_there_is_a_rule_for_every_operation(name):
    assert found(name).unknown == {}


@every_network
def test_channels_are_free_or_pinned(name):
    for layer in found(name).coverage:
        assert layer.free + sum(layer.pinned.values()) == layer.channels


@pytest.mark.parametrize(
    "name", ["vgg_bn", "convolutions", "unet", "embedding", "rnn", "layer_norm", "vit_fused"]
)
def test_channels_are_the_outputs_of_each_layer(name):
    kinds = {nn.Linear: "out_features", nn.Embedding: "embedding_dim", nn.RNN: "hidden_size"}
    kinds |= dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), "out_channels")
    kinds |= {nn.BatchNorm2d: "num_features"}
    model = NETWORKS[name].build()
    for layer in found(name).coverage:
        module = model.get_submodule(layer.layer.rpartition(".")[0])
        outputs = getattr(module, kinds.get(type(module), ""), None) or module.weight.numel()
        assert (layer.layer, layer.channels) == (layer.layer, outputs)


@every_network
@pytest.mark.parametrize(("batch", "train"), [(1, True), (5, False)])
def test_the_batch_and_the_mode_do_not_matter(name, batch, train):
    assert found(name, batch, train).coverage == found(name).coverage


# ---- what may be done with it


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_random_scales_keep_the_function(name, train):
    model, x = NETWORKS[name].build(), NETWORKS[name].inputs()
    other = moved(model, found(name), random_scales(found(name)), exact=False)
    y = output(model, x, train=train)
    assert (output(other, x, train=train) - y).abs().max() <= 1e-5 * y.abs().max()
    assert any(
        not torch.allclose(p, q, rtol=1e-2)
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_powers_of_two_keep_it_bit_for_bit(name, train):
    model, x = NETWORKS[name].build(), NETWORKS[name].inputs()
    other = moved(model, found(name), 3 * random_scales(found(name)), exact=True)
    assert torch.equal(output(other, x, train=train), output(model, x, train=train))
    assert any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def two_inputs(m, x, y):
    return m.head(F.relu(m.a(x) + m.b(y)))


def test_networks_of_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x, y):
            return two_inputs(self, x, y)

    assert find_scales(Two(), (torch.randn(2, 5), torch.randn(2, 4))).number == 6


def test_a_network_that_takes_any_number_of_inputs():
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(5, 6, 3)

        def forward(self, *inputs):
            return self.net(inputs[0])

    assert find_scales(Any(), torch.randn(2, 5)).number == 6


@pytest.mark.parametrize("low", [0.0, 0.5])
def test_a_bound_that_is_a_buffer(low):
    net = Net(
        lambda m, x: m.head(torch.clamp(m.first(x), min=m.low)),
        first=nn.Linear(5, 6),
        low=torch.full((6,), low),
        head=nn.Linear(6, 3),
    )
    x = torch.randn(4, 5)
    scales = find_scales(net, x)
    other = moved(net, scales, random_scales(scales), exact=True)
    assert torch.equal(other(x), net(x))


def test_the_network_is_left_as_it_is():
    model = NETWORKS["resnet_b_bn"].build()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    find_scales(model, NETWORKS["resnet_b_bn"].inputs())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# ---- capture


def test_capture_knows_its_parameters_and_inputs():
    x = torch.randn(2, 5)
    captured = capture(mlp(5, 8, 3), x)
    assert set(captured.held.values()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert list(captured.inputs.values()) == [x]


def branching(m, x):
    return m.net(x) if x.sum() > 0 else x


def leaving_torch(m, x):
    return m.net(torch.from_numpy(x.detach().numpy() + 1))


@pytest.mark.parametrize("run", [branching, leaving_torch])
def test_what_cannot_be_captured_is_refused_with_its_cause_and_left_in_its_mode(run):
    net = Net(run, net=mlp(5, 8, 3), rest=nn.Dropout())
    net.rest.eval()
    modes = [m.training for m in net.modules()]
    with pytest.raises(
        GraphError, match=r"Net cannot be captured by torch.export: \w+: .+\n.* branches on"
    ):
        find_scales(net, torch.ones(2, 5))
    assert [m.training for m in net.modules()] == modes


# ---- operations without a rule, and rules


@torch.library.custom_op("evenkeel_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


def doubling() -> Net:
    return Net(lambda m, x: m.b(twice(m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3))


def test_an_operation_without_a_rule_pins():
    scales = find_scales(doubling(), torch.randn(2, 5))
    assert (scales.number, scales.unknown) == (0, {"twice": 1})
    assert "there is no rule for this use of twice" in reasons(scales)


def test_anyone_can_register_a_rule():
    rule("twice")(passing.same)
    try:
        scales = find_scales(doubling(), torch.randn(2, 5))
    finally:
        del RULES["twice"]
    assert (scales.number, scales.unknown) == (6, {})


def test_a_wrong_rule_is_found_out_and_the_network_is_as_it_was(monkeypatch):
    net = NETWORKS["gelu"].build()
    with torch.no_grad():
        net[0].weight.mul_(10)  # away from balance
    before = copy.deepcopy(net.state_dict())
    monkeypatch.setitem(RULES, "gelu", passing.same)
    with pytest.raises(GraphError, match=r"must stay the same; they changed by .*what its rule"):
        ek.balance_(net, NETWORKS["gelu"].inputs())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---- labels


def test_fresh_labels_are_free_and_their_own():
    labels = Labels()
    first, second = labels.fresh(3), labels.fresh(2)
    every = torch.cat([first, second])
    assert every.tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(labels.roots(every), every)
    assert not labels.is_pinned(every).any()
    assert labels.reason(3) is None


def test_ties_go_element_by_element_and_broadcast():
    labels = Labels()
    a = labels.fresh(6)
    labels.tie(a[:2], a[2:4], "")
    assert labels.roots(a).tolist() == [1, 2, 1, 2, 5, 6]
    labels.tie(a[4:].view(2, 1), a[:1].expand(2, 3), "")
    assert labels.roots(a).tolist() == [1, 2, 1, 2, 1, 1]


def test_what_meets_a_fixed_one_is_pinned_for_its_reason():
    labels = Labels()
    a = labels.fresh(4)
    labels.tie(a, torch.tensor([FIXED, ZERO, FIXED, ZERO]), "met")
    assert labels.is_pinned(a).tolist() == [True, False, True, False]
    assert [labels.reason(x) for x in a.tolist()] == ["met", None, "met", None]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_pin_reaches_what_is_tied_to_it_before_and_afterwards(order):
    labels = Labels()
    a = labels.fresh(3)
    labels.tie(a[:1], a[1:2], "")
    labels.pin(a[1:2], "first")
    labels.pin(a[:1], "second")
    labels.tie(a[[order[0] * 2]], a[[order[1] * 2]], "")
    assert labels.is_pinned(a).all()
    assert {labels.reason(x) for x in a.tolist()} == {"first"}


def test_zeros_tie_nothing_and_need_no_scale():
    labels = Labels()
    a, zero = labels.fresh(2), torch.tensor([ZERO])
    labels.tie(a[:1], zero, "")
    labels.tie(zero, a[1:], "")
    labels.pin(zero, "pinned")
    assert labels.roots(torch.cat([a, zero])).tolist() == [1, 2, ZERO]
    assert labels.is_pinned(torch.cat([a, zero])).tolist() == [False, False, True]
    assert labels.reason(ZERO) is None


def test_labels_of_nothing():
    nothing = torch.empty(0, 3, dtype=torch.long)
    assert Labels().is_pinned(nothing).dtype == torch.bool
    assert Labels().roots(nothing).dtype == torch.long


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 4), (1,), ()])
def test_compact_leaves_out_what_was_only_expanded(shape):
    labels = torch.arange(torch.tensor(shape).prod()).view(shape)
    wide = labels.expand(5, *shape)
    assert compact(wide).shape == (1, *shape)
    assert torch.equal(compact(wide).expand_as(wide), wide)


LABEL = st.integers(-1, 8)
STEP = st.one_of(
    st.tuples(st.just("tie"), LABEL, LABEL), st.tuples(st.just("pin"), LABEL, st.none())
)


@given(st.lists(STEP, max_size=20))
def test_they_are_a_partition_of_which_parts_are_pinned(steps):
    labels, parts, pinned = Labels(), [{x} for x in range(1, 9)], set()
    labels.fresh(8)
    for what, a, b in steps:
        if what == "pin":
            labels.pin(torch.tensor([a]), "said so")
            pinned |= {a} - {ZERO}
            continue
        labels.tie(torch.tensor([a]), torch.tensor([b]), "met")
        if FIXED in (a, b) and ZERO not in (a, b):
            pinned |= {a, b}
        elif ZERO not in (a, b) and a != b:
            joint = set().union(*(part for part in parts if part & {a, b}))
            parts = [part for part in parts if not part & {a, b}] + [joint]
    every = torch.arange(1, 9)
    roots = labels.roots(every).tolist()
    for part in parts:
        assert len({roots[x - 1] for x in part}) == 1
        for x in part:
            assert (labels.reason(x) is not None) == bool(part & pinned)
    assert len(set(roots)) == len(parts)
    assert labels.is_pinned(every).tolist() == [labels.reason(x) is not None for x in range(1, 9)]
