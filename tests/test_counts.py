"""What a chip takes, and its weights for another program."""

import json

import pytest
import torch
from torch import nn

from evenkeel.analog import PCM, Device, Gain, Periphery, count, program
from evenkeel.calibrate import match_
from evenkeel.errors import ConfigError
from evenkeel.quaternion import QuaternionConv2d


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(), nn.Linear(4 * 14 * 14, 5),
    ).eval()  # fmt: skip


MACS = {"0": 64 * 8 * 27, "3": 64 * 8 * 4 * 4, "4": 14 * 14 * 4 * 18, "6": 4 * 14 * 14 * 5}
"""By hand, for one picture of 8 x 8."""


@pytest.mark.parametrize("samples", [1, 5])
def test_multiplications_with_a_weight_are_those_by_hand(samples):
    chip = program(net(), PCM(), seed=0, layers=["0", "3"])
    counts = count(chip, torch.randn(samples, 3, 8, 8))
    assert counts.analog == {k: MACS[k] for k in ("0", "3")}
    assert counts.digital == {k: MACS[k] for k in ("4", "6")}
    share = (MACS["0"] + MACS["3"]) / sum(MACS.values())
    assert counts.analog_share == pytest.approx(share)
    assert json.loads(json.dumps(counts.to_dict()))["analog_share"] == pytest.approx(share)


def test_tiles_and_conversions_by_hand():
    device = Device(PCM(), periphery=Periphery(rows=18))
    counts = count(program(net(), device, seed=0), torch.randn(2, 3, 8, 8))
    # Rows: 27 as 18 and 9; 32 as 18 and 14; two groups of 18 whole; 784 as 43 of 18 and 10.
    assert counts.tiles == 2 + 2 + 1 + 44
    assert counts.devices == 2 * (8 * 27 + 4 * 32 + 4 * 18 + 5 * 784)
    assert counts.dac == 64 * 27 + 256 * 32 + 196 * 18 + 784
    assert counts.adc == 64 * 8 * 2 + 256 * 4 * 2 + 196 * 4 + 5 * 44


def test_counting_leaves_the_reads():
    chip, x = program(net(), PCM(), seed=0), torch.randn(2, 3, 8, 8)
    wanted = chip.rewind_("a")(x)
    chip.rewind_("a")
    count(chip, x)
    assert torch.equal(chip(x), wanted)


def test_a_layer_that_is_called_twice_counts_twice():
    layer = nn.Linear(4, 4)
    counts = count(program(nn.Sequential(layer, nn.ReLU(), layer), PCM(), seed=0), torch.ones(3, 4))
    assert (counts.devices, counts.analog) == (32, {"0": 32})


def test_inputs_that_reach_nothing():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return x

    with pytest.raises(ConfigError, match="reach no layer"):
        count(program(Idle(), PCM(), seed=0), torch.ones(1, 2))


# ---- as plain weights


def test_without_noise_it_is_the_network_itself():
    model, x = net(), torch.randn(2, 3, 8, 8)
    plain = program(model, Gain(1.0), seed=0).to_torch()
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    assert {type(m) for m in plain.modules()} == {type(m) for m in model.modules()}
    assert set(plain.state_dict()) == set(model.state_dict())
    model.load_state_dict(plain.state_dict())


def test_a_read_is_frozen():
    model, x = nn.Sequential(QuaternionConv2d(4, 8, 3), nn.Flatten()), torch.randn(2, 4, 6, 6)
    chip = program(nn.Sequential(nn.Linear(6, 3)), PCM(), seed=0).age_(3600.0)
    plain = chip.rewind_("a").to_torch()
    weight = chip.rewind_("a").model[0].weight
    assert torch.equal(plain[0].weight, weight)
    assert torch.equal(plain(x[..., 0]), plain(x[..., 0]))
    # Four copies of a number are one again: the nearest quaternions.
    assert program(model, PCM(), seed=0).to_torch()(x).shape == model(x).shape


def test_digital_layers_behind_a_match_count():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)).eval(), torch.randn(20, 4)
    match_(model, [x])
    counts = count(program(model, PCM(), seed=0, layers=["0"]), x)
    assert counts.digital == {"2": 24}
    assert counts.analog_share == 0.5


@pytest.mark.parametrize("inputs", [(), (torch.ones(0, 4),)])
def test_no_samples_are_refused(inputs):
    with pytest.raises(ConfigError, match="one sample or more"):
        count(program(nn.Linear(4, 4), PCM(), seed=0), *inputs)
