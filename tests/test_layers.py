"""Weight layers: the matrix of a layer, and the layer run with a matrix in place of its weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from evenkeel.errors import ConfigError
from evenkeel.layers import (
    Wrapper,
    chosen_paths,
    register_weight_layer,
    running_normalizers,
    weight_layer,
    weights,
)

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
OPTIONS = [
    {},
    {"stride": 2},
    {"padding": 1},
    {"padding": "same"},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"dilation": 2},
    {"groups": 2},
    {"groups": 4, "padding": 1},  # depthwise
    {"bias": False},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "replicate"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "circular", "dilation": 2},
    {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "padding_mode": "reflect"},
]


def without_weight(layer: nn.Module) -> nn.Module:
    """As it is on a chip, where a kind that used ``layer.weight`` would fail."""
    stripped = copy.deepcopy(layer)
    stripped.weight = None
    return stripped


def name_of(options: dict) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_convolutions_with_every_option(dims, options):
    kernel = (3, 5, 3)[:dims]
    layer = CONVOLUTIONS[dims](4, 8, kernel, **options)
    x = torch.randn(2, 4, *(9, 11, 9)[:dims])
    kind = weight_layer(layer)
    matrix = kind.matrix(layer)
    inputs = 4 // options.get("groups", 1)
    assert matrix.shape == (8, inputs * torch.Size(kernel).numel())
    assert torch.equal(matrix[5], layer.weight[5].flatten())  # a row is one output
    assert torch.equal(kind.weight(without_weight(layer), matrix), layer.weight)
    assert torch.equal(kind.forward(without_weight(layer), x, matrix), layer(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_options_that_differ_by_axis(dims):
    layer = CONVOLUTIONS[dims](
        2, 3, (3, 2, 1)[:dims], (2, 1, 3)[:dims], (1, 0, 2)[:dims], (1, 3, 1)[:dims]
    )
    x = torch.randn(2, 2, *(9, 8, 7)[:dims])
    kind = weight_layer(layer)
    assert torch.equal(kind.forward(without_weight(layer), x, kind.matrix(layer)), layer(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)], ids=len)
def test_linear(bias, shape):
    layer, x = nn.Linear(6, 4, bias=bias), torch.randn(shape)
    kind = weight_layer(layer)
    assert kind.matrix(layer).shape == (4, 6)
    assert torch.equal(kind.weight(without_weight(layer), kind.matrix(layer)), layer.weight)
    assert torch.equal(kind.forward(without_weight(layer), x, kind.matrix(layer)), layer(x))


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv1d(6, 4, 1)], ids=str)
def test_another_matrix_scales_the_weights_and_not_the_bias(layer):
    x = torch.randn(3, 6) if isinstance(layer, nn.Linear) else torch.randn(3, 6, 2)
    kind = weight_layer(layer)
    doubled = kind.forward(layer, x, 2 * kind.matrix(layer))
    bias = layer.bias.view(-1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(doubled, 2 * layer(x) - bias)


# ---- which layers are known


class PlainSubclass(nn.Linear):
    """Keeps the parent's forward, as torch's own ``NonDynamicallyQuantizableLinear`` does."""


class Up(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x)


class Doubling(nn.Linear):
    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    "layer",
    [PlainSubclass(4, 3), nn.MultiheadAttention(4, 2).out_proj, nn.Linear(4, 3)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_subclass_with_its_parents_forward_is_known(layer):
    x = torch.randn(2, 4)
    kind = weight_layer(layer)
    assert torch.equal(kind.forward(layer, x, kind.matrix(layer)), layer(x))


@pytest.mark.parametrize(
    "layer",
    [
        Doubling(4, 3),
        Standardized(1, 1, 3),
        Up(2, 2, 3),
        nn.Bilinear(2, 2, 2),
        nn.Embedding(3, 2),
        nn.LSTM(2, 2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Sequential(nn.Linear(2, 2)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_does_something_else_with_its_weights_is_not_guessed_at(layer):
    assert weight_layer(layer) is None


def test_a_layer_with_a_forward_of_its_own_is_not_guessed_at():
    # As accelerate and other wrappers do: the instance, not the class, has another forward.
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    assert weight_layer(layer) is None


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 3, padding=1)], ids=str)
def test_parametrized_layers_are_known(name, layer):
    plain = copy.deepcopy(layer)
    layer = getattr(parametrizations, name)(copy.deepcopy(layer)).eval()
    if name == "weight_norm":
        layer.parametrizations.weight.original0.data *= 3  # else it equals the plain layer
    x = torch.randn(2, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    kind = weight_layer(layer)
    assert torch.equal(kind.forward(layer, x, kind.matrix(layer)), layer(x))
    assert not torch.allclose(kind.forward(layer, x, kind.matrix(layer)), plain(x))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "output_padding": 1, "padding": 1}, {"groups": 2}, {"dilation": 2}],
    ids=str,
)
def test_transposed_convolutions_are_a_matrix(rank, options):
    layer = getattr(nn, f"ConvTranspose{rank}d")(4, 6, 3, **options).double()
    kind, x = weight_layer(layer), torch.randn(2, 4, *[5] * rank, dtype=torch.float64)
    matrix = kind.matrix(layer)
    assert matrix.shape == (6, 4 // layer.groups * 3**rank)
    assert torch.equal(kind.weight(layer, matrix), layer.weight)
    torch.testing.assert_close(kind.forward(without_weight(layer), x, matrix), layer(x))
    only_one = torch.zeros_like(matrix)
    only_one[4] = matrix[4]  # a row is an output channel
    y = kind.forward(without_weight(layer), x, only_one)
    torch.testing.assert_close(y[:, 4], layer(x)[:, 4])
    torch.testing.assert_close(y[:, :4], layer.bias[:4].view(-1, *[1] * rank).expand_as(y[:, :4]))


# ---- the user's own kinds


@pytest.fixture
def _registry(monkeypatch):
    monkeypatch.setattr(weights, "_KINDS", dict(weights._KINDS))


class TransposedWeights:
    def matrix(self, layer):
        return layer.weight.transpose(0, 1).flatten(1)

    def weight(self, layer, matrix):
        shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        return matrix.view(shape).transpose(0, 1)

    def forward(self, layer, x, matrix):
        weight = self.weight(layer, matrix)
        return F.conv_transpose2d(x, weight, layer.bias, layer.stride)


@pytest.mark.usefixtures("_registry")
def test_a_kind_of_ones_own():
    layer, x = Up(3, 5, 2, stride=2), torch.randn(2, 3, 4, 4)
    assert weight_layer(layer) is None
    register_weight_layer(Up, TransposedWeights())
    kind = weight_layer(layer)
    assert kind.matrix(layer).shape == (5, 12)
    torch.testing.assert_close(kind.forward(without_weight(layer), x, kind.matrix(layer)), layer(x))
    assert weight_layer(nn.Bilinear(2, 2, 1)) is None
    assert weight_layer(nn.Linear(2, 2)) is not None


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("kind", [Doubling, PlainSubclass])
def test_a_class_of_ones_own_goes_before_its_parent(kind):
    # Whoever registers a class means that class, whether or not it overrides forward.
    own = TransposedWeights()
    register_weight_layer(kind, own)
    assert weight_layer(kind(2, 2)) is own
    assert weight_layer(nn.Linear(2, 2)) is not own


@pytest.mark.usefixtures("_registry")
def test_a_registered_kind_replaces_the_one_before():
    own = TransposedWeights()
    register_weight_layer(nn.Linear, own)
    assert weight_layer(nn.Linear(2, 2)) is own


# ---- normalizers


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))


def test_every_module_with_running_statistics_is_a_normalizer():
    net = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Sequential(nn.SyncBatchNorm(2), Frozen()),
        nn.GroupNorm(1, 2),
        nn.BatchNorm1d(2, track_running_stats=False),
        nn.InstanceNorm2d(2),
        nn.InstanceNorm2d(2, track_running_stats=True),
    )
    found = dict(running_normalizers(net))
    assert list(found) == ["0", "1.0", "1.1", "5"]
    assert found["1.1"] is net[1][1]


# ---- layers by name, and wrapped


PATHS = ["stem.conv", "blocks.0.conv", "blocks.0.a[0]", "blocks.1.conv", "head"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], set()),
        (["head"], {"head"}),
        (["blocks.*"], {"blocks.0.conv", "blocks.0.a[0]", "blocks.1.conv"}),
        (["*.conv", "head"], {"stem.conv", "blocks.0.conv", "blocks.1.conv", "head"}),
        (["blocks.0.a[0]"], {"blocks.0.a[0]"}),  # a name goes before the pattern it also is
        (("blocks.[01].conv",), {"blocks.0.conv", "blocks.1.conv"}),
        ({"head", "hea?"}, {"head"}),
    ],
)
def test_layers_chosen_by_names_and_patterns(patterns, expected):
    assert chosen_paths(patterns, PATHS) == expected


def test_names_that_fit_no_layer():
    with pytest.raises(ConfigError, match=r"No layer matches 'haed'\. Did you mean 'head'"):
        chosen_paths(["head", "haed"], PATHS)
    with pytest.raises(ConfigError, match=r"No layer matches 'tail\*'"):
        chosen_paths(["*", "tail*"], PATHS)
    with pytest.raises(ConfigError, match="must be a list of paths or patterns; got the string"):
        chosen_paths("head", PATHS)


def test_a_wrapped_layer_answers_for_what_it_holds_and_is_no_weight_layer_itself():
    layer = nn.Linear(3, 2)
    wrapped = Wrapper(Wrapper(layer))
    assert wrapped.weight is layer.weight
    assert wrapped.in_features == 3
    assert weight_layer(wrapped) is None
    assert dict(wrapped.named_parameters()).keys() == {"layer.layer.weight", "layer.layer.bias"}
    with pytest.raises(AttributeError, match="no_such"):
        _ = wrapped.no_such
    twin = copy.deepcopy(wrapped)
    assert twin.weight is not layer.weight
    assert torch.equal(twin.weight, layer.weight)
    bare = Wrapper.__new__(Wrapper)  # as while unpickling: no endless search for the layer
    with pytest.raises(AttributeError):
        _ = bare.weight
