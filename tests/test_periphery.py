"""Converters, tiles, wires and reads around an array."""

import copy

import numpy as np
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
    calibrate_ranges_,
    program,
)
from evenkeel.cli import hardware
from evenkeel.draws import keyed_noise, read_key
from evenkeel.errors import CalibrationError, ConfigError
from evenkeel.quaternion import QuaternionConv2d, QuaternionLinear

close = torch.testing.assert_close

KINDS = {
    "linear": (lambda: nn.Linear(12, 5), (3, 12)),
    "tokens": (lambda: nn.Linear(12, 5, bias=False), (3, 4, 12)),
    "1d": (lambda: nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular"), (3, 6, 7)),
    "2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (3, 6, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (3, 6, 8, 8)),
    "up": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (3, 6, 4, 4)),
    "quaternion": (lambda: QuaternionConv2d(8, 4, 3), (3, 8, 5, 5)),
    "quaternion linear": (lambda: QuaternionLinear(8, 4), (3, 8)),
}


def on_chip(layer, effect, seed=0, **around):
    return program(nn.Sequential(layer), Device(effect, periphery=Periphery(**around)), seed=seed)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [None, 1, 20, 10_000])
def test_all_of_it_is_ideal_unless_asked_for(name, rows):
    make, shape = KINDS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    chip = on_chip(layer, Gain(1.0), rows=rows)
    close(chip(x), layer(x), rtol=1e-5, atol=1e-6)
    fine = on_chip(layer, Gain(1.0), rows=rows, dac=Converter(24), adc=Converter(24))
    close(fine(x), layer(x), rtol=1e-5, atol=1e-6)
    close(chip.model[0].weight, layer.weight, rtol=1e-5, atol=1e-6)


def test_a_sample_without_a_batch():
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(3, 6, 6)
    for around in ({}, {"dac": Converter(16), "adc": Converter(16)}):
        close(on_chip(layer, Gain(1.0), **around)(x), layer(x), rtol=1e-3, atol=1e-3)


def quantized(x, bits, limit):
    levels = 2 ** (bits - 1) - 1
    return np.clip(np.round(x / (limit / levels)), -levels, levels) * (limit / levels)


@pytest.mark.parametrize("bound", [None, 2.5])
def test_converters_and_tiles_by_hand(bound):
    layer, x = nn.Linear(10, 4), torch.randn(3, 10)
    chip = on_chip(layer, Gain(1.0), dac=Converter(5), adc=Converter(6, 0.9), rows=4, bound=bound)
    w, b = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    largest = np.abs(w).max()
    expected = []
    for sample in x.double().numpy():
        peak = np.abs(sample).max()
        driven = quantized(sample, 5, peak)
        total = 0.0
        for start in (0, 4, 8):
            y = w[:, start : start + 4] / largest @ driven[start : start + 4]
            total = total + quantized(y, 6, 0.9 * (bound * peak if bound else np.abs(y).max()))
        expected.append(total * largest + b)
    close(chip(x).double(), torch.from_numpy(np.stack(expected)), rtol=1e-4, atol=1e-4)


def test_serial_inputs_are_the_same_products():
    layer, x = nn.Conv2d(6, 4, 3), torch.randn(2, 6, 5, 5)
    for rows in (None, 20):
        parallel = on_chip(layer, Gain(1.0), dac=Converter(6), rows=rows)
        serial = on_chip(layer, Gain(1.0), dac=Converter(6), serial=True, rows=rows)
        close(serial(x), parallel(x), rtol=1e-4, atol=1e-5)


def test_serial_inputs_are_converted_bit_by_bit():
    layer, x = nn.Linear(10, 4, bias=False), torch.randn(3, 10)
    chip = on_chip(layer, Gain(1.0), dac=Converter(4), adc=Converter(5), serial=True)
    w = layer.weight.detach().double().numpy()
    for sample, found in zip(x.double().numpy(), chip(x).detach().double().numpy(), strict=True):
        step = np.abs(sample).max() / 7
        codes = np.clip(np.round(sample / step), -7, 7)
        total = 0.0
        for bit in range(3):
            y = w @ (np.sign(codes) * (np.abs(codes).astype(int) >> bit & 1))
            total = total + 2**bit * step * quantized(y, 5, np.abs(y).max())
        np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-5)


