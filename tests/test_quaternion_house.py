"""Quaternion layers in the house: on chips, balanced, timed."""

import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel.analog import PCM, Gain, program
from evenkeel.bench import quaternion as bench
from evenkeel.bench import timing
from evenkeel.graph import find_scales
from evenkeel.layers import weight_layer
from evenkeel.quaternion import (
    QuaternionBatchNorm,
    QuaternionConv1d,
    QuaternionConv2d,
    QuaternionConv3d,
    QuaternionConvTranspose1d,
    QuaternionConvTranspose2d,
    QuaternionLinear,
)

close = torch.testing.assert_close


# ---- on a chip

ON_CHIP = {
    "linear": (lambda: QuaternionLinear(16, 8), (3, 16)),
    "fast": (lambda: QuaternionLinear(16, 8, algorithm="fast"), (3, 16)),
    "1d": (
        lambda: QuaternionConv1d(16, 8, 3, groups=2, padding_mode="circular", padding=1),
        (2, 16, 6),
    ),
    "2d": (lambda: QuaternionConv2d(16, 8, 3, stride=2, padding="valid"), (2, 16, 6, 6)),
    "groups": (lambda: QuaternionConv2d(16, 8, 3, groups=2, algorithm="fast"), (2, 16, 6, 6)),
    "3d": (lambda: QuaternionConv3d(16, 8, 2, groups=2, bias=False), (2, 16, 3, 3, 3)),
    "up": (
        lambda: QuaternionConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1),
        (2, 16, 4, 4),
    ),
    "up, groups": (
        lambda: QuaternionConvTranspose1d(16, 8, 3, groups=2, adjoint=False, bias=False),
        (2, 16, 5),
    ),
}


