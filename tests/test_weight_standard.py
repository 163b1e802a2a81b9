"""Weight standardization: the equation, the layers, the parametrization, and both on chips."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import evenkeel as ek
from evenkeel.analog import Gaussian, program
from evenkeel.errors import ConfigError
from evenkeel.norm import (
    WeightStandardization,
    WeightStandardizedConv1d,
    WeightStandardizedConv2d,
    WeightStandardizedConv3d,
    standardize_weights_,
)
from evenkeel.norm.weight_standard import standardized

KINDS = [
    (WeightStandardizedConv1d, nn.Conv1d, 1),
    (WeightStandardizedConv2d, nn.Conv2d, 2),
    (WeightStandardizedConv3d, nn.Conv3d, 3),
]
OPTIONS = [
    {},
    {"bias": False},
    {"stride": 2},
    {"padding": "same", "dilation": 2},
    {"groups": 2},
    {"groups": 4, "kernel_size": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "stride": 2},
    {"padding": 1, "padding_mode": "replicate", "groups": 2, "dilation": 2},
]
SHAPES = [(5, 3, 4), (5, 3, 2, 4), (4, 2, 3, 2, 2), (6, 1, 1, 2), (5, 7)]


def reference(weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The equation, filter by filter, in float64."""
    filters = []
    for w in weight.detach().double():
        away = w - w.sum() / w.numel()
        filters.append(away / (away.square().sum() / (w.numel() - 1) + eps).sqrt())
    return torch.stack(filters)


def random_(weight: torch.Tensor) -> torch.Tensor:
    """Filters of various sizes and means, of deviations near 1."""
    with torch.no_grad():
        weight.normal_().mul_(0.5 + torch.rand(len(weight), *[1] * (weight.dim() - 1)))
        return weight.add_(torch.randn(len(weight), *[1] * (weight.dim() - 1)))


def image(dims: int, channels: int = 4, **options) -> torch.Tensor:
    return torch.randn(2, channels, *[7, 6, 5][:dims], **options)


# ---- the equation


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_it_is_the_equation(shape, eps):
    weight = random_(torch.empty(shape, dtype=torch.float64))
    torch.testing.assert_close(standardized(weight, eps), reference(weight, eps))


def test_eps_is_1e_minus_5_by_default():
    weight = 1e-3 * torch.randn(5, 3, 3, 3, dtype=torch.float64)  # where eps counts
    torch.testing.assert_close(standardized(weight), reference(weight, 1e-5))


@pytest.mark.parametrize("shape", SHAPES)
def test_filters_have_mean_0_and_variance_1(shape):
    filters = standardized(random_(torch.empty(shape))).flatten(1)
    assert filters.mean(1).abs().max() < 1e-6
    torch.testing.assert_close(filters.var(1), torch.ones(shape[0]), rtol=1e-3, atol=0)


