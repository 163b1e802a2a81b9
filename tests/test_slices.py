"""Weights in several digits, each on an array of its own."""

import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel.analog import (
    PCM,
    Converter,
    Device,
    Gain,
    Gaussian,
    Periphery,
    Slices,
    compensate_drift_,
    count,
    program,
)
from evenkeel.errors import ConfigError

close = torch.testing.assert_close
LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (3, 12)),
    "2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (3, 6, 8, 8)),
    "up": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (3, 6, 4, 4)),
}


def rounded(weight, bits):
    """In whole steps of the largest weight, with a sign."""
    levels = 2**bits - 1
    largest = weight.abs().max()
    return (weight / largest * levels).round() / levels * largest


def on_chip(layer, effect, number, bits, seed=0, **given):
    device = Device(effect, slices=Slices(number, bits), **given)
    return program(nn.Sequential(layer), device, seed=seed)


@pytest.mark.parametrize(("number", "bits"), [(1, 3), (2, 2), (3, 2), (4, 1), (8, 3)])
def test_exact_devices_hold_the_rounded_weight(number, bits):
    layer = nn.Linear(40, 7)
    chip = on_chip(layer, Gain(1.0), number, bits)
    close(chip.model[0].weight, rounded(layer.weight.detach(), number * bits), rtol=0, atol=1e-6)
    assert chip.model[0].programmed.shape == (2, 7 * number, 40)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("periphery", [None, Periphery(), Periphery(rows=20, adc=Converter(24))])
def test_enough_digits_are_the_layer(name, periphery):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    chip = on_chip(layer, Gain(1.0), 4, 5, periphery=periphery)
    close(chip(x), layer(x), rtol=1e-4, atol=1e-4)


def test_each_digit_takes_the_whole_range_of_its_devices():
    layer = nn.Linear(200, 50)
    array = on_chip(layer, Gain(1.0), 3, 2, g_max=25.0).model[0]
    for s in range(3):
        of_slice = array.programmed[:, s * 50 : (s + 1) * 50]
        levels = of_slice.unique()
        close(levels, torch.tensor([0.0, 25 / 3, 50 / 3, 25.0]), rtol=1e-5, atol=1e-5)


def test_currents_of_each_slice_are_converted_by_themselves():
    layer, x = nn.Linear(16, 3, bias=False), torch.randn(5, 16)
    around = Periphery(adc=Converter(6))
    found = on_chip(layer, Gain(1.0), 2, 3, periphery=around)(x)
    array = on_chip(layer, Gain(1.0), 2, 3).model[0]
    g = array.programmed[0] - array.programmed[1]
    total = 0
    for share, part in zip(Slices(2, 3).shares, g.split(3), strict=True):
        current = x @ part.T
        step = current.abs().amax(1, keepdim=True) / 31
        total = total + share * (current / step).round().clamp(-31, 31) * step
    close(found, total * array.unit, rtol=1e-5, atol=1e-5)


def test_noise_of_the_first_digit_counts_most():
    layer = nn.Linear(64, 64)
    wanted = rounded(layer.weight.detach(), 4)
    errors = torch.stack(
        [on_chip(layer, Gaussian(0.05), 2, 2, seed=k).model[0].weight - wanted for k in range(20)]
    )
    one = 0.05 * float(layer.weight.detach().abs().max())
    shares = torch.tensor(Slices(2, 2).shares)
    assert float(errors.std()) == pytest.approx(one * float(shares.norm()), rel=0.03)


def test_reads_of_their_own_have_the_variance_of_all_slices():
    layer, x = nn.Linear(64, 8, bias=False), torch.randn(1, 64)
    device = Device(PCM(programming=0.0), slices=Slices(2, 2), periphery=Periphery(reads="each"))
    chip = program(nn.Sequential(layer), device, seed=0).age_(3600)
    found = torch.cat([chip(x) for _ in range(4000)])
    shared = Device(PCM(programming=0.0), slices=Slices(2, 2))
    other = program(nn.Sequential(layer), shared, seed=0).age_(3600)
    wanted = torch.cat([other(x) for _ in range(4000)])
    close(found.mean(0), wanted.mean(0), rtol=0, atol=float(5 * wanted.std(0).max() / 4000**0.5))
    close(found.std(0), wanted.std(0), rtol=0.06, atol=0)


def test_it_is_counted():
    layer, x = nn.Linear(12, 5), torch.randn(3, 12)
    plain = count(program(layer, Device(Gain(1.0)), seed=0), x)
    cut = count(program(layer, Device(Gain(1.0), slices=Slices(3, 2)), seed=0), x)
    assert (cut.devices, cut.tiles, cut.adc) == (3 * plain.devices, 3 * plain.tiles, 3 * plain.adc)
    assert (cut.dac, cut.analog) == (plain.dac, plain.analog)


def test_drift_is_compensated_and_layers_are_saved(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    x = torch.randn(2, 3, 4, 4)
    for per in ("layer", "column"):
        device = Device(PCM(), slices=Slices(2, 3))
        chip = program(net, device, seed=0).age_(1e7)
        faded = chip.model[2].weight.abs().mean()
        compensate_drift_(chip, per)
        assert chip.model[2].weight.abs().mean() > 1.1 * faded
        assert chip.model[0].compensation.shape == (8, 1)
    ek.save(chip, tmp_path / "chip.safetensors")
    again = ek.load(tmp_path / "chip.safetensors", model=net)
    close(again.rewind_()(x), chip.rewind_()(x), rtol=0, atol=0)


def test_many_chips_are_single_ones():
    net, x = nn.Linear(8, 3), torch.randn(5, 8)
    device = Device(PCM(), slices=Slices(2, 2))
    chips = program(net, device, seed=3, chips=2).age_(60)
    single = program(net, device, seed=4).age_(60)
    assert torch.equal(chips[1].rewind_()(x), single.rewind_()(x))


def test_a_device_tells_of_its_slices():
    device = Device(PCM(), slices=Slices(4, 2))
    assert device.name == "PCM, 4 slices of 2 bits"
    assert device.to_dict()["slices"] == {"number": 4, "bits": 2}
    assert "slices" not in Device(PCM()).to_dict()  # finished trials keep their identity


@pytest.mark.parametrize(("number", "bits"), [(0, 2), (2, 0), (5, 5), (2.0, 2), (-1, 2)])
def test_what_are_no_digits_is_refused(number, bits):
    with pytest.raises(ConfigError, match="24 bits in all"):
        Slices(number, bits)


def test_a_memory_has_none():
    memory = ek.memory.KeyValueMemory(16)
    for given in ({"slices": Slices(2, 2)}, {"periphery": Periphery(rows=4)}):
        with pytest.raises(ConfigError, match="A memory's crossbar"):
            memory.program(Device(PCM(), **given), seed=0)


@pytest.mark.parametrize("slices", [4, (4, 2)])
def test_slices_must_be_such(slices):
    with pytest.raises(ConfigError, match=r"Slices\(4, bits=2\)"):
        Device(PCM(), slices=slices)