def test_a_convolutions_tiles_hold_whole_channels():
    layer, x = nn.Conv2d(6, 4, 3), torch.randn(2, 6, 5, 5)
    chip = on_chip(layer, Gain(1.0), adc=Converter(4), rows=20)  # two channels of nine each
    largest = layer.weight.detach().abs().max()
    total = 0
    for c in (0, 2, 4):
        y = nn.functional.conv2d(x[:, c : c + 2], layer.weight.detach()[:, c : c + 2] / largest)
        peak = y.flatten(1).abs().amax(1).view(-1, 1, 1, 1) / 7
        total = total + (y / peak).round() * peak
    close(chip(x), total * largest + layer.bias.view(-1, 1, 1), rtol=1e-3, atol=1e-3)


# ---- reads of their own


def test_each_product_has_noise_of_its_own_as_devices_read_one_by_one_give():
    """Against the loop over products that it stands for."""
    layer, times = nn.Linear(40, 3, bias=False), 4000
    x = torch.randn(1, 40)
    each = on_chip(layer, PCM(), reads="each").age_(3600.0)
    shared = on_chip(layer, PCM()).age_(3600.0)
    with torch.no_grad():
        ours = each(x.expand(times, -1)).double()  # one call: every row reads anew
        loop = torch.cat([shared(x) for _ in range(times)]).double()
    error = loop.std(0) / times**0.5
    assert (((ours.mean(0) - loop.mean(0)) / error).abs() < 5).all()
    close(ours.std(0), loop.std(0), rtol=0.06, atol=0)
    skew = ((ours - ours.mean(0)) / ours.std(0)).pow(3).mean(0)
    assert (skew.abs() < 0.2).all()
    follows = torch.corrcoef(torch.stack([ours[:-1, 0], ours[1:, 0]]))[0, 1]
    assert abs(float(follows)) < 0.06


def test_a_shared_read_is_the_same_for_all_samples():
    chip = on_chip(nn.Linear(8, 3), PCM()).age_(60.0)
    y = chip(torch.ones(5, 8))
    close(y, y[:1].expand(5, -1))
    assert not torch.allclose(y, chip(torch.ones(5, 8)))


def test_exact_reads_have_no_noise():
    chip = on_chip(nn.Linear(8, 3), Gaussian(0.1), reads="each")
    x = torch.randn(2, 8)
    assert torch.equal(chip(x), chip(x))


def test_rewound_reads_repeat():
    chip, x = on_chip(nn.Conv2d(3, 4, 3), PCM(), reads="each").age_(60.0), torch.randn(2, 3, 6, 6)
    first, second = chip.rewind_("a")(x), chip(x)
    assert torch.equal(first, chip.rewind_("a")(x))
    assert not torch.equal(first, second)
    assert not torch.equal(first, chip.rewind_("b")(x))


def test_output_noise_is_in_products_of_the_largest():
    layer = nn.Linear(6, 2, bias=False)
    x = torch.rand(20_000, 6) + 0.1
    chip = on_chip(layer, Gain(1.0), output_noise=0.05)
    largest = layer.weight.detach().abs().max()
    off = (chip(x) - layer(x)).detach() / (x.amax(1, keepdim=True) * largest)
    assert float(off.std()) == pytest.approx(0.05, rel=0.02)
    assert abs(float(off.mean())) < 0.002


