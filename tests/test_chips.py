"""Many chips at once are as many single ones."""

import pytest
import torch
from torch import nn

from evenkeel.analog import PCM, Converter, Device, Gaussian, Periphery, StuckAt, WanReRAM, program
from evenkeel.errors import ConfigError

DEVICES = [
    PCM(), Gaussian(0.1), Device(PCM(), StuckAt(0.05)), WanReRAM(),
    Device(PCM(), periphery=Periphery(dac=Converter(8), adc=Converter(8), reads="each")),
]  # fmt: skip


@pytest.fixture
def net():
    shared = nn.Linear(12, 12)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 3)),
        nn.Flatten(), shared, nn.Tanh(), shared, nn.Linear(12, 3),
    ).eval()  # fmt: skip


X = torch.randn(6, 1, 8, 8)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_they_are_the_single_ones_bit_for_bit(net, device):
    chips = program(net, device, seed=5, chips=3).age_(3600.0).rewind_("a")
    outputs = chips(X)
    assert outputs.shape == (3, 6, 3)
    for k, chip in enumerate(chips):
        single = program(net, device, seed=5 + k).age_(3600.0)
        assert chip.seed == single.seed
        for (name, a), b in zip(
            single.rewind_("a").state_dict().items(), chip.rewind_("a").state_dict().values(),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(a, b), name
        assert torch.equal(single(X), outputs[k])
        assert torch.equal(chip(X), outputs[k])


def test_each_has_read_noise_of_its_own_that_goes_on(net):
    chips = program(net, PCM(), seed=0, chips=2).age_(60.0)
    first, second = chips(X), chips(X)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    single = program(net, PCM(), seed=1).age_(60.0)
    assert torch.equal(single(X), first[1])
    assert torch.equal(single(X), second[1])


def test_the_way_to_an_age_does_not_matter(net):
    straight = program(net, PCM(), seed=0, chips=2).age_(86_400.0)
    around = program(net, PCM(), seed=0, chips=2).age_(3600.0).age_(0.0).age_(86_400.0)
    assert torch.equal(straight(X), around(X))


def test_one_that_is_taken_out_is_on_its_own(net):
    chips = program(net, PCM(), seed=0, chips=2)
    wanted = chips.rewind_("a")(X)
    taken = chips[1]
    taken.age_(1e6)
    taken.model[1].running_mean.add_(3)
    assert torch.equal(chips.rewind_("a")(X), wanted)
    assert chips[-1].seed == 1
    with pytest.raises(IndexError):
        chips[2]


def test_structures_are_stacked():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return {"y": self.layer(x), "x": (x,)}

    found = program(Two(), Gaussian(0.1), seed=0, chips=3)(torch.ones(5, 4))
    assert (found["y"].shape, found["x"][0].shape) == ((3, 5, 2), (3, 5, 4))


def test_what_cannot_be(net):
    with pytest.raises(ConfigError, match="chips must be 1"):
        program(net, PCM(), seed=0, chips=0)
    chips = program(net, WanReRAM(), seed=0, chips=2).age_(60.0)
    with pytest.raises(ConfigError, match="measured up to"):
        chips.age_(1e9)
    assert [chip.age_s for chip in chips] == [60.0, 60.0]
    assert repr(chips) == "2 chips, seeds 0 to 1, WanReRAM"


def test_what_is_no_tensor_is_handed_on():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)

    y, nothing = program(Attends(), PCM(), seed=0, chips=2)(torch.randn(2, 3, 8))
    assert (y.shape, nothing) == ((2, 2, 3, 8), None)
