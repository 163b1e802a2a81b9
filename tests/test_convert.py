"""Other normalizers in a network that is there: what goes over, what comes behind, what is refused.

With the online layer it is tested in test_norm.py.
"""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel.errors import ConfigError
from evenkeel.norm import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    NormAct,
    convert_,
    norm_act,
)

CARRIED = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def in_groups_of_4(channels: int, **options) -> BatchChannelNorm2d:
    return BatchChannelNorm2d(channels, channels // 4, **options)


def random_(model: nn.Module) -> nn.Module:
    """Normalizers with parameters and statistics that are not the ones they start with."""
    with torch.no_grad():
        for module in model.modules():
            for name in ("weight", "bias", "running_mean"):
                if hasattr(module, "running_mean") or isinstance(module, nn.GroupNorm):
                    tensor = getattr(module, name, None)
                    tensor.normal_() if tensor is not None else None
            if hasattr(module, "running_var"):
                module.running_var.uniform_(0.5, 2)
    return model


class BatchNormAct2d(nn.BatchNorm2d):
    """In the manner of timm's: one module that normalizes, drops and activates."""

    def __init__(self, channels: int, act: nn.Module, drop: nn.Module | None = None, **options):
        super().__init__(channels, **options)
        self.drop = drop or nn.Identity()
        self.act = act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNorm2d(nn.Module):
    """In the manner of torchvision's and detectron2's: all buffers."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


# ---- networks with batch-channel normalization instead


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_a_residual_network_keeps_parameters_and_statistics(statistics):
    net = random_(ek.models.build("resnet8_digits"))
    before = copy.deepcopy(net.state_dict())
    norms = [path for path, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    done = convert_(net, functools.partial(in_groups_of_4, statistics=statistics))
    assert done.converted == norms
    assert len(norms) == 9
    assert done.skipped == {}
    after = net.state_dict()
    assert {name: v for name, v in after.items() if "group_" not in name}.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for path in norms:
        layer = net.get_submodule(path)
        assert type(layer) is BatchChannelNorm2d
        assert torch.equal(layer.group_weight, torch.ones(layer.num_groups))
        assert torch.equal(layer.group_bias, torch.zeros(layer.num_groups))


def test_it_is_batch_norm_then_group_norm_of_the_same_network():
    net, x = random_(ek.models.build("resnet8_digits")), torch.randn(4, 1, 8, 8)
    plain = copy.deepcopy(net)
    convert_(net, in_groups_of_4)
    for path, norm in list(plain.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            channels = norm.num_features
            plain.set_submodule(path, nn.Sequential(norm, nn.GroupNorm(channels // 4, channels)))
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(x), plain.train(mode)(x), rtol=1e-3, atol=1e-3)


def test_it_trains_on_one_sample():
    net, x = ek.models.build("resnet8_digits"), torch.randn(1, 1, 8, 8)
    convert_(net, functools.partial(in_groups_of_4, statistics="running"))
    nn.functional.cross_entropy(net(x), torch.tensor([3])).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    assert net.blocks[0].norm1.num_batches_tracked == 1


def test_undo_puts_the_batch_norms_back():
    net, x = random_(ek.models.build("resnet8_digits")).eval(), torch.randn(4, 1, 8, 8)
    before, modules = net(x), dict(net.named_modules())
    done = convert_(net, in_groups_of_4)
    net.train()(x)
    assert not torch.equal(net.eval()(x), before)
    done.undo()
    assert torch.equal(net(x), before)
    assert all(net.get_submodule(path) is module for path, module in modules.items())


@pytest.mark.parametrize("training", [True, False])
def test_settings_and_modes_go_over(training):
    net = nn.Sequential(nn.BatchNorm2d(8, eps=0.1, momentum=None).double()).train(training)
    convert_(net, in_groups_of_4)
    assert (net[0].eps, net[0].momentum, net[0].training) == (0.1, None, training)
    assert {p.dtype for p in net.parameters()} == {torch.float64}


def test_groups_that_do_not_divide_the_channels_change_nothing():
    net = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(6))
    with pytest.raises(ConfigError, match="6"):
        convert_(net, lambda channels: BatchChannelNorm2d(channels, 4))
    assert [type(m) for m in net] == [nn.BatchNorm2d, nn.BatchNorm2d]


def test_the_certificate_tells_the_same_in_every_form():
    net = nn.Sequential(nn.BatchNorm2d(8), nn.LayerNorm(3))
    done = convert_(net, in_groups_of_4)
    assert done.to_dict() == {"converted": ["0"], "skipped": {"1": "LayerNorm is not a batch norm"}}
    assert [line.split(maxsplit=1) for line in done.table().splitlines()] == [
        ["0", "converted"],
        ["1", "LayerNorm is not a batch norm"],
    ]


# ---- kinds


def test_kinds_replaces_these_and_no_others():
    net = random_(nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8, eps=0.1), nn.ReLU()))
    batch, group = net[0], net[1]
    done = convert_(net, in_groups_of_4, kinds=(nn.GroupNorm,))
    assert done.converted == ["1"]
    assert done.skipped == {"0": "it is of another kind"}
    assert net[0] is batch
    assert type(net[1]) is BatchChannelNorm2d
    assert torch.equal(net[1].weight, group.weight)
    assert torch.equal(net[1].bias, group.bias)
    assert net[1].eps == 0.1
    assert torch.equal(net[1].running_var, torch.ones(8))
    done.undo()
    assert net[1] is group


def test_kinds_may_be_one_class_and_the_way_back():
    net = random_(ek.models.build("resnet8_digits", norm="group"))
    before = copy.deepcopy(net.state_dict())
    done = convert_(net, in_groups_of_4, kinds=nn.GroupNorm)
    assert len(done.converted) == 9
    convert_(net, lambda c: nn.GroupNorm(c // 8, c), kinds=BatchChannelNorm2d)
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_layer_norm_tells_its_channels_by_its_weight():
    net = nn.Sequential(nn.LayerNorm(8))
    convert_(net, lambda c: BatchChannelNorm1d(c, 2), kinds=nn.LayerNorm)
    assert net[0].num_features == 8


@pytest.mark.parametrize(
    ("net", "kinds", "says"),
    [
        (
            nn.Sequential(nn.BatchNorm2d(8)),
            (nn.GroupNorm,),
            r"needs a normalizer of those kinds to replace; Sequential has none "
            r"\('0': it is of another kind\)\.$",
        ),
        (
            nn.Sequential(nn.GroupNorm(2, 8)),
            None,
            r"needs a batch norm to replace; Sequential has none \('0': GroupNorm is not a batch",
        ),
        (nn.GroupNorm(2, 8), (nn.GroupNorm,), "whole network"),
        (nn.Sequential(nn.ReLU()), None, r"Sequential has none\.$"),
        (
            nn.Sequential(nn.LayerNorm([2, 4])),
            nn.LayerNorm,
            "LayerNorm does not tell its number of channels: it has none of num_features",
        ),
    ],
)
def test_errors_say_what_must_hold_and_what_came(net, kinds, says):
    with pytest.raises(ConfigError, match=says):
        convert_(net, in_groups_of_4, kinds=kinds)


# ---- batch norm with an activation in it


@pytest.mark.parametrize(
    ("act", "drop"),
    [
        (nn.ReLU(inplace=True), None),
        (nn.SiLU(inplace=True), None),
        (nn.LeakyReLU(0.3), None),
        (nn.Identity(), None),
        (nn.ReLU(), nn.Dropout(0.5)),
    ],
    ids=str,
)
def test_a_fused_batch_norm_becomes_a_normalizer_with_the_same_activation(act, drop):
    net = random_(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act, drop, eps=0.1)))
    old = net[1]
    done = convert_(net, in_groups_of_4)
    assert done.converted == ["1"]
    assert done.skipped == {}
    new = net[1]
    assert type(new) is NormAct
    assert type(new.norm) is BatchChannelNorm2d
    assert (new.act, new.drop) == (old.act, old.drop)
    assert new.norm.eps == 0.1
    for name in CARRIED:
        assert torch.equal(getattr(new.norm, name), getattr(old, name))
    with torch.no_grad():
        x = net.eval()[0](torch.randn(4, 3, 6, 6))
        torch.testing.assert_close(new(x.clone()), act(new.norm(x)))
    done.undo()
    assert net[1] is old


def test_a_fused_batch_norm_converted_to_plain_batch_norm_is_the_same_function():
    net, x = random_(nn.Sequential(BatchNormAct2d(8, nn.SiLU()))), torch.randn(4, 8, 5, 5)
    for mode in (True, False):
        net.train(mode)
        expected = copy.deepcopy(net)(x)
        own = copy.deepcopy(net)
        convert_(own, nn.BatchNorm2d)
        assert own[0].training is own[0].norm.training is mode
        torch.testing.assert_close(own(x), expected)


def test_a_fused_batch_norm_in_two_places_stays_one():
    fused = BatchNormAct2d(8, nn.ReLU())
    net = nn.Sequential(fused, fused)
    convert_(net, in_groups_of_4)
    assert net[0] is net[1]


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_batch_norm_that_does_more_is_skipped():
    net = nn.Sequential(nn.BatchNorm2d(8), Doubled(8))
    done = convert_(net, in_groups_of_4)
    assert done.skipped == {"1": "Doubled does more than batch norm does"}
    assert type(net[1]) is Doubled


# ---- frozen batch norm


def test_a_frozen_batch_norm_becomes_a_layer_that_trains_from_there():
    net = random_(nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8, eps=0.1)))
    old = net[1]
    done = convert_(net, functools.partial(in_groups_of_4, statistics="running"))
    assert done.converted == ["1"]
    new = net[1]
    assert type(new) is BatchChannelNorm2d
    assert new.eps == 0.1
    for name in CARRIED[:4]:
        assert torch.equal(getattr(new, name), getattr(old, name))
    assert {name for name, p in new.named_parameters() if p.requires_grad} == {
        "weight", "bias", "group_weight", "group_bias",
    }  # fmt: skip
    before = copy.deepcopy(new.state_dict())
    (net.train()(torch.randn(1, 3, 6, 6)) * torch.randn(1, 8, 4, 4)).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert all(not torch.equal(v, before[name]) for name, v in new.state_dict().items())
    assert all(torch.equal(getattr(old, name), before[name]) for name in CARRIED[:4])


def test_a_frozen_batch_norm_converted_to_batch_norm_is_the_same_function():
    net, x = random_(nn.Sequential(FrozenBatchNorm2d(8))).eval(), torch.randn(4, 8, 5, 5)
    expected = net(x)
    convert_(net, nn.BatchNorm2d)
    torch.testing.assert_close(net(x), expected)


# ---- NormAct


def layer_and_input(dtype=torch.float32, **options):
    norm = random_(in_groups_of_4(8, dtype=dtype, **options))
    with torch.no_grad():
        norm.group_bias.normal_()
    return NormAct(norm, nn.ReLU()), torch.randn(4, 8, 5, 5, dtype=dtype, requires_grad=True)


def unfused(layer: NormAct) -> nn.Sequential:
    return nn.Sequential(copy.deepcopy(layer.norm), nn.ReLU())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("training", [True, False])
def test_the_fused_relu_is_the_unfused_one(dtype, statistics, training):
    layer, x = layer_and_input(dtype, statistics=statistics)
    other = unfused(layer).train(training)
    layer.train(training)
    y, expected = layer(x), other(x)
    torch.testing.assert_close(y, expected)
    assert (y == 0).any()
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    for grad, theirs in zip(
        grads, torch.autograd.grad(expected, [x, *other.parameters()], dy), strict=True
    ):
        torch.testing.assert_close(grad, theirs, rtol=1e-4, atol=1e-4)
    state = other[0].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in layer.norm.state_dict().items())


def test_derivatives_of_the_fused_relu():
    norm = random_(BatchChannelNorm2d(2, 1, dtype=torch.float64))
    layer = NormAct(norm, nn.ReLU())
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def kept(layer: nn.Module, x: torch.Tensor) -> int:
    """Activations that are kept for backward."""
    places = set()

    def note(t):
        if t.numel() == x.numel():
            places.add(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return len(places)


def test_the_fused_relu_keeps_one_activation_fewer():
    layer, x = layer_and_input()
    assert kept(layer, x) == 1
    assert kept(unfused(layer), x) == 2


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("part", ["norm", "drop", "act"])
def test_hooks_on_its_parts_are_called(register, part):
    layer, x = layer_and_input()
    expected, called = layer(x), []
    handle = getattr(getattr(layer, part), register)(lambda *_: called.append(part))
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert called == [part]
    handle.remove()
    layer(x).sum().backward()
    assert called == [part]


def test_a_hook_sees_what_the_normalizer_gives():
    layer, x = layer_and_input()
    seen = []
    layer.norm.register_forward_hook(lambda _, args, y: seen.append(y))
    y = layer(x)
    assert (seen[0] < 0).any()
    assert torch.equal(y, seen[0].relu())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("sort", [nn.Sequential, NormAct])
def test_an_activation_in_place_may_follow(sort, act, statistics, layout):
    layer, x = layer_and_input(statistics=statistics)
    norm = layer.norm
    x = x.detach().to(memory_format=layout).requires_grad_()
    expected = sort(copy.deepcopy(norm), act())(x)
    y = sort(norm, act(inplace=True))(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads = (torch.autograd.grad(z, x, dy)[0] for z in (y, expected))
    torch.testing.assert_close(*grads)


class Twice(BatchChannelNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_normalizer_with_a_forward_of_its_own_is_called():
    layer, x = NormAct(Twice(8, 2), nn.ReLU()), torch.randn(4, 8, 5, 5)
    torch.testing.assert_close(layer(x), layer.norm(x).relu())


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), BatchChannelNorm2d(8, 2)], ids=str
)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Identity()], ids=str)
@pytest.mark.parametrize("drop", [None, nn.Dropout(0.5)], ids=str)
def test_it_is_its_parts_one_after_the_other(norm, act, drop):
    layer, x = NormAct(norm, act, drop), torch.randn(4, 8, 5, 5)
    layers = [copy.deepcopy(m) for m in (norm, drop or nn.Identity(), act)]
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, nn.Sequential(*layers)(x))


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("training", [True, False])
def test_full_graph_compilation(statistics, training):
    layer, x = layer_and_input(statistics=statistics)
    layer.train(training)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x))
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])


def test_copies_and_export():
    layer, x = layer_and_input()
    layer.eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


# ---- norm_act


def test_what_is_made_by_default():
    layer = norm_act(in_groups_of_4)(16)
    assert type(layer.norm) is BatchChannelNorm2d
    assert (layer.norm.num_features, layer.norm.num_groups) == (16, 4)
    assert (type(layer.drop), type(layer.act)) == (nn.Identity, nn.ReLU)


@pytest.mark.parametrize(
    ("given", "act"),
    [
        ({}, "SiLU()"),
        ({"apply_act": False}, "Identity()"),
        ({"act_layer": None}, "Identity()"),
        ({"act_layer": nn.ReLU}, "ReLU()"),
        ({"act_layer": functools.partial(nn.LeakyReLU, 0.2)}, "LeakyReLU(negative_slope=0.2)"),
        (
            {"act_layer": nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.3}},
            "LeakyReLU(negative_slope=0.3)",
        ),
        ({"act_kwargs": {"inplace": True}}, "SiLU(inplace=True)"),
        ({"inplace": False}, "SiLU()"),
        ({"act_layer": nn.GELU, "inplace": True}, "GELU(approximate='none')"),
    ],
    ids=str,
)
def test_activations_by_timms_arguments(given, act):
    layer = norm_act(in_groups_of_4, nn.SiLU)(8, **given)
    assert str(layer.act) in (act, act.replace("()", "(inplace=True)"))


def test_the_other_arguments_of_timm():
    make = norm_act(in_groups_of_4)
    assert isinstance(make(8, drop_layer=nn.Dropout2d).drop, nn.Dropout2d)
    assert make(8, eps=1e-3).norm.eps == 1e-3
    assert {p.dtype for p in make(8, dtype=torch.float64).parameters()} == {torch.float64}
    assert {t.device.type for t in make(8, device="meta").state_dict().values()} == {"meta"}
    with pytest.raises(TypeError, match="apply_atc"):
        make(8, apply_atc=False)  # a misspelt one


def test_any_normalizer_will_do():
    layer = norm_act(nn.BatchNorm2d)(8, act_layer=nn.ReLU, eps=0.1)
    assert type(layer.norm) is nn.BatchNorm2d
    assert layer.norm.eps == 0.1
    x = torch.randn(4, 8, 5, 5)
    assert torch.equal(layer(x), layer.norm(x).relu())