def test_a_filter_of_equal_weights_becomes_zero_and_has_a_gradient():
    weight = torch.full((2, 3, 2), 0.7, requires_grad=True)
    filters = standardized(weight)
    assert torch.equal(filters, torch.zeros(2, 3, 2))
    filters.square().sum().backward()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("shape", [(3, 2, 2), (2, 1, 2, 2), (2, 2, 1, 2, 1)])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_derivatives(shape, eps):
    weight = random_(torch.empty(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: standardized(w, eps), weight)
    assert torch.autograd.gradgradcheck(lambda w: standardized(w, eps), weight)


def test_steps_along_a_filters_mean_or_size_have_no_gradient():
    weight = random_(torch.empty(4, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    (standardized(weight, 0.0) * torch.randn(4, 3, 3, 3)).sum().backward()
    grad, filters = weight.grad.flatten(1), weight.detach().flatten(1)
    assert grad.abs().max() > 0.1
    assert grad.sum(1).abs().max() < 1e-12
    assert (grad * filters).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 1000])
def test_half_precision(dtype, size):
    weight = (size * random_(torch.empty(4, 8, 3, 3))).to(dtype)  # squares beyond float16
    filters = standardized(weight)
    assert filters.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(filters.double(), reference(weight, 1e-5), rtol=rounding, atol=1e-3)


def test_a_mean_much_larger_than_the_deviation():
    weight = torch.randn(4, 3, 3, 3) + 1000
    rounding = 2 * 1000 * torch.finfo(torch.float32).eps  # of such a mean
    torch.testing.assert_close(
        standardized(weight).double(), reference(weight, 1e-5), rtol=0, atol=rounding
    )


@pytest.mark.parametrize(("kind", "_", "dims"), KINDS)
@pytest.mark.parametrize("groups", [1, 4])
def test_filters_of_one_weight_are_refused(kind, _, dims, groups):
    layer = kind(groups, 4, 1, groups=groups)
    shape = rf"\(4, 1{', 1' * dims}\)"
    with pytest.raises(ConfigError, match=f"two weights or more; got .* {shape}. Leave"):
        layer(image(dims, groups))


# ---- the layers


@pytest.mark.parametrize(("kind", "plain", "dims"), KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_torchs_convolution_with_standardized_weights(kind, plain, dims, options):
    options = {"kernel_size": 3, "dtype": torch.float64} | options
    own, theirs = kind(4, 8, **options), plain(4, 8, **options)
    random_(own.weight)
    theirs.load_state_dict(own.state_dict())
    theirs.weight.data = reference(own.weight, 1e-5)
    x = image(dims, dtype=torch.float64)
    torch.testing.assert_close(own(x), theirs(x))


@pytest.mark.parametrize(("kind", "plain", "_"), KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_convolutions_checkpoint_fits(kind, plain, _, bias):
    own, theirs = kind(4, 8, 3, bias=bias), plain(4, 8, 3, bias=bias)
    assert list(own.state_dict()) == list(theirs.state_dict())
    own.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(own.weight, theirs.weight)
    theirs.load_state_dict(own.state_dict(), strict=True)


def test_it_starts_as_torchs():
    torch.manual_seed(3)
    theirs = nn.Conv2d(4, 8, 3)
    torch.manual_seed(3)
    assert torch.equal(WeightStandardizedConv2d(4, 8, 3).weight, theirs.weight)


@pytest.mark.parametrize(("kind", "_", "dims"), KINDS)
def test_size_and_mean_of_the_raw_filters_do_not_matter(kind, _, dims):
    layer = kind(4, 8, 3)
    random_(layer.weight)
    x, one = image(dims), (8, 1, *[1] * dims)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(1 + 4 * torch.rand(one)).add_(3 * torch.randn(one))
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-3)
    with torch.no_grad():
        layer.weight.neg_()
    assert (layer(x) - before).abs().max() > 1  # but the sign does


def test_training_keeps_filters_standardized():
    layer = WeightStandardizedConv2d(4, 8, 3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    before = layer.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(image(2)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(layer.weight, before)
    filters = standardized(layer.weight).flatten(1)
    torch.testing.assert_close(filters.var(1), torch.ones(8), rtol=1e-2, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(("kind", "_", "dims"), KINDS)
def test_copies(kind, _, dims, copied):
    layer, x = kind(4, 8, 3), image(dims)
    other = copied(layer)
    assert type(other) is kind
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.weight.copy_(torch.randn(other.weight.shape))
    assert not torch.equal(other(x), layer(x))


FORMS = ["layer", "parametrization"]


def in_form(form: str, *arguments, **options) -> nn.Module:
    """A convolution with standardized weights, either way; the same raw weights."""
    torch.manual_seed(7)
    if form == "layer":
        return nn.Sequential(WeightStandardizedConv2d(*arguments, **options))
    net = nn.Sequential(nn.Conv2d(*arguments, **options))
    standardize_weights_(net)
    return net


def raw(net: nn.Module) -> nn.Parameter:
    return next(p for name, p in net.named_parameters() if "weight" in name)


@pytest.mark.parametrize("form", FORMS)
def test_full_graph_compilation(form):
    net = in_form(form, 4, 8, 3, groups=2)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    x = image(2)
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).square().sum().backward()
    net(x).square().sum().backward()
    torch.testing.assert_close(raw(compiled).grad, raw(net).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_export(form):
    net, x = in_form(form, 4, 8, 3), image(2)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x))


@pytest.mark.parametrize("form", FORMS)
def test_many_networks_at_once_under_vmap(form):
    nets = [in_form(form, 4, 8, 3) for _ in range(3)]
    for net in nets:
        random_(raw(net))
    parameters, buffers = torch.func.stack_module_state(nets)

    def run(parameters, buffers, x):
        return torch.func.functional_call(nets[0], (parameters, buffers), (x,))

    x = image(2)
    y = torch.vmap(run, in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(y, torch.stack([net(x) for net in nets]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    net, x = in_form(form, 4, 8, 3), image(2)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), net(x), rtol=0.02, atol=0.1)
    y.sum().backward()
    assert raw(net).grad.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
def test_channels_last(form, weights):
    net, x = in_form(form, 4, 8, 3), image(2)
    expected = net(x)
    y = net.to(memory_format=weights)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_meta_device(form):
    net = in_form(form, 4, 8, 3, device="meta")
    assert {p.device.type for p in net.parameters()} == {"meta"}
    y = net(image(2, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 8, 5, 4))


# ---- standardize_weights_


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1, groups=8), nn.Sequential(nn.Conv2d(8, 6, 2))
    )


@pytest.mark.parametrize(("kind", "plain", "dims"), KINDS)
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_the_parametrization_is_the_layer(kind, plain, dims, eps):
    net, x = nn.Sequential(plain(4, 8, 3, padding=1)), image(dims)
    random_(net[0].weight)
    own = kind(4, 8, 3, padding=1)
    own.load_state_dict(net[0].state_dict())
    assert standardize_weights_(net, eps=eps).standardized == ["0"]
    torch.testing.assert_close(net[0].weight, reference(own.weight, eps).float())
    if eps == 1e-5:
        assert torch.equal(net(x), own(x))


def test_all_convolutions_are_standardized_and_the_rest_is_listed_with_the_reason():
    net = small().extend([WeightStandardizedConv2d(6, 4, 2), nn.Flatten(), nn.Linear(16, 3)])
    standardize_weights_(net, ["0"])
    linear = net[5].weight.clone()
    done = standardize_weights_(net)
    assert done.standardized == ["2.0"]
    assert done.skipped == {
        "0": "it is standardized already",
        "1": "its filters have a single weight",
        "3": "it is standardized already",
    }
    assert done.to_dict() == {"standardized": done.standardized, "skipped": done.skipped}
    lines = done.table().splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["2.0", "standardized"],
        *([path, why] for path, why in done.skipped.items()),
    ]
    assert torch.equal(net[5].weight, linear)


@pytest.mark.parametrize(
    ("layers", "expected"), [(["2*"], ["2.0"]), (["0", "2.0"], ["0", "2.0"]), (("0",), ["0"])]
)
def test_layers_are_chosen_by_path_or_pattern(layers, expected):
    net = small()
    done = standardize_weights_(net, layers)
    assert done.standardized == expected
    assert [
        p for p in ("0", "2.0") if parametrize.is_parametrized(net.get_submodule(p))
    ] == expected
    left = {path for path, why in done.skipped.items() if why == "left out by `layers`"}
    assert left == {"0", "1", "2.0"} - set(expected)


@pytest.mark.parametrize(
    ("net", "layers", "says"),
    [
        (nn.Sequential(nn.Linear(2, 2)), None, r"needs a convolution; Sequential has none to"),
        (nn.Sequential(nn.Conv2d(1, 2, 1)), None, r"\('0': its filters have a single weight\)\.$"),
        (nn.Sequential(WeightStandardizedConv2d(2, 2, 2)), None, "'0': it is standardized already"),
        (small(), ["3"], "No layer matches '3'"),
        (small(), ["1"], "'1': its filters have a single weight"),
        (small(), "0", "list of paths or patterns; got the string '0'"),
    ],
)
def test_nothing_to_standardize_is_an_error(net, layers, says):
    before = list(net.state_dict())
    with pytest.raises(ConfigError, match=says):
        standardize_weights_(net, layers)
    assert list(net.state_dict()) == before


def test_a_network_that_is_one_convolution():
    conv = nn.Conv2d(4, 8, 3)
    before = conv.weight.detach().clone()
    done = standardize_weights_(conv)
    torch.testing.assert_close(conv.weight, reference(before, 1e-5).float())
    done.undo()
    assert torch.equal(conv.weight, before)


def test_undo_restores_bit_for_bit():
    net, x = small(), image(2)
    before, y = copy.deepcopy(net.state_dict()), net(x)
    done = standardize_weights_(net)
    assert not torch.equal(net(x), y)
    done.undo()
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(x), y)
    assert {type(m) for m in net.modules()} == {nn.Sequential, nn.Conv2d}


