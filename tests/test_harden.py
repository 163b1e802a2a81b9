"""Training under noise on the weights."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenkeel as ek
from evenkeel.analog import Gaussian, hardening, program
from evenkeel.analog.harden import InjectedNoise
from evenkeel.data import digits
from evenkeel.errors import ConfigError
from evenkeel.models import build
from evenkeel.train import fit


def trained(net, x, y, level, steps=5, **options):
    state = torch.get_rng_state()
    with hardening(net, level, **options):
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net.train()(x), y).backward()
            optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    return net.eval()


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


X, Y = torch.randn(16, 1, 8, 8), torch.arange(16) % 10


def test_the_noise_is_a_share_of_the_largest_weight_and_new_each_time():
    noise, w = InjectedNoise(0.1, math.inf, 0, "a"), torch.randn(400, 300)
    first, second = noise(w) - w, noise(w) - w
    for drawn in (first, second):
        assert drawn.std().item() == pytest.approx(0.1 * w.abs().max().item(), rel=0.01)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.02
    assert torch.equal(noise.eval()(w), w)
    clipped = InjectedNoise(0.1, 2.0, 0, "a").eval()(w)
    assert clipped.abs().max().item() == pytest.approx(2 * w.std(correction=0).item(), rel=1e-4)


def test_behind_it_the_network_is_plain_and_clipped():
    net = trained(small(), X, Y, 0.1)
    assert set(net.state_dict()) == set(small().state_dict())
    for layer in (net[0], net[3]):
        assert type(layer.weight) is nn.Parameter
        # What is clipped has a smaller deviation, so the bound is that of the weights before.
        assert layer.weight.abs().max() <= 2.9 * layer.weight.std(correction=0)
    assert type(net[0]) is nn.Conv2d
    program(net, Gaussian(0.1), seed=0)


def test_the_same_seed_trains_the_same_network():
    a, b, c = (trained(small(), X, Y, 0.1, seed=s) for s in (0, 0, 1))
    assert torch.equal(a[0].weight, b[0].weight)
    assert not torch.equal(a[0].weight, c[0].weight)


def test_only_some_layers():
    net = small()
    with hardening(net, 0.5, layers=["3"]):
        net.train()
        hidden = net[:3](X)
        assert torch.equal(hidden, net[:3](X))
        assert not torch.equal(net[3](hidden), net[3](hidden))


def test_a_failure_leaves_the_weights():
    net = small()
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def train():
        with hardening(net, 0.1):
            for p in net.parameters():
                p.data.mul_(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert torch.equal(net[0].weight, before["0.weight"])
    assert set(net.state_dict()) == set(before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": -0.1}, "level must be 0"),
        ({"level": 0.1, "clip": 0.0}, "clip must be above 0"),
        ({"level": 0.1, "layers": ["9"]}, "No layer matches"),
    ],
)
def test_bad_input_is_refused(options, says):
    with pytest.raises(ConfigError, match=says), hardening(small(), **options):
        pass


def test_a_parametrized_weight_is_refused():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ConfigError, match="made of other parameters"), hardening(net, 0.1):
        pass


def test_it_hardens():
    """On real digits: a few epochs more, and the noise costs far less."""
    data = digits()
    x, y = data.train
    plain = fit(lambda: build("resnet8_digits"), x, y, epochs=8)
    hardened = build("resnet8_digits")
    hardened.load_state_dict(plain.state_dict())
    with hardening(hardened, 0.15):
        optimizer = torch.optim.SGD(hardened.parameters(), 0.02, momentum=0.9)
        for _ in range(4):
            for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).split(
                64
            ):
                optimizer.zero_grad()
                F.cross_entropy(hardened.train()(x[part]), y[part]).backward()
                optimizer.step()
    cells = [
        ek.audit(net.eval(), data.limited(test=300), devices=["gaussian:0.15"], chips=8,
                 remedies=["none"], store=":memory:", workers=0).cells[0]
        for net in (plain, hardened)
    ]  # fmt: skip
    assert cells[1].mean > cells[0].mean + 5


def test_equal_weights_stay():
    net = nn.Conv2d(1, 1, 2)
    nn.init.constant_(net.weight, 0.25)
    with hardening(net, 0.1):
        pass
    assert (net.weight == 0.25).all()


def test_tied_weights_are_clipped_once():
    net = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    nn.init.normal_(net[0].weight)
    net[1].weight = net[0].weight
    x = torch.randn(3, 50)
    with hardening(net, 0.1, clip=1.0):
        wanted = net.eval()(x)
    torch.testing.assert_close(net(x), wanted)


def test_layers_that_the_noise_does_not_reach_are_named():
    net = nn.ModuleDict({"r": nn.LSTM(3, 4), "out": nn.Linear(4, 2)})
    with pytest.raises(ConfigError, match="weights of 'r', a LSTM"), hardening(net, 0.1):
        pass
    with hardening(net, 0.1, layers=["out"]):
        pass


def test_a_failure_at_the_start_leaves_plain_weights():
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    with torch.inference_mode():
        net[1].weight = nn.Parameter(torch.randn(5, 5))
    with pytest.raises(RuntimeError), hardening(net, 0.1):
        pass
    assert not hasattr(net[0], "parametrizations")