def test_noise_by_key():
    like, key, count = torch.empty(300_001), read_key(1, "a", "read"), torch.tensor(0)
    z = keyed_noise(like, key, count).double()
    assert torch.equal(z, keyed_noise(like, key, count).double())
    assert not torch.equal(z, keyed_noise(like, key, count + 1).double())
    moments = [z.pow(k).mean().item() for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.03)
    assert (z.abs() < 1.959964).double().mean().item() == pytest.approx(0.95, abs=0.002)
    assert float(z.abs().max()) > 4
    assert abs(torch.corrcoef(torch.stack([z[:150_000], z[150_001:300_001]]))[0, 1]) < 0.01
    assert keyed_noise(torch.empty(3, 1, dtype=torch.bfloat16), key, count).dtype == torch.bfloat16
    assert keyed_noise(torch.empty(0, 4), key, count).shape == (0, 4)


# ---- wires


def test_the_drop_by_hand():
    layer, x, ohm = nn.Linear(7, 3, bias=False), torch.randn(2, 7), 200.0
    chip = on_chip(layer, PCM(programming=0, drifting=0, reading=0), wire_ohm=ohm)
    w = layer.weight.detach().double().numpy()
    largest, n = np.abs(w).max(), 7
    g = w / largest
    for sample, y in zip(x.double().numpy(), chip(x).detach().double().numpy(), strict=True):
        peak = np.abs(sample).max()
        for i in range(3):
            a = n * ohm * 25e-6 * sum(abs(g[i, j]) * abs(sample[j]) / peak for j in range(n))
            c = a * (0.05 * a * a - 0.2 * a + 0.5)
            drop = c * sum(g[i, j] * sample[j] * (1 - (1 - j / n) ** 2) for j in range(n))
            assert y[i] == pytest.approx((g[i] @ sample - drop) * largest, rel=1e-4, abs=1e-6)


def test_smaller_tiles_drop_less():
    layer, x = nn.Linear(256, 4, bias=False), torch.rand(8, 256)
    exact = PCM(programming=0, drifting=0, reading=0)
    off = [
        (on_chip(layer, exact, wire_ohm=0.35, rows=rows)(x) - layer(x)).abs().mean().item()
        for rows in (16, 64, 256)
    ]
    assert off == sorted(off)
    assert off[0] < 0.2 * off[2]


# ---- calibrated ranges


def test_ranges_are_quantiles_and_clip():
    layer, x = nn.Linear(32, 4), torch.randn(500, 32)
    chip = on_chip(layer, Gain(1.0), dac=Converter(8), adc=Converter(8))
    ((found,),) = (calibrate_ranges_(chip, [x[:250], (x[250:],)], quantile=0.95).values(),)
    assert found[0] == pytest.approx(x.abs().flatten().quantile(0.95).item(), rel=0.03)
    beyond = 100 * x[:1]
    ceiling = layer.weight.abs().max() * found[1] + layer.bias.abs().max()
    assert (chip(beyond).abs() <= ceiling).all()
    inside = x[(x.abs() < found[0]).all(1)][:20]
    close(chip(inside), layer(inside), rtol=0, atol=0.1)
    twin = on_chip(layer, Gain(1.0), dac=Converter(8), adc=Converter(8))
    twin.load_state_dict(chip.state_dict())  # ranges are part of the chip
    assert torch.equal(twin(x), chip(x))