def test_undo_restores_the_order_of_parameters_by_which_optimizers_load():
    net = small()
    before = [name for name, _ in net.named_parameters()]
    standardize_weights_(net).undo()
    assert [name for name, _ in net.named_parameters()] == before


@pytest.mark.parametrize("made", ["before", "meanwhile"])
def test_an_optimizer_goes_on_holding_the_weights(made):
    net = nn.Sequential(nn.Conv2d(4, 8, 3))
    own = net[0].weight
    optimizer = torch.optim.SGD(net.parameters(), 0.1) if made == "before" else None
    done = standardize_weights_(net)
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.1)
    before = own.detach().clone()
    net(image(2)).square().mean().backward()
    optimizer.step()
    trained = own.detach().clone()
    assert not torch.equal(trained, before)
    done.undo()
    assert type(net[0].weight) is nn.Parameter
    assert net[0].weight is own
    assert any(p is own for p in optimizer.param_groups[0]["params"])
    assert torch.equal(net[0].weight, trained)


def test_copies_and_checkpoints_of_a_standardized_network():
    net, x = small(), image(2)
    standardize_weights_(net)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    other = small()
    standardize_weights_(other)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))


def test_frozen_weights_stay_frozen():
    net = nn.Sequential(nn.Conv2d(4, 8, 3)).requires_grad_(False)
    done = standardize_weights_(net)
    assert not any(p.requires_grad for p in net.parameters())
    done.undo()
    assert not net[0].weight.requires_grad


