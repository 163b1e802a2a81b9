"""Training under noise on the weights."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenkeel as ek
from evenkeel.analog import Gaussian, hardening, program
from evenkeel.analog.harden import InjectedNoise
from evenkeel.audit.names import resolve
from evenkeel.audit.remedy import as_row
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


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def plain(data):
    return fit(lambda: build("resnet8_digits"), *data.train, epochs=6)


def outputs(net, data):
    with torch.no_grad():
        return torch.cat([net(x) for x, _ in data.test])


def test_a_network_hardens_without_labels(data, plain):
    hardened = copy.deepcopy(plain)
    before = torch.get_rng_state()
    inputs = [(x, None) for x, *_ in data.calibration]
    assert ek.analog.harden_(hardened, inputs, 0.15, passes=8) is hardened
    assert torch.equal(torch.get_rng_state(), before)
    assert not hardened.training
    cells = [
        ek.audit(net.eval(), data.limited(test=300), devices=["gaussian:0.15"], chips=8,
                 remedies=["none"], store=":memory:", workers=0).cells[0]
        for net in (plain, hardened)
    ]  # fmt: skip
    assert cells[1].mean > cells[0].mean + 2
    same = (outputs(hardened, data).argmax(1) == outputs(plain, data).argmax(1)).float().mean()
    assert same > 0.95


def test_statistics_stay_and_the_seed_decides():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    batches = [torch.randn(40, 6) for _ in range(2)]
    made = [
        ek.analog.harden_(copy.deepcopy(net), batches, 0.1, passes=2, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0][1].running_mean, net[1].running_mean)
    assert torch.equal(made[0][0].weight, made[1][0].weight)
    assert not torch.equal(made[0][0].weight, made[2][0].weight)
    assert not torch.equal(made[0][0].weight, net[0].weight)
    assert all(type(layer.weight) is nn.Parameter for layer in (made[0][0], made[0][3]))


def test_no_noise_and_no_clip_leave_the_function():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 6)
    wanted = net(x)
    ek.analog.harden_(net, [x], 0.0, clip=math.inf, passes=3)
    torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"passes": 0}, "passes"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"level": -1}, "level"),
    ],
)
def test_options_out_of_range(given, said):
    with pytest.raises(ConfigError, match=said):
        ek.analog.harden_(nn.Linear(4, 2), [torch.randn(8, 4)], **{"level": 0.1} | given)


def test_what_cannot_learn_is_refused():
    with pytest.raises(ConfigError, match="at least one sample"):
        ek.analog.harden_(nn.Linear(4, 2), [], 0.1)
    with pytest.raises(ConfigError, match="require gradients"):
        ek.analog.harden_(nn.Linear(4, 2).requires_grad_(False), [torch.randn(8, 4)], 0.1)


def test_hardening_is_a_remedy_and_the_dearest(data, plain):
    audit = ek.audit(
        plain.eval(), data.limited(test=300, calibration=256), devices=["gaussian:0.2"], chips=3,
        remedies=["none", "harden:0.2:passes=6", "harden:0.2:passes=6+calibrate"],
        store=":memory:", workers=0,
    )  # fmt: skip
    none, hardened, both = audit.cells
    assert hardened.mean > none.mean + 3
    assert both.mean > none.mean + 3
    assert "a short training" in " ".join(audit.verdict)
    assert "no retraining" not in " ".join(audit.verdict)
    rows = [resolve("remedies", name) for name in ("harden", "harden:0.05", "harden:passes=3")]
    assert [row.name for row in rows] == ["harden", "harden:0.05", "harden:passes=3"]
    assert as_row("harden").effort > as_row("drift+calibrate").effort


def test_a_composite_must_be_taken_apart_before():
    net = nn.ModuleDict({"r": nn.LSTM(3, 4), "out": nn.Linear(4, 2)})
    assert "take_apart_" in as_row("harden").why_not(net)
    ek.layers.take_apart_(net)
    assert as_row("harden").why_not(net) is None


def normalized():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).train()


def same_state(net, before):
    after = net.state_dict()
    return all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("failing", ["interrupted", "diverging"])
def test_a_training_that_fails_leaves_all_as_it_was(failing):
    net, calls = normalized(), []
    net(torch.randn(8, 4)).sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [p.grad for p in net.parameters()]

    def forward(model, batch):
        calls.append(1)
        if failing == "interrupted" and len(calls) == 10:
            raise KeyboardInterrupt
        return model(batch)

    rate = 1e-3 if failing == "interrupted" else 1e30
    with pytest.raises((KeyboardInterrupt, ConfigError)):
        ek.analog.harden_(
            net, [torch.randn(64, 4)], 0.1, passes=40, learning_rate=rate, forward=forward
        )
    assert same_state(net, before)
    assert all(module.training for module in net.modules())
    assert all(p.grad is grad for p, grad in zip(net.parameters(), grads, strict=True))
    assert type(net[0].weight) is nn.Parameter


def test_outputs_that_are_masked_by_infinity_are_left_out():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x).masked_fill(torch.tensor([False, True, False]), -torch.inf)

    net = ek.analog.harden_(Masked(), [torch.randn(32, 4)], 0.1, passes=3)
    assert net.layer.weight.isfinite().all()


def test_batches_made_in_inference_mode():
    with torch.inference_mode():
        x = torch.randn(32, 4)
        net = ek.analog.harden_(normalized_outside, [x], 0.1, passes=2)
    assert not net[0].weight.is_inference()


normalized_outside = normalized()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: normalized().requires_grad_(False), "require gradients"),
        (lambda: normalized().half(), "float32"),
    ],
)
def test_what_cannot_be_trained_is_no_remedy(make, said):
    assert said in as_row("harden").why_not(make())
    with pytest.raises(ConfigError, match=said):
        ek.analog.harden_(make(), [torch.randn(8, 4)], 0.1)


@pytest.mark.parametrize("name", ["harden:-1", "harden:passes=0", "harden:passes=2.5"])
def test_settings_of_the_remedy_out_of_range(name):
    with pytest.raises(ConfigError, match="Harden needs"):
        resolve("remedies", name)


def test_outputs_of_changing_size_are_refused():
    calls = []

    def forward(model, batch):
        calls.append(1)
        return model(batch)[: len(calls)]

    with pytest.raises(ConfigError, match="one size"):
        ek.analog.harden_(normalized(), [torch.randn(8, 4)], 0.1, forward=forward)