def test_what_fails_leaves_the_ranges():
    chip = on_chip(nn.Linear(4, 2), Gain(1.0), dac=Converter(8))
    calibrate_ranges_(chip, [torch.randn(9, 4)])
    before = chip.model[0].ranges.clone()
    with pytest.raises(CalibrationError, match="nothing but zeros"):
        calibrate_ranges_(chip, [torch.zeros(2, 4)])
    with pytest.raises(RuntimeError):
        calibrate_ranges_(chip, [torch.zeros(2, 5)])
    assert torch.equal(chip.model[0].ranges, before)
    assert chip.model[0].watch is None


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (lambda: Periphery(reads="some"), "Unknown reads"),
        (lambda: Periphery(rows=0), "1 or more; got 0"),
        (lambda: Periphery(serial=True), "bits of a dac"),
        (lambda: Periphery(rows=2.5), "whole number"),
        (lambda: Device(PCM(), periphery=Converter(8)), "must be a Periphery"),
        (lambda: Periphery(bound=0.0), "bound must be above 0"),
        (lambda: Periphery(wire_ohm=-1.0), "wire_ohm must be 0"),
        (lambda: Periphery(output_noise=float("nan")), "output_noise must be 0"),
        (lambda: calibrate_ranges_(program(nn.Linear(2, 2), PCM(), seed=0), []), "no periphery"),
        (lambda: calibrate_ranges_(on_chip(nn.Linear(2, 2), PCM()), [], quantile=0), "quantile"),
    ],
)
def test_bad_input_is_refused(action, says):
    with pytest.raises(ConfigError, match=says):
        action()


# ---- a citizen

EVERYTHING = {
    "dac": Converter(8), "adc": Converter(8), "rows": 20, "reads": "each", "output_noise": 0.01,
    "wire_ohm": 0.35,
}  # fmt: skip


@pytest.fixture
def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    ).eval()


def test_it_is_saved_and_loaded_with_the_chip(net, tmp_path):
    device = Device(PCM(), periphery=Periphery(**EVERYTHING))
    chip, x = program(net, device, seed=3).age_(60.0), torch.randn(2, 3, 6, 6)
    calibrate_ranges_(chip, [x])
    ek.save(chip, tmp_path / "chip.safetensors")
    again = ek.load(tmp_path / "chip.safetensors", model=net)
    assert again.device.to_dict() == device.to_dict()
    assert torch.equal(again.rewind_("x")(x), chip.rewind_("x")(x))


def test_copies_and_compiled_ones_are_the_same_chip(net):
    chip = program(net, Device(PCM(), periphery=Periphery(**EVERYTHING)), seed=0)
    x, state = torch.randn(2, 3, 6, 6), torch.get_rng_state()
    with torch.no_grad():
        expected = chip.rewind_("x")(x)
        assert torch.equal(copy.deepcopy(chip).rewind_("x")(x), expected)
        torch.compiler.reset()
        compiled = torch.compile(chip.rewind_("x"), backend="aot_eager", fullgraph=True)
        close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_name_tells_what_is_not_ideal():
    device = Device(PCM(), periphery=Periphery(**EVERYTHING))
    assert device.name == (
        "PCM, 8-bit DAC, 8-bit ADC, 20 rows, reads of their own, output noise 0.01, 0.35 ohm"
    )
    assert Device(PCM(), periphery=Periphery()).name == "PCM"


def test_gradients_pass_where_nothing_is_clipped(net):
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    chip = program(net, Device(Gain(1.0), periphery=Periphery(**EVERYTHING)), seed=0)
    chip(x).square().sum().backward()
    digital = x.detach().clone().requires_grad_()
    net(digital).square().sum().backward()
    cosine = nn.functional.cosine_similarity(x.grad.flatten(), digital.grad.flatten(), 0)
    assert cosine > 0.9


def test_an_audit_with_converters(net):
    x = torch.randn(80, 3, 6, 6)
    data = [(part, net(part).argmax(1)) for part in x.split(10)]
    coarse, fine = (
        Device(Gain(1.0), periphery=Periphery(dac=Converter(b), adc=Converter(b))) for b in (2, 12)
    )
    result = ek.audit(
        net, data, devices=[coarse, fine], remedies=["none"], chips=1, workers=0, store=":memory:"
    )
    low, high = result.cells
    assert low.mean < high.mean - 10
    assert high.mean > 95


def test_it_is_exported_for_any_batch_with_its_noise(net):
    chip = program(net, Device(PCM(), periphery=Periphery(**EVERYTHING)), seed=0).age_(60.0)
    x = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        wanted = chip.rewind_("x")(x)
        chip.rewind_("x")
        batch = {"args": ({0: torch.export.Dim("n", min=2)},)}
        exported = torch.export.export(chip, (x,), dynamic_shapes=batch).module()
        close(exported(x), wanted)
        assert exported(x[:2]).shape == (2, 5)
        assert not torch.equal(exported(x), exported(x))