def test_undo_may_be_called_twice():
    net = small()
    done = standardize_weights_(net)
    done.undo()
    done.undo()
    assert not parametrize.is_parametrized(net[0])


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_undo_leaves_other_parametrizations_where_they_were():
    net = nn.Sequential(nn.Conv2d(4, 8, 3))
    parametrize.register_parametrization(net[0], "weight", Doubled())
    before = net[0].weight.detach().clone()
    done = standardize_weights_(net)
    torch.testing.assert_close(net[0].weight, reference(before, 1e-5).float())
    done.undo()
    assert parametrize.is_parametrized(net[0], "weight")
    assert torch.equal(net[0].weight, before)


def pruned(conv: nn.Module) -> nn.Module:
    prune.l1_unstructured(conv, "weight", 0.5)
    return conv


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (lambda: program(small(), Gaussian(0.0), seed=0), "programmed onto a chip"),
        (lambda: nn.Sequential(pruned(nn.Conv2d(4, 8, 3))), "made by a hook"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), "first batch"),
    ],
    ids=["a chip", "pruned", "lazy"],
)
def test_a_weight_that_is_not_a_layers_own_is_refused_or_skipped(net, says):
    with pytest.raises(ConfigError, match=says):
        standardize_weights_(net())


def test_weights_beneath_are_told_by_the_parametrization():
    net = nn.Sequential(nn.Conv2d(4, 8, 3))
    before = net[0].weight.detach().clone()
    standardize_weights_(net, eps=0.1)
    (own,) = net[0].parametrizations["weight"]
    assert isinstance(own, WeightStandardization)
    assert own.eps == 0.1
    assert torch.equal(net[0].parametrizations["weight"].original, before)
    torch.testing.assert_close(own(before), reference(before, 0.1).float())


# ---- on chips


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"groups": 2, "padding": 1, "stride": 2}], ids=str)
def test_a_chip_without_noise_gives_the_digital_output(form, options):
    net, x = in_form(form, 4, 8, 3, **options), image(2)
    chip = program(net, Gaussian(0.0), seed=0)
    assert [path for path, _ in chip.arrays()] == ["0"]
    assert not chip.digital
    torch.testing.assert_close(chip(x), net.eval()(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chip.model[0].weight, standardized(raw(net)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [0.5, 20])
def test_noise_scales_with_the_largest_standardized_weight(form, size):
    net = in_form(form, 16, 32, 3)
    with torch.no_grad():
        raw(net).copy_(size * (torch.randn(32, 16, 3, 3) + 2))
    target = standardized(raw(net)).detach()
    noise = program(net, Gaussian(0.1), seed=0).model[0].weight - target
    assert float(noise.std()) == pytest.approx(0.1 * float(target.abs().max()), rel=0.04)


def test_both_forms_are_the_same_chip():
    x = image(2)
    one, other = (program(in_form(f, 4, 8, 3), Gaussian(0.1), seed=5)(x) for f in FORMS)
    torch.testing.assert_close(one, other)


def test_programming_leaves_the_network_as_it_was():
    net, x = in_form("parametrization", 4, 8, 3), image(2)
    before = net(x)
    program(net, Gaussian(0.1), seed=0)
    assert torch.equal(net(x), before)
    assert parametrize.is_parametrized(net[0], "weight")


def test_chips_and_networks_are_saved_and_loaded(tmp_path):
    net, x = ek.models.build("resnet8_digits").eval(), torch.randn(2, 1, 8, 8)
    standardize_weights_(net)
    chip = program(net, Gaussian(0.1), seed=0)
    ek.save(chip, tmp_path / "chip.safetensors")
    assert torch.equal(ek.load(tmp_path / "chip.safetensors")(x), chip(x))
    ek.save(net, tmp_path / "net.safetensors")
    other = ek.models.build("resnet8_digits").eval()
    standardize_weights_(other)
    loaded = ek.load(tmp_path / "net.safetensors", model=other)
    assert torch.equal(loaded(x), net(x))


def test_the_packages_own_network_trains_with_it():
    net = ek.models.build("resnet8_digits", norm="group")
    done = standardize_weights_(net)
    convolutions = [p for p, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    assert done.standardized == convolutions
    assert not done.skipped
    F.cross_entropy(net(torch.randn(2, 1, 8, 8)), torch.tensor([1, 2])).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in net.parameters())