@pytest.mark.parametrize("name", ON_CHIP)
def test_a_faultless_chip_is_the_layer(name):
    make, shape = ON_CHIP[name]
    layer, x = make(), torch.randn(shape)
    chip = program(nn.Sequential(layer), Gain(1.0), seed=0)
    assert chip.digital == {}
    close(chip(x), layer(x))
    close(chip.model[0].weight, layer.weight)
    shown = weight_layer(layer)
    assert shown.matrix(layer).shape == (8, layer.weight.numel() // 2)
    close(shown.weight(layer, shown.matrix(layer)), layer.weight)


@pytest.mark.parametrize("name", ON_CHIP)
def test_on_devices_the_four_copies_of_a_number_are_no_longer_alike(name):
    make, shape = ON_CHIP[name]
    layer, x = make(), torch.randn(shape)
    chip = program(nn.Sequential(layer), PCM(), seed=0)
    assert chip.digital == {}
    y = chip.age_(3600.0)(x)
    assert 0 < (y - layer(x)).norm() < 0.5 * layer(x).norm()
    read, shown = chip.model[0].read(), weight_layer(layer)
    layer.weight = nn.Parameter(shown.weight(layer, read))
    assert not torch.allclose(shown.matrix(layer), read, rtol=0.01)


# ---- balanced


def uneven(*layers):
    """Of scales that are far apart from channel to channel."""
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("weight") and p.dim() > 1:
                p.mul_(torch.logspace(-1, 1, p.shape[1]).view(-1, *[1] * (p.dim() - 2)))
    return net.eval()


BALANCED = {
    "linear": (
        lambda: uneven(
            QuaternionLinear(8, 16), nn.ReLU(), QuaternionLinear(16, 8, algorithm="fast"),
            nn.ReLU(), QuaternionLinear(8, 4),
        ),
        (3, 8),
        [4, 2, 0],
    ),
    "convolutions": (
        lambda: uneven(
            QuaternionConv2d(4, 8, 3, padding=1), nn.ReLU(), QuaternionConv2d(8, 16, 3),
            nn.ReLU(), QuaternionConvTranspose2d(16, 8, 3, bias=False), nn.ReLU(),
            QuaternionConv2d(8, 4, 1),
        ),
        (2, 4, 8, 8),
        [2, 4, 2, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BALANCED)
def test_each_quaternion_has_one_scale(name):
    make, shape, free = BALANCED[name]
    net, x = make(), torch.randn(shape)
    y, before = net(x).detach(), {k: v.clone() for k, v in net.state_dict().items()}
    certificate = ek.balance_(net, x)
    assert [layer.free for layer in certificate.coverage] == free
    assert certificate.objective_after < 0.95 * certificate.objective_before
    assert not certificate.unknown
    close(net(x), y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    for path, factors in certificate.scales.items():
        layer = net.get_submodule(path.removesuffix(".weight"))
        assert len(factors) * 4 == getattr(layer, "out_features", getattr(layer, "out_channels", 0))
    certificate.undo()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_mixes_parts_stays_as_it_is():
    """One part after the other cannot be scaled, as the product mixes them."""
    layer = QuaternionLinear(8, 8)
    x = torch.randn(3, 8)
    scaled = layer(x * torch.tensor([2.0, 2, 1, 1, 1, 1, 1, 1]))
    assert not any(torch.allclose(scaled, layer(x) * s) for s in (1.0, 2.0, 0.5))
    net = nn.Sequential(QuaternionLinear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    (first, _) = find_scales(net, torch.randn(3, 4)).coverage
    assert first.free == 2  # eight real outputs, tied in fours


@pytest.mark.parametrize(
    "layer",
    [
        lambda: QuaternionConv2d(8, 8, 1, groups=2),
        lambda: QuaternionConvTranspose2d(8, 8, 1, adjoint=False),
    ],
    ids=["groups", "not adjoint"],
)
def test_weights_that_are_computed_in_other_ways_are_pinned(layer):
    net = nn.Sequential(
        layer(), nn.ReLU(), QuaternionConv2d(8, 8, 1), nn.ReLU(), QuaternionConv2d(8, 4, 1)
    )
    x = torch.randn(2, 8, 4, 4)
    y = net.eval()(x)
    certificate = ek.balance_(net, x)
    assert [c.layer for c in certificate.coverage if c.free] == ["2.weight"]
    close(net(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["whitening", "variance"])
def test_with_batch_norm_the_function_stays(kind):
    net = nn.Sequential(
        QuaternionConv2d(4, 8, 3, bias=False), QuaternionBatchNorm(8, kind=kind), nn.ReLU(),
        QuaternionConv2d(8, 8, 3), nn.ReLU(), QuaternionConv2d(8, 4, 1),
    ).eval()  # fmt: skip
    x = torch.randn(2, 4, 8, 8)
    y = net(x)
    ek.balance_(net, x)
    close(net(x), y, rtol=1e-4, atol=1e-5)


def test_a_capture_leaves_no_trace():
    layer, x = QuaternionLinear(8, 8, algorithm="fast").eval(), torch.randn(2, 8)
    find_scales(nn.Sequential(layer, nn.ReLU(), QuaternionLinear(8, 4)), x)
    assert layer.is_fast(1)
    names = {str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes}
    assert not any("quaternion" in name for name in names)


# ---- timed


@pytest.mark.parametrize("way", bench.WAYS)
def test_the_bench_times_every_form(way, monkeypatch):
    monkeypatch.setattr(timing, "BLOCK_S", 1e-3)
    monkeypatch.setattr(bench, "SIZE", 4)
    rows = [row for row in bench.bench(channels=(8,), rounds=1) if row["way"] == way]
    names = ["assembled", "dense", "fast", "auto", "real"]
    assert [(row["kernel"], row["layer"]) for row in rows] == [
        (k, n) for k in (1, 3) for n in names
    ]
    assert rows[0]["ratio"] == 1
    assert all(row["median_ms"] > 0 for row in rows)
    assert [row["parameters"] for row in rows[:5]] == [24, 24, 24, 24, 72]


def test_what_is_compared_with_is_the_same_convolution():
    named = bench.layers(8, 3)
    for name in ("dense", "fast", "auto"):
        named[name].load_state_dict(named["assembled"].state_dict())
    x = torch.randn(2, 8, 5, 5)
    for name in ("dense", "fast", "auto"):
        close(named[name](x), named["assembled"](x))