@pytest.mark.parametrize("around", [EVERYTHING, {"dac": Converter(17), "adc": Converter(17)}])
def test_half_precision_has_room(around):
    chip = program(nn.Linear(8192, 3), Device(PCM(), periphery=Periphery(**around)), seed=0)
    x = torch.rand(3, 8192)
    x[1] = 0
    wanted, found = chip.rewind_("x")(x), chip.half().rewind_("x")(x.half())
    assert found.dtype == torch.float16
    close(found.float(), wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


def test_inputs_that_are_no_numbers_give_no_range():
    chip = on_chip(nn.Linear(4, 3), Gain(1.0), adc=Converter(8))
    x = torch.rand(5, 4)
    for bad in (torch.inf, torch.nan):
        x[0, 0] = bad
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            calibrate_ranges_(chip, [x])
    silent = nn.Linear(4, 3)
    nn.init.zeros_(silent.weight)
    assert calibrate_ranges_(on_chip(silent, Gain(1.0), adc=Converter(8)), [torch.rand(5, 4)])
    chips = program(silent, Device(Gain(1.0), periphery=Periphery()), seed=0, chips=2)
    with pytest.raises(ConfigError, match=r"take chips\[k\]"):
        calibrate_ranges_(chips, [])


def test_what_is_asked_for_is_added_to_a_devices_own(monkeypatch):
    own = Device(PCM(), scale_per="column", periphery=Periphery(rows=4, output_noise=0.1))
    monkeypatch.setattr(hardware, "resolve", lambda kind, name: own)
    (found,) = hardware.Around(dac=8, slices="3x2").devices(["mine"])
    assert found.periphery == Periphery(dac=Converter(8), rows=4, output_noise=0.1)
    assert found.slices == Slices(3, bits=2)
    assert (found.scale_per, own.periphery.dac, own.slices) == ("column", None, None)
    assert hardware.Around().devices(["mine"]) == ["mine"]
    (silent,) = hardware.Around(output_noise=0.0).devices(["mine"])
    assert silent.periphery == Periphery(rows=4)


def test_everything_around_an_array_can_be_asked_for_by_command():
    around = hardware.Around(
        dac=6, serial=True, adc=7, rows=9, own_reads=True, output_noise=0.01, wire_ohm=0.3
    )
    (found,) = around.devices(["pcm"])
    assert found.periphery == Periphery(
        dac=Converter(6), serial=True, adc=Converter(7), rows=9, reads="each", output_noise=0.01,
        wire_ohm=0.3,
    )  # fmt: skip
    assert found.slices is None
    assert hardware.Around(slices="4x2").devices(["pcm"])[0].periphery is None


@pytest.mark.parametrize("converter", ["dac", "adc"])
def test_converters_of_no_bits_are_not_ideal_ones(converter):
    with pytest.raises(ConfigError, match="2 to 32 bits; got 0"):
        hardware.Around(**{converter: 0}).devices(["pcm"])


@pytest.mark.parametrize("slices", ["4", "4b2", "x2", "4x", "4x2x1", "-1x2", "1.5x2"])
def test_slices_are_a_number_times_bits(slices):
    with pytest.raises(ConfigError, match="such as 4x2"):
        hardware.Around(slices=slices).devices(["pcm"])


@pytest.mark.parametrize("bits", [8, 16, 26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_serial_inputs_keep_the_largest(bits, dtype):
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(320, 32)
    chip = on_chip(layer, Gain(1.0), dac=Converter(bits), serial=True)
    y = layer(x).detach()
    error = (chip(x.to(dtype)).detach().float() - y).abs().amax(1) / y.abs().max()
    assert float(error.max()) < (0.02 if dtype == torch.float32 else 0.05)
