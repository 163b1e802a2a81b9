"""Digital scales around layers, for analog arrays: the same function, less noise."""

import copy
import json

import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel.analog import Gaussian
from evenkeel.balance import Rescaled, balance_arrays_
from evenkeel.balance.arrays import least_noise
from evenkeel.errors import ConfigError, GraphError
from evenkeel.layers import weight_layer

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (32, 6)),
    "linear in 3d": (lambda: nn.Linear(6, 5), (8, 4, 6)),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), (32, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), (4, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, padding=1), (4, 6, 7, 7)),
    "reflect": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (4, 6, 7, 7)),
    "strided, dilated": (lambda: nn.Conv2d(6, 4, 3, stride=2, dilation=2), (4, 6, 9, 9)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (4, 6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (4, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), (2, 6, 4, 4, 4)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def uneven(name):
    """A network of one layer, whose inputs and weights are of unlike sizes."""
    make, shape = LAYERS[name]
    layer = make()
    with torch.no_grad():
        layer.weight.mul_(torch.randn(len(layer.weight), *(1,) * (layer.weight.dim() - 1)).exp())
        layer.weight.mul_(torch.randn(1, layer.weight.shape[1], *layer.weight.shape[2:]).exp())
    axis = -1 if isinstance(layer, nn.Linear) else 1
    scales = torch.randn(6).exp()
    x = torch.randn(shape) * scales.view(
        [6 if a == axis % len(shape) else 1 for a in range(len(shape))]
    )
    return nn.Sequential(layer).eval(), x


@each_layer
def test_the_function_is_kept_and_undo_is_exact(name):
    net, x = uneven(name)
    expected, before = net(x).detach(), copy.deepcopy(net.state_dict())
    done = balance_arrays_(net, [x])
    assert isinstance(net[0], Rescaled)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(net[0].weight, before["0.weight"], rtol=1e-5, atol=1e-7)
    done.undo()
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(net.state_dict()[k], before[k]) for k in before)


@each_layer
def test_the_noise_foretold_is_the_noise_of_chips(name):
    """Before and after, as an average over chips."""
    net, x = uneven(name)
    changed = copy.deepcopy(net)
    done = balance_arrays_(changed, [x])

    @torch.no_grad()
    def measured(model):
        clean, level = model(x), 0.01
        powers = []
        for seed in range(150):
            noise = ek.analog.program(model, Gaussian(level), seed=seed)(x) - clean
            channels = noise if name.startswith(("linear", "no")) else noise.movedim(1, -1)
            powers.append(channels.square().flatten(0, -2).mean(0).sum() / level**2)
        return float(torch.stack(powers).mean())

    told = done.noise_before["0"], done.noise_after["0"]
    assert told[1] < told[0]
    if name in ("conv2d", "reflect", "conv1d", "conv3d", "groups"):  # edges see fewer inputs
        assert measured(changed) / measured(net) == pytest.approx(told[1] / told[0], rel=0.25)
    else:
        assert measured(net) == pytest.approx(told[0], rel=0.2)
        assert measured(changed) == pytest.approx(told[1], rel=0.2)


def test_no_scales_nearby_make_less_noise():
    layer, power = nn.Linear(6, 5).double(), torch.rand(6).double() + 0.1
    with torch.no_grad():
        layer.weight.mul_(torch.randn(5, 6).exp())
    s, _ = least_noise(layer, power)

    def noise(s):
        u = (layer.weight.abs() / s).amax(1)
        return float((u.square().sum() * (s.square() * power).sum()).detach())

    least = noise(s)
    for size in (0.01, 0.1, 1.0):
        for _ in range(50):
            assert noise(s * (size * torch.randn(6)).exp()) > 0.985 * least  # the soft maximum
    assert noise(torch.ones(6)) > 1.2 * least


def test_rescaling_by_hand_changes_nothing():
    """The least point is one: it is found again from a network that was scaled by other means."""
    net, x = uneven("conv2d")
    first = balance_arrays_(copy.deepcopy(net), [x])
    with torch.no_grad():
        scales = torch.randn(6).exp()
        net[0].weight.mul_(scales.view(1, -1, 1, 1))
    second = balance_arrays_(net, [x / scales.view(1, -1, 1, 1)])
    assert second.noise_after["0"] == pytest.approx(first.noise_after["0"], rel=0.02)


def test_on_a_chip_it_helps_and_is_the_same_chip(network, data, accuracy):
    changed = copy.deepcopy(network)
    balance_arrays_(changed, data.calibration)
    found = [
        [accuracy(ek.analog.program(m, Gaussian(0.2), seed=seed)) for seed in range(6)]
        for m in (network, changed)
    ]
    assert sum(found[1]) / 6 > sum(found[0]) / 6 + 3
    arrays = dict(ek.analog.program(changed, Gaussian(0.2), seed=0).arrays())
    assert {layer.path for layer in arrays.values()} == {
        path for path, m in network.named_modules() if weight_layer(m) is not None
    }


def test_it_is_saved_and_loaded(network, data, tmp_path):
    x = data.calibration[0][0]
    balance_arrays_(network, [x])
    ek.calibrate.match_(network, [x], layers=["classifier*"])
    ek.save(network, tmp_path / "net.safetensors")
    again = ek.load(tmp_path / "net.safetensors")
    assert torch.equal(again(x), network(x))
    chip = ek.analog.program(network, ek.analog.PCM(), seed=3).age_(3600)
    ek.save(chip, tmp_path / "chip.safetensors")
    assert torch.equal(ek.load(tmp_path / "chip.safetensors")(x), chip(x))


def test_undo_leaves_a_match_that_was_put_inside(network, data):
    x = data.calibration[0][0]
    expected = network(x)
    done = balance_arrays_(network, [x])
    ek.calibrate.match_(network, [x], layers=["classifier*"])
    done.undo()
    assert isinstance(network.classifier, ek.calibrate.Matched)
    torch.testing.assert_close(network(x), expected)  # unfitted, a match changes nothing
    assert not any(isinstance(m, Rescaled) for m in network.modules())


def test_a_match_around_it_is_saved_and_loaded(network, data, tmp_path):
    x = data.calibration[0][0]
    ek.calibrate.match_(network, [x], layers=["classifier"])
    balance_arrays_(network, [x])
    ek.save(network, tmp_path / "net.safetensors")
    assert torch.equal(ek.load(tmp_path / "net.safetensors")(x), network(x))


def test_what_cannot_be_scaled_is_left_alone_and_told():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.standard = ek.norm.WeightStandardizedConv1d(8, 8, 3)
            self.zero, self.idle, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            nn.init.zeros_(self.zero.weight)

        def forward(self, x):
            y, _ = self.attention(x, x, x, need_weights=False)
            y = self.standard(y.transpose(1, 2)).transpose(1, 2)
            return self.head(y + self.zero(y))

    net, x = Attention().eval(), torch.randn(4, 7, 8)
    expected = net(x)
    done = balance_arrays_(net, [x])
    assert list(done.noise_before) == ["head"]
    assert {path: why.split()[-1] for path, why in done.skipped.items()} == {
        "attention.out_proj": "called", "standard": "forward", "zero": "zero", "idle": "called",
    }  # fmt: skip
    torch.testing.assert_close(net(x), expected)
    assert "head" in done.table()
    json.dumps(done.to_dict())


def test_a_silent_input_and_an_idle_column_leave_finite_scales():
    net, x = uneven("linear")
    x[:, 2] = 0
    with torch.no_grad():
        net[0].weight[:, 4] = 0
        net[0].weight[3] = 0
    expected = net(x)
    balance_arrays_(net, [x])
    assert all(bool(t.isfinite().all()) for t in net.state_dict().values())
    torch.testing.assert_close(net(x), expected)
    x[:, 2] = 5  # it wakes up
    assert bool(net(x).isfinite().all())


def test_a_layer_of_two_names_is_scaled_once():
    layer = nn.Linear(6, 6)
    net = nn.Sequential(layer, nn.ReLU(), layer).eval()
    x = torch.randn(16, 6)
    expected = net(x)
    done = balance_arrays_(net, [x])
    assert net[0] is net[2]
    torch.testing.assert_close(net(x), expected)
    done.undo()
    assert net[0] is layer
    assert net[2] is layer


@pytest.mark.parametrize(
    ("batches", "model", "said"),
    [
        ([], nn.Sequential(nn.Linear(3, 3)), "at least one batch"),
        ([torch.zeros(2, 3)], nn.Sequential(nn.ReLU()), "no layer has weights"),
        ([torch.zeros(2, 3)], nn.Linear(3, 3), "it is the whole network"),
        ([torch.full((2, 3), torch.nan)], nn.Sequential(nn.Linear(3, 3)), "NaN or infinity"),
    ],
)
def test_errors(batches, model, said):
    with pytest.raises(ConfigError, match=said):
        balance_arrays_(model, batches)


def test_a_network_whose_outputs_change_is_as_it_was():
    class Reads(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * self[0]._modules.get("layer", self[0]).weight.sum()

    net, x = Reads(*uneven("linear")[0]), uneven("linear")[1]
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(GraphError, match="must stay the same"):
        balance_arrays_(net, [x])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert isinstance(net[0], nn.Linear)


def test_modes_and_half_precision():
    net, x = uneven("conv2d")
    net = nn.Sequential(net[0], nn.Dropout(0.5), nn.Sequential(nn.ReLU()).train())
    net.train()
    net[2].eval()
    balance_arrays_(net, [x])
    assert [m.training for m in (net, net[1], net[2])] == [True, True, False]
    net.to(torch.bfloat16).eval()
    assert net[0].input_scale.dtype == torch.float32
    assert net(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("remedy", ["balance", "balance:p=4", "balance:arrays"])
def test_remedies_are_rows_of_an_audit(network, data, remedy):
    found = ek.audit(
        network, data.limited(test=100, calibration=200), devices=["gaussian:0.2"], chips=2,
        store=":memory:", remedies=["none", remedy, f"{remedy}+calibrate"], workers=1,
    )  # fmt: skip
    assert [cell.remedy for cell in found.cells] == ["none", remedy, f"{remedy}+calibrate"]
    assert found.cells[2].mean > found.cells[0].mean


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'arrays'"):
        ek.balance.remedies.BalanceWeights("array")
