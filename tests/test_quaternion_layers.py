"""Quaternion linear layers and convolutions: numbers, kept kernels, and torch's habits."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize

from evenkeel import quaternion
from evenkeel.errors import ConfigError, ShapeError
from evenkeel.quaternion import (
    QuaternionBatchNorm,
    QuaternionConv1d,
    QuaternionConv2d,
    QuaternionConvTranspose2d,
    QuaternionDropout,
    QuaternionLinear,
    QuaternionMaxPool2d,
    conjugate,
    hamilton,
)
from evenkeel.quaternion.product import assembled

DOUBLE = torch.float64
FORMS = ("dense", "fast")
KINDS = ("whitening", "variance")
close = torch.testing.assert_close


def double(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def conv(dims, transposed=False):
    return getattr(quaternion, f"QuaternionConv{'Transpose' * transposed}{dims}d")


def torchs(dims, transposed=False):
    return getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")


def both_forms(make):
    """The same layer twice, with a bias that is not zero where there is one."""
    dense, fast = make(algorithm="dense", dtype=DOUBLE), make(algorithm="fast", dtype=DOUBLE)
    if dense.bias is not None:
        nn.init.normal_(dense.bias)
    fast.load_state_dict(dense.state_dict())
    return dense, fast


# ---- layers against sums of products


def at(x, *index):
    """The quaternion of one channel and position, of (4, channels, ...)."""
    return x[(slice(None), *index)]


def test_the_linear_layer_is_a_sum_of_hamilton_products():
    dense, fast = both_forms(lambda **more: QuaternionLinear(8, 12, **more))
    x = double(8)
    parts, y = x.view(4, 2), dense.bias.detach().view(4, 3).clone()
    for o, i in itertools.product(range(3), range(2)):
        y[:, o] += hamilton(at(dense.weight, o, i).detach(), parts[:, i], dim=0)
    for layer in (dense, fast):
        close(layer(x), y.flatten(), atol=1e-12, rtol=0)
        close(layer(x.expand(2, 3, 8)), y.flatten().expand(2, 3, 12), atol=1e-12, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_a_sum_of_hamilton_products(groups):
    dense, fast = both_forms(
        lambda **more: QuaternionConv2d(
            16, 8, (2, 3), stride=(2, 1), padding=1, dilation=(1, 2), groups=groups, **more
        )
    )
    x = double(1, 16, 4, 5)
    padded = F.pad(x, (1, 1, 1, 1))[0].unflatten(0, (4, 4))
    y = dense.bias.detach().view(4, 2, 1, 1).repeat(1, 1, 3, 3)
    inputs = 4 // groups
    for o, h, w in np.ndindex(2, 3, 3):
        first = o // (2 // groups) * inputs
        for i, u, v in np.ndindex(inputs, 2, 3):
            kernel = at(dense.weight, o, i, u, v).detach()
            y[:, o, h, w] += hamilton(kernel, at(padded, first + i, 2 * h + u, w + 2 * v), dim=0)
    for layer in (dense, fast):
        close(layer(x)[0], y.flatten(0, 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_is_a_sum_of_hamilton_products(groups, adjoint):
    dense, fast = both_forms(
        lambda **more: QuaternionConvTranspose2d(
            16, 8, (2, 3), stride=(2, 1), groups=groups, adjoint=adjoint, **more
        )
    )
    x = double(1, 16, 2, 2)
    parts = x[0].unflatten(0, (4, 4))
    y = dense.bias.detach().view(4, 2, 1, 1).repeat(1, 1, 4, 4)
    outputs = 2 // groups
    for i, h, w in np.ndindex(4, 2, 2):
        first = i // (4 // groups) * outputs
        for o, u, v in np.ndindex(outputs, 2, 3):
            kernel = at(dense.weight, i, o, u, v).detach()
            kernel = conjugate(kernel, 0) if adjoint else kernel
            y[:, first + o, 2 * h + u, w + v] += hamilton(kernel, at(parts, i, h, w), dim=0)
    for layer in (dense, fast):
        close(layer(x)[0], y.flatten(0, 1), atol=1e-12, rtol=0)


OPTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "padding": "same", "bias": False},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "reflect"},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "stride": 2, "padding_mode": "replicate", "groups": 2},
    {"kernel_size": 3, "padding": "valid", "padding_mode": "circular"},
    {"kernel_size": 2, "dilation": 2, "groups": 4, "bias": False},
]
BACK = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 2, "stride": 3, "groups": 2, "bias": False},
    {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 4, "adjoint": False},
    {"kernel_size": 3, "stride": 2, "adjoint": False},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_forms_of_convolution_agree_and_have_torchs_shape(dims, options):
    dense, fast = both_forms(lambda **more: conv(dims)(16, 32, **options, **more))
    x = double(2, 16, *(7, 6, 5)[:dims])
    y = dense(x)
    close(fast(x), y, atol=1e-12, rtol=0)
    theirs = torchs(dims)(16, 32, **options, dtype=DOUBLE)
    assert y.shape == theirs(x).shape
    # On the assembled kernel torch's own layer, with its paddings, is the same.
    if options.get("groups", 1) == 1:
        theirs.weight.data = assembled(dense.weight.data)
        theirs.bias = dense.bias
        close(theirs(x), y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", BACK, ids=str)
def test_both_forms_of_transposed_convolution_agree_and_have_torchs_shape(dims, options):
    dense, fast = both_forms(lambda **more: conv(dims, True)(16, 32, **options, **more))
    theirs = torchs(dims, True)(
        16, 32, **{k: v for k, v in options.items() if k != "adjoint"}, dtype=DOUBLE
    )
    x = double(2, 16, *(4, 3, 2)[:dims])
    close(fast(x), dense(x), atol=1e-12, rtol=0)
    assert dense(x).shape == theirs(x).shape
    size = [n + (options.get("stride", 1) > 1) for n in theirs(x).shape[2:]]
    size = size if "output_padding" not in options else list(theirs(x).shape[2:])
    close(fast(x, size), dense(x, output_size=size), atol=1e-12, rtol=0)
    assert list(fast(x, size).shape) == list(theirs(x, size).shape)


def test_arguments_stand_in_torchs_order():
    x = torch.randn(1, 8, 9, 9)
    args = (8, 16, 3, 2, 1, 2, 2, False, "circular")
    assert QuaternionConv2d(*args)(x).shape == nn.Conv2d(*args)(x).shape
    args = (8, 16, 3, 2, 1, 1, 2, False, 2)
    assert QuaternionConvTranspose2d(*args)(x).shape == nn.ConvTranspose2d(*args)(x).shape
    assert QuaternionLinear(8, 16, False).bias is None


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **more: QuaternionLinear(256, 128, **more), (64, 256)),
        (lambda **more: QuaternionConv2d(64, 128, 3, **more), (2, 64, 12, 12)),
        (lambda **more: QuaternionConvTranspose2d(64, 128, 3, **more), (2, 64, 12, 12)),
    ],
)
def test_both_forms_agree_in_single_precision(make, shape):
    dense, fast, x = make(algorithm="dense"), make(algorithm="fast"), torch.randn(shape)
    fast.load_state_dict(dense.state_dict())
    assert (dense(x) - fast(x)).norm() < 1e-5 * dense(x).norm()


def test_auto_takes_the_form_by_size():
    many = 1 << 13
    assert not QuaternionLinear(2048, 1532, device="meta").is_fast(many)
    assert QuaternionLinear(2048, 1536, device="meta").is_fast(many)
    assert not QuaternionLinear(2048, 1536, device="meta").is_fast(1)
    assert QuaternionConv2d(256, 512, 3, device="meta").is_fast(many)
    assert not QuaternionConv2d(256, 512, 3, device="meta").is_fast(0)
    assert not QuaternionConv2d(256, 512, 3, groups=2, device="meta").is_fast(many)
    assert not QuaternionConv2d(256, 512, 3, stride=2, device="meta").is_fast(many)
    assert QuaternionConv2d(8, 8, 3, algorithm="fast", device="meta").is_fast(1)
    assert not QuaternionConv2d(1024, 1024, 3, algorithm="dense", device="meta").is_fast(many)


def parameters(*layers):
    return sum(p.numel() for layer in layers for p in layer.parameters())


def test_a_quarter_of_the_parameters():
    assert parameters(QuaternionLinear(64, 32)) == 64 * 32 // 4 + 32
    for dims, transposed in itertools.product((1, 2, 3), (False, True)):
        ours = conv(dims, transposed)(16, 32, 3, groups=2, bias=False)
        assert 4 * parameters(ours) == parameters(
            torchs(dims, transposed)(16, 32, 3, groups=2, bias=False)
        )


def test_the_auto_encoder_has_the_published_numbers_of_parameters():
    down, up = {"stride": 2, "padding": 1}, {"stride": 2, "padding": 1, "output_padding": 1}

    def coder(convolve, back, colours):
        return nn.Sequential(
            convolve(colours, 32, 3, **down),
            convolve(32, 40, 3, **down),
            back(40, 32, 3, **up),
            back(32, colours, 3, **up),
        )

    ours = coder(QuaternionConv2d, QuaternionConvTranspose2d, 4)
    assert parameters(ours) == 6_444
    assert parameters(coder(nn.Conv2d, nn.ConvTranspose2d, 3)) == 24_875
    assert ours(torch.randn(1, 4, 32, 32)).shape == (1, 4, 32, 32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_transposed_convolution_is_the_adjoint(dims, groups, form):
    options = {
        "stride": 2, "padding": 1, "groups": groups, "bias": False, "algorithm": form,
        "dtype": DOUBLE,
    }  # fmt: skip
    there, back = conv(dims)(16, 8, 3, **options), conv(dims, True)(8, 16, 3, **options)
    back.weight = there.weight
    x = double(2, 16, *(6, 5, 4)[:dims])
    y = torch.randn_like(there(x))
    close((there(x) * y).sum(), (x * back(y, list(x.shape[2:]))).sum())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **more: QuaternionLinear(16, 8, **more), (3, 16)),
        (lambda **more: QuaternionConv2d(16, 8, 3, groups=2, **more), (3, 16, 5, 5)),
        (lambda **more: QuaternionConvTranspose2d(16, 8, 3, stride=2, **more), (3, 16, 4, 4)),
    ],
)
def test_a_quaternion_from_the_right_goes_through(make, shape, form):
    layer = make(bias=False, algorithm=form, dtype=DOUBLE)
    x, p = double(*shape), double(1, 4, *[1] * (len(shape) - 2))
    close(layer(hamilton(x, p)), hamilton(layer(x), p), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: QuaternionLinear(6, 8), ShapeError, "in_features.*multiple of 4; got 6"),
        (lambda: QuaternionConv2d(3, 8, 3), ShapeError, "turned into four by to_quaternion"),
        (lambda: QuaternionConv2d(8, 0, 3), ShapeError, "out_channels"),
        (lambda: QuaternionConv2d(8, 16, 3, groups=4), ConfigError, "both sides, 2 and 4; got 4"),
        (lambda: QuaternionConv2d(8, 8, 3, padding="sane"), ConfigError, "got 'sane'"),
        (lambda: QuaternionConv2d(8, 8, 3, padding_mode="zero"), ConfigError, "zeros"),
        (lambda: QuaternionLinear(8, 8, algorithm="quick"), ConfigError, "Unknown algorithm"),
        (lambda: QuaternionLinear(8, 8, init="cubes"), ConfigError, "cube"),
        (lambda: QuaternionConvTranspose2d(8, 8, 3, padding="same"), ConfigError, "by numbers"),
        (lambda: QuaternionLinear(8, 8)(torch.zeros(2, 4)), ShapeError, "8 features on the last"),
        (lambda: QuaternionConv1d(8, 8, 3)(torch.zeros(8, 9)), ShapeError, r"\(N, 8, W\)|N, 8, L"),
        (lambda: QuaternionBatchNorm(8)(torch.zeros(8)), ShapeError, "N, 8"),
        (lambda: QuaternionBatchNorm(8, kind="white"), ConfigError, "whitening"),
        (lambda: QuaternionDropout(1.5), ConfigError, "from 0 to 1; got 1.5"),
    ],
)
def test_what_cannot_be_is_said_in_words(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_padding_same_with_strides_is_refused_at_once_as_by_torch(mode):
    with pytest.raises(ValueError, match="strided"):
        nn.Conv2d(8, 8, 3, stride=2, padding="same", padding_mode=mode)
    with pytest.raises(ConfigError):
        QuaternionConv2d(8, 8, 3, stride=2, padding="same", padding_mode=mode)


@pytest.mark.parametrize("form", FORMS)
def test_empty_batches_go_through(form):
    assert QuaternionLinear(8, 4, algorithm=form)(torch.zeros(0, 8)).shape == (0, 4)
    for groups in (1, 2):
        layer = QuaternionConv2d(8, 8, 3, groups=groups, algorithm=form)
        assert layer(torch.zeros(0, 8, 5, 5)).shape == (0, 8, 3, 3)


# ---- kernels that are kept


def linear(form="dense", **options):
    return QuaternionLinear(8, 8, algorithm=form, **options)


def counted(layer):
    calls, made = [], layer.made
    layer.made = lambda fast: calls.append(fast) or made(fast)
    return calls


def step(optimizer, **options):
    def change(layer):
        with torch.enable_grad():
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer(layer.parameters(), lr=0.1, **options).step()

    return change


CHANGES = {
    "sgd": step(torch.optim.SGD),
    "adam": step(torch.optim.Adam, foreach=True),
    "load": lambda layer: layer.load_state_dict(linear().state_dict()),
    "assign": lambda layer: layer.load_state_dict(linear().state_dict(), assign=True),
    "in place": lambda layer: layer.weight.mul_(2),
    "by a view": lambda layer: layer.weight.detach()[1].add_(1),
    "another parameter": lambda layer: setattr(layer, "weight", linear().weight),
    "reset": lambda layer: layer.reset_parameters(),
    "dtype": lambda layer: layer.double(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_the_kernel_is_made_once_and_anew_after_a_change(change, form):
    layer, x = linear(form).eval(), torch.randn(3, 8)
    calls = counted(layer)
    with torch.no_grad():
        for _ in range(3):
            before = layer(x)
        assert len(calls) == 1
        CHANGES[change](layer)
        x = x.to(layer.weight.dtype)
        after = layer(x)
        close(after, F.linear(x, assembled(layer.weight), layer.bias))
        assert torch.equal(layer(x), after)
    assert len(calls) == 2
    assert change == "dtype" or not torch.allclose(before, after)


def test_both_forms_of_one_layer_are_kept_apart():
    layer, x = linear().eval(), torch.randn(3, 8)
    with torch.no_grad():
        dense = layer(x)
        layer.algorithm = "fast"
        close(layer(x), dense)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_after_serving(form):
    layer, x = linear(form).eval(), torch.randn(3, 8)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    layer.requires_grad_(False)
    (slope,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    close(slope, assembled(layer.weight).sum(0).expand(3, 8))


def test_what_is_kept_is_not_carried():
    layer = linear().eval()
    size, keys = len(pickle.dumps(layer)), list(layer.state_dict())
    with torch.no_grad():
        y = layer(torch.ones(8))
        assert len(pickle.dumps(layer)) == size
        assert list(layer.state_dict()) == keys == ["weight", "bias"]
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other._kept is None
            assert torch.equal(other(torch.ones(8)), y)


def test_inference_mode():
    layer, x = linear().eval(), torch.randn(3, 8)
    expected = layer(x).detach()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            close(layer(x), expected)
    with torch.inference_mode():
        layer = linear().eval()
        before = layer(x)
        layer.weight.mul_(2)
        close(layer(x), 2 * before)
    with torch.no_grad():
        close(layer(x), 2 * before)


def test_gradients_pass_a_frozen_layer_that_was_served_in_inference_mode():
    layer = linear(bias=False).requires_grad_(False).eval()
    x = torch.randn(3, 8, requires_grad=True)
    with torch.inference_mode():
        layer(x)
    F.linear(layer(x).relu(), torch.ones(1, 8)).sum().backward()
    assert x.grad.abs().sum() > 0


def test_another_weight_at_the_same_address():
    layer, x = linear(bias=False).eval(), torch.randn(3, 8)
    numbers = layer.weight.detach().numpy().copy()
    with torch.no_grad():
        before = functional_call(layer, {"weight": torch.from_numpy(numbers)}, (x,))
        numbers *= 2
        after = functional_call(layer, {"weight": torch.from_numpy(numbers)}, (x,))
    close(after, 2 * before)


class Doubled(nn.Module):
    """Into the same memory each time, as an allocator may."""

    def forward(self, weight):
        if not hasattr(self, "memory"):
            self.memory = np.empty(weight.shape, np.float32)
        self.memory[...] = 2 * weight.detach().numpy()
        return torch.from_numpy(self.memory)


def test_a_parametrized_weight_that_changes():
    layer, x = linear(bias=False).eval(), torch.randn(3, 8)
    parametrize.register_parametrization(layer, "weight", Doubled())
    with torch.no_grad():
        before = layer(x)
        layer.parametrizations.weight.original.mul_(2)
        close(layer(x), 2 * before)


def test_a_weight_that_is_moved_and_back():
    layer, x = linear(bias=False).eval(), torch.randn(3, 8)
    memory = layer.weight.detach().numpy().copy()
    with torch.no_grad():
        layer._apply(lambda weight: torch.from_numpy(memory))
        before = layer(x)
        layer.half()
        memory *= 2
        layer._apply(lambda weight: torch.from_numpy(memory))
        close(layer(x), 2 * before)


def test_training_with_a_fused_optimizer():
    layer, x = linear(), torch.randn(3, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        layer.train()(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            close(layer.eval()(x), F.linear(x, assembled(layer.weight), layer.bias))


def test_edits_of_data_are_seen_when_the_mode_is_set():
    layer, x = linear(bias=False).eval(), torch.randn(3, 8)
    with torch.no_grad():
        before = layer(x)
        layer.weight.data.mul_(2)
        close(layer.eval()(x), 2 * before)


@pytest.mark.parametrize("form", FORMS)
def test_many_layers_at_once_without_gradients(form):
    layers = [linear(form).eval() for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(layers)
    x = torch.randn(2, 8)
    with torch.no_grad():
        y = torch.vmap(lambda p: functional_call(layers[0], p, (x,)))(stacked)
        close(y, torch.stack([layer(x) for layer in layers]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # within torch
def test_forward_mode_derivatives_of_the_weight():
    layer, x = linear(bias=False).eval(), torch.randn(2, 8)
    weight = {"weight": layer.weight.detach()}
    _, slope = torch.func.jvp(lambda w: functional_call(layer, w, (x,)), (weight,), (weight,))
    close(slope, layer(x).detach())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # within torch
def test_dual_numbers_after_serving():
    layer, x = linear(bias=False).requires_grad_(False).eval(), torch.randn(2, 8)
    y = layer(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(layer.weight, layer.weight)
        out = functional_call(layer, {"weight": dual}, (x,))
        close(torch.autograd.forward_ad.unpack_dual(out).tangent, y)


# ---- gradients


def gradchecked(layer, x):
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def run(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    return torch.autograd.gradcheck(run, (x.requires_grad_(), *values))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        *[(QuaternionLinear(8, 4, algorithm=form), (3, 8)) for form in FORMS],
        *[(QuaternionConv2d(8, 8, 2, groups=2, algorithm=form), (1, 8, 3, 3)) for form in FORMS],
        *[
            (QuaternionConvTranspose2d(8, 4, 2, stride=2, algorithm=form), (1, 8, 2, 2))
            for form in FORMS
        ],
        *[(QuaternionBatchNorm(8, kind=kind), (6, 8, 2)) for kind in KINDS],
        (QuaternionMaxPool2d(2), (2, 8, 4, 4)),
    ],
    ids=repr,
)
def test_gradients_are_right(layer, shape):
    assert gradchecked(layer.double(), double(*shape))


# ---- citizens of torch

CITIZENS = {
    **{f"linear {f}": (lambda f=f, **m: linear(f, **m), (6, 8)) for f in FORMS},
    **{
        f"conv {f}": (
            lambda f=f, **m: QuaternionConv2d(8, 8, 3, groups=2, padding=1, algorithm=f, **m),
            (6, 8, 4, 4),
        )
        for f in FORMS
    },
    **{
        f"back {f}": (
            lambda f=f, **m: QuaternionConvTranspose2d(8, 4, 2, algorithm=f, **m),
            (6, 8, 4, 4),
        )
        for f in FORMS
    },
    **{k: (lambda k=k, **m: QuaternionBatchNorm(8, kind=k, **m), (6, 8, 4, 4)) for k in KINDS},
    "pool": (lambda device=None: QuaternionMaxPool2d(2), (6, 8, 4, 4)),
    "dropout": (lambda device=None: QuaternionDropout(), (6, 8, 4, 4)),
}
citizens = pytest.mark.parametrize("name", CITIZENS)


def citizen(name):
    make, shape = CITIZENS[name]
    return make(), torch.randn(shape)


@citizens
def test_export_for_batches_of_any_size(name):
    layer, x = citizen(name)
    layer.eval()
    with torch.no_grad():
        layer(x)
    shapes = ({0: torch.export.Dim("samples", min=2)},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=shapes).module()
    for n in (6, 3):
        close(exported(x[:n]), layer(x[:n]))


@citizens
def test_compilation_without_breaks(name):
    layer, x = citizen(name)
    twin = copy.deepcopy(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for mode in (True, False):
        layer.train(mode)
        twin.train(mode)
        if name != "dropout" or not mode:
            close(compiled(x), twin(x))
        with torch.no_grad():
            assert compiled(x).shape == twin(x).shape


@citizens
def test_vmap_over_inputs_and_functional_call(name):
    layer, x = citizen(name)
    layer.eval()
    x = torch.stack([x, 2 * x])
    expected = torch.stack([layer(part) for part in x])
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    close(functional_call(layer, state, (x[1],)), expected[1])
    with torch.no_grad():
        close(torch.vmap(layer)(x), expected)


@pytest.mark.parametrize(
    "name",
    [
        "linear dense",
        "linear fast",
        "conv dense",
        "conv fast",
        "back dense",
        "back fast",
    ],
)
def test_autocast_gives_its_dtype_as_torchs_layers_do(name):
    layer, x = citizen(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@citizens
def test_autocast_is_near(name):
    layer, x = citizen(name)
    layer.eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    close(y.float(), layer(x), atol=0.05, rtol=0.05)


@citizens
def test_channels_last(name):
    layer, x = citizen(name)
    if x.dim() == 4 and name != "dropout":
        twin = copy.deepcopy(layer)
        close(layer(x.to(memory_format=torch.channels_last)), twin(x))
        close(dict(layer.named_buffers()), dict(twin.named_buffers()))


@citizens
def test_the_meta_device_and_off_it(name):
    make, shape = CITIZENS[name]
    layer = make(device="meta")
    assert layer(torch.zeros(shape, device="meta")).is_meta
    assert all(t.is_meta for t in layer.state_dict().values())
    real, source = layer.to_empty(device="cpu").eval(), make().eval()
    real.load_state_dict(source.state_dict())
    x = torch.randn(shape)
    assert torch.equal(real(x), source(x))


@pytest.mark.parametrize("name", CITIZENS)
def test_made_where_the_meta_device_is_the_default(name):
    with torch.device("meta"):
        layer = CITIZENS[name][0]()
    assert all(t.is_meta for t in layer.state_dict().values())
