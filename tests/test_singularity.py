"""How close units are to elimination: the measure, what it sees, and the commands around it."""

import contextlib
import functools
import itertools
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import evenkeel as ek
from evenkeel.bench import norm as bench_norm
from evenkeel.bench import timing
from evenkeel.cli import main
from evenkeel.errors import ConfigError
from evenkeel.norm import BatchChannelNorm2d, NoiseAwareBatchNorm2d, NormAct, singularity


def reference(z: torch.Tensor, weight, bias) -> dict[str, float]:
    """The figures of a layer that gives ``weight * z + bias``, of z with channels on axis 1."""
    z = z.detach().double().transpose(0, 1).flatten(1)  # (C, everything else)
    y = weight.detach().double()[:, None] * z + bias.detach().double()[:, None]
    on = (y > 0).double().mean(1)
    return {
        "dead": float((on < 0.01).double().mean()),
        "mean_distance": float(z.mean(1).abs().mean()),
        "std_distance": float((z.std(1, correction=0) - 1).abs().mean()),
        "margin": float((y.mean(1) / y.std(1, correction=0)).min()),
    }


MEASURES = ("dead", "mean_distance", "std_distance", "margin")


def figures(row) -> dict[str, float]:
    return {name: getattr(row, name) for name in MEASURES}


def images(count: int = 64, channels: int = 8) -> torch.Tensor:
    """Channels of various means and sizes."""
    size, mean = torch.rand(channels, 1, 1) + 0.5, torch.randn(channels, 1, 1)
    return mean + size * torch.randn(count, channels, 6, 6)


def random_(norm: nn.Module) -> nn.Module:
    """Affine parameters of both signs, and statistics, that are not the ones it starts with."""
    with torch.no_grad():
        for name, value in norm.state_dict().items():
            if name == "running_var":
                value.uniform_(0.5, 2)
            elif name != "num_batches_tracked":
                value.normal_()
    return norm


# ---- the measure


@functools.cache
def toy() -> torch.Tensor:
    """Channels of scale exp(N(0, 1)) and mean 2 N(0, 1).

    A draw of 32 channels whose figures are those of the specification; they vary by a tenth or so.
    """
    torch.manual_seed(113)
    scale, mean = torch.randn(32, 1, 1).exp(), 2 * torch.randn(32, 1, 1)
    return mean + scale * torch.randn(64, 32, 8, 8)


def seen_behind(norm: nn.Module) -> ek.norm.Singularity:
    norm(toy())  # running statistics are this batch's
    return singularity(nn.Sequential(norm, nn.ReLU()), [toy()])


def test_behind_group_norm_channels_are_far_off_and_some_are_dead():
    found = seen_behind(nn.GroupNorm(4, 32))
    (row,) = found.rows
    assert row.mean_distance == pytest.approx(0.70, abs=0.03)
    assert row.std_distance == pytest.approx(0.59, abs=0.03)
    assert row.dead == found.dead == 5 / 32
    assert row.margin < -2.3
    groups = toy().double().reshape(64, 4, -1)
    away = groups - groups.mean(2, keepdim=True)
    z = (away / (away.square().mean(2, keepdim=True) + 1e-5).sqrt()).view(64, 32, 8, 8)
    expected = reference(z, torch.ones(32), torch.zeros(32))
    assert figures(row) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(32, momentum=None),
        BatchChannelNorm2d(32, 4, momentum=None),
        BatchChannelNorm2d(32, 4, statistics="running", update_rate=1.0),
    ],
    ids=str,
)
def test_behind_batch_norm_and_batch_channel_norm_none_is(norm):
    for _ in range(2):  # the first estimate of variances is about means of zero
        found = seen_behind(norm)
    (row,) = found.rows
    assert (row.mean_distance, row.std_distance) == pytest.approx((0, 0), abs=2e-3)
    assert row.dead == found.dead == 0
    assert row.margin == pytest.approx(0, abs=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_network_against_the_plain_computation(dtype):
    net = nn.Sequential(
        nn.Conv2d(8, 12, 3), random_(nn.GroupNorm(3, 12)), nn.ReLU(),
        nn.Conv2d(12, 8, 3), random_(nn.BatchNorm2d(8)), nn.Tanh(),
        random_(nn.InstanceNorm2d(8, affine=True, eps=0.1)), nn.ReLU(),
    ).to(dtype)  # fmt: skip
    x = images(100).to(dtype)
    found = singularity(net, [x])
    assert [(r.layer, r.kind, r.relu, r.channels) for r in found.rows] == [
        ("1", "GroupNorm", True, 12),
        ("4", "BatchNorm2d", False, 8),
        ("6", "InstanceNorm2d", True, 8),
    ]  # fmt: skip
    net = net.double().eval()
    a = net[0](x.double())
    first = F.group_norm(a, 3)
    b = net[:4](x.double())
    mean, var = (t[:, None, None] for t in (net[4].running_mean, net[4].running_var))
    second = (b - mean) / (var + 1e-5).sqrt()
    third = F.instance_norm(net[:6](x.double()), eps=0.1)
    for row, layer, z in zip(
        found.rows, (net[1], net[4], net[6]), (first, second, third), strict=True
    ):
        expected = reference(z, layer.weight, layer.bias)
        assert figures(row) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    dead = (12 * found.rows[0].dead + 8 * found.rows[2].dead) / 20
    assert found.dead == pytest.approx(dead)
    assert found.samples == 100


@pytest.mark.parametrize("affine", ["group", "channel"])
def test_of_batch_channel_norm_the_distance_is_that_of_its_batch_part(affine):
    layer = BatchChannelNorm2d(8, 2, affine=affine).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    x = torch.randn(200, 8, 4, 4) * torch.rand(8, 1, 1) + torch.randn(8, 1, 1)
    row = singularity(nn.Sequential(layer), [x[:120], x[120:]]).rows[0]
    flat = x.double().transpose(0, 1).flatten(1)
    scale = (layer.running_var.double() + layer.eps).sqrt()
    means = (flat.mean(1) - layer.running_mean.double()) / scale
    assert row.mean_distance == pytest.approx(float(means.abs().mean()), rel=1e-5)
    spread = flat.std(1, correction=0) / scale
    assert row.std_distance == pytest.approx(float((spread - 1).abs().mean()), rel=1e-5)


@pytest.mark.parametrize(("positive", "dead"), [(0, 1), (3, 1), (4, 0), (200, 0)])
def test_dead_is_below_one_percent_of_samples_and_positions(positive, dead):
    channel = -torch.ones(400)
    channel[0] = 0  # as good as off
    channel[1 : 1 + positive] = 1
    x = torch.stack([channel.view(100, 4), torch.ones(100, 4)], 1)
    (row,) = singularity(nn.ReLU(), [x]).rows
    assert row.dead == dead / 2
    assert row.channels == 2


def test_layer_norm_of_tokens_has_its_channels_last():
    norm, x = random_(nn.LayerNorm(8)), torch.randn(30, 7, 8) * torch.rand(8) + torch.randn(8)
    (row,) = singularity(nn.Sequential(norm, nn.ReLU()), [x]).rows
    expected = reference(F.layer_norm(x, [8]).transpose(1, 2), norm.weight, norm.bias)
    assert figures(row) == pytest.approx(expected, rel=1e-4)
    assert (row.channels, row.relu) == (8, True)


def test_layer_norm_of_vectors():
    norm, x = random_(nn.LayerNorm(8)), torch.randn(30, 8) * torch.rand(8) + torch.randn(8)
    (row,) = singularity(nn.Sequential(norm, nn.ReLU()), [x]).rows
    assert figures(row) == pytest.approx(reference(F.layer_norm(x, [8]), norm.weight, norm.bias))


class LayerNorm2d(nn.LayerNorm):
    """In the manner of timm's and torchvision's: of images, with channels on axis 1."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_layer_norm_of_images_in_the_manner_of_timm_has_its_channels_on_axis_1():
    norm, x = random_(LayerNorm2d(8)), images()
    (row,) = singularity(nn.Sequential(norm, nn.ReLU()), [x]).rows
    z = F.layer_norm(x.movedim(1, -1), [8]).movedim(-1, 1)
    assert figures(row) == pytest.approx(reference(z, norm.weight, norm.bias), rel=1e-4)
    assert row.channels == 8


def test_layer_norm_over_whole_images_is_seen():
    norm, x = nn.LayerNorm([8, 6, 6]), images()
    (row,) = singularity(nn.Sequential(norm, nn.ReLU()), [x]).rows
    z = F.layer_norm(x, [8, 6, 6])
    assert figures(row) == pytest.approx(reference(z, torch.ones(8), torch.zeros(8)), rel=1e-4)


def test_rms_norm_of_tokens_has_its_channels_last():
    norm, x = nn.RMSNorm(8), torch.randn(30, 7, 8) + torch.randn(8)
    (row,) = singularity(nn.Sequential(norm, nn.ReLU()), [x]).rows
    z = F.rms_norm(x, [8], eps=torch.finfo(torch.float32).eps).transpose(1, 2)
    assert figures(row) == pytest.approx(reference(z, torch.ones(8), torch.zeros(8)), rel=1e-4)


def test_channels_whose_gain_is_zero_do_not_count_in_distances():
    norm, x = nn.GroupNorm(2, 8), images()
    whole = F.group_norm(x, 2)
    with torch.no_grad():
        norm.weight[0] = norm.weight[5] = 0
    (row,) = singularity(nn.Sequential(norm, nn.ReLU()), [x]).rows
    left = [1, 2, 3, 4, 6, 7]
    expected = reference(whole[:, left], torch.ones(6), torch.zeros(6))
    for name in ("mean_distance", "std_distance"):
        assert getattr(row, name) == pytest.approx(expected[name], rel=1e-4)
    assert row.dead >= 2 / 8


def test_a_layer_whose_gains_are_all_zero_has_no_distances():
    """As the last one of a residual branch has at the start, in timm's networks."""
    norm = nn.BatchNorm2d(8)
    nn.init.zeros_(norm.weight)
    found = singularity(nn.Sequential(norm), [images()])
    assert (found.rows[0].mean_distance, found.rows[0].std_distance) == (None, None)
    json.dumps(found.to_dict(), allow_nan=False)


def test_without_affine_parameters():
    x = images()
    (row,) = singularity(nn.Sequential(nn.GroupNorm(2, 8, affine=False)), [x]).rows
    expected = reference(F.group_norm(x, 2), torch.ones(8), torch.zeros(8))
    assert figures(row) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sizes", [[64], [1, 63], [20, 20, 20, 4]])
def test_several_batches_are_as_one(sizes):
    net, x = nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU()), images()
    whole, parts = singularity(net, [x]), singularity(net, iter(x.split(sizes)))
    assert parts.samples == 64
    for row, part in zip(whole.rows, parts.rows, strict=True):
        assert (part.layer, part.relu, part.dead) == (row.layer, row.relu, row.dead)
        assert part.margin == pytest.approx(row.margin, rel=1e-5)
    assert figures(parts.rows[0]) == pytest.approx(figures(whole.rows[0]), rel=1e-5)


def test_a_layer_that_is_run_twice_is_one_row_over_both_runs():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 8)

        def forward(self, x):
            return self.norm(x).relu() + self.norm(x[:10] + 1).relu().sum()

    x = images()
    found = singularity(Again(), [x])
    z = torch.cat([F.group_norm(x, 2), F.group_norm(x[:10] + 1, 2)])
    expected = reference(z, torch.ones(8), torch.zeros(8))
    assert [row.layer for row in found.rows] == ["norm"]
    assert figures(found.rows[0]) == pytest.approx(expected, rel=1e-4)


# ---- which units are before a ReLU


class Branch(nn.Module):
    """A normalizer, and something behind it."""

    def __init__(self, behind):
        super().__init__()
        self.norm = random_(nn.GroupNorm(2, 8))
        self.behind = behind

    def forward(self, x):
        return self.behind(self.norm(x), x)


def added_in_place(y, x):
    y += x
    return F.relu(y)


def scaled_in_place(y, x):
    return y.mul_(-1).relu()


FED_BY_THE_NORMALIZER = {
    "functional": lambda y, x: F.relu(y),
    "torch.relu": lambda y, x: torch.relu(y),
    "a method": lambda y, x: y.relu(),
    "functional, in place": lambda y, x: F.relu(y, inplace=True),
    "a method in place": lambda y, x: y.relu_(),
    "behind a dropout": lambda y, x: F.relu(F.dropout(y, training=False)),
    "leaky": lambda y, x: F.leaky_relu(y, 0.2),
    "leaky, in place": lambda y, x: F.leaky_relu(y, 0.2, inplace=True),
    "relu6": lambda y, x: F.relu6(y),
    "and a sum elsewhere": lambda y, x: (y + x) + y.relu(),
}
FED_BY_SOMETHING_ELSE = {
    "a sum": lambda y, x: F.relu(y + x),
    "a sum, in place": lambda y, x: F.relu_(y + x),
    "a pool": lambda y, x: F.relu(F.max_pool2d(y, 2)),
    "the input": lambda y, x: y.sigmoid() * x.relu(),
    "a sum in place": added_in_place,
    "a product in place": scaled_in_place,
}
NO_RELU = {
    "nothing": lambda y, x: y,
    "silu": lambda y, x: F.silu(y),
    "gelu": lambda y, x: F.gelu(y),
    "hard swish": lambda y, x: F.hardswish(y),
    "sigmoid": lambda y, x: y.sigmoid(),
}


@pytest.mark.parametrize("case", FED_BY_THE_NORMALIZER)
def test_a_relu_that_takes_the_normalizers_output(case):
    net, x = Branch(FED_BY_THE_NORMALIZER[case]), images()
    found = singularity(net, [x])
    assert [(row.layer, row.relu) for row in found.rows] == [("norm", True)]
    expected = reference(F.group_norm(x, 2), net.norm.weight, net.norm.bias)
    assert figures(found.rows[0]) == pytest.approx(expected, rel=1e-4)
    assert found.dead == found.rows[0].dead


@pytest.mark.parametrize("case", FED_BY_SOMETHING_ELSE)
def test_a_relu_that_takes_something_else(case):
    net, x = Branch(FED_BY_SOMETHING_ELSE[case]), images()
    found = singularity(net, [x])
    (norm,) = (row for row in found.rows if row.layer == "norm")
    (other,) = (row for row in found.rows if row is not norm)
    assert not norm.relu
    assert (other.layer, other.kind, other.relu) == ("Branch (relu 1)", "relu", True)
    assert other.mean_distance is other.std_distance is None
    assert found.dead == other.dead
    given = {"the input": x, "a pool": F.max_pool2d(net.norm(x), 2)}
    given["a product in place"] = -net.norm(x)
    fed = given.get(case, net.norm(x) + x)
    expected = reference(fed, torch.ones(8), torch.zeros(8))
    assert other.dead == expected["dead"]
    assert other.margin == pytest.approx(expected["margin"], rel=1e-4)
    before = reference(F.group_norm(x, 2), net.norm.weight, net.norm.bias)
    assert figures(norm) == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("case", NO_RELU)
def test_no_relu(case):
    found = singularity(Branch(NO_RELU[case]), [images()])
    assert [(row.layer, row.relu) for row in found.rows] == [("norm", False)]
    assert found.dead == 0


@pytest.mark.parametrize("behind", [FED_BY_THE_NORMALIZER["functional, in place"], added_in_place])
def test_in_inference_mode_too(behind):
    net, x = Branch(behind), images()
    expected = singularity(net, [x]).rows
    with torch.inference_mode():
        assert singularity(net, [x.clone()]).rows == expected


def written_in_part(y, x):
    y[:, 0] += 1
    return y.relu()


def test_an_output_that_is_written_over_in_part_is_no_longer_the_normalizers():
    (norm, other) = singularity(Branch(written_in_part), [images()]).rows
    assert (norm.layer, norm.relu, other.relu) == ("norm", False, True)


@pytest.mark.parametrize("inplace", [True, False])
def test_modules_are_named(inplace):
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(inplace), nn.GroupNorm(2, 8), nn.ReLU(inplace))
    net.append(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(inplace)))
    found = singularity(net, [images()])
    assert [(row.layer, row.kind) for row in found.rows] == [
        ("1 (relu 1)", "relu"), ("2", "GroupNorm"), ("4.1 (relu 1)", "relu"),
    ]  # fmt: skip


def test_several_relus_of_one_module_are_counted():
    class Two(nn.Module):
        def forward(self, x):
            return (x - 1).relu() + F.relu(x + 1)

    net, x = nn.Sequential(nn.Conv2d(8, 8, 1), Two()), images()
    found = singularity(net, [x, x])
    assert [row.layer for row in found.rows] == ["1 (relu 1)", "1 (relu 2)"]


def test_the_packages_own_network():
    found = singularity(ek.models.build("resnet8_digits"), [torch.randn(8, 1, 8, 8)])
    assert [(row.layer, row.relu) for row in found.rows] == [
        ("stem.1", True),
        *itertools.chain.from_iterable(
            [
                (f"blocks.{k}.norm1", True),
                (f"blocks.{k}.norm2", False),
                *([(f"blocks.{k}.shortcut.1", False)] if k else []),
                (f"blocks.{k} (relu 1)", True),
            ]
            for k in range(3)
        ),
    ]


def test_a_fused_normalizer_and_relu_is_seen():
    norm, x = random_(BatchChannelNorm2d(8, 2)), images()
    (fused,) = singularity(nn.Sequential(NormAct(norm, nn.ReLU())), [x]).rows
    (plain,) = singularity(nn.Sequential(norm, nn.ReLU()), [x]).rows
    assert (fused.layer, fused.kind, fused.relu) == ("0.norm", "BatchChannelNorm2d", True)
    assert figures(fused) == figures(plain)


class BatchNormAct2d(nn.BatchNorm2d):
    """In the manner of timm's: one module that normalizes, drops and activates."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU()], ids=str)
def test_of_timms_fused_layer_it_is_the_normalizer_that_is_measured(act):
    norm, x = random_(BatchNormAct2d(8, act)), images()
    plain = nn.BatchNorm2d(8)
    plain.load_state_dict(norm.state_dict())
    (expected,) = singularity(nn.Sequential(plain, act), [x]).rows
    rows = singularity(nn.Sequential(norm), [x]).rows
    assert [row.relu for row in rows] == [isinstance(act, nn.ReLU)]
    assert figures(rows[0]) == pytest.approx(figures(expected))


# ---- what is asked of the model and the batches


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU(inplace=True))
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = images()
    kept = x.clone()
    singularity(net, [x])
    assert torch.equal(x, kept)
    assert [m.training for m in net] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert hooks(net) == 0
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert net(x).requires_grad


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_the_model_is_left_as_it_was_after_an_error():
    net = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(3, 3)).train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        singularity(net, [images()])
    assert hooks(net) == 0
    assert net.training
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_layers_that_follow_what_they_serve_do_not_follow_this():
    net = nn.Sequential(NoiseAwareBatchNorm2d(8), nn.ReLU()).eval()
    before = {name: value.clone() for name, value in net.named_buffers()}
    singularity(net, [5 + images()])
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    assert net[0].tracking


def test_batches_are_tensors_or_tuples():
    net, x = nn.Sequential(nn.GroupNorm(2, 8)), images()
    (expected,) = singularity(net, [x]).rows
    for batch in ((x, torch.zeros(64)), [x, None]):
        found = singularity(net, [batch])
        assert found.rows == [expected]
        assert found.samples == 64


def test_a_forward_of_ones_own_takes_batches_of_any_form():
    net, x = nn.Sequential(nn.GroupNorm(2, 8)), images()
    found = singularity(net, [{"pixels": x}], forward=lambda model, batch: model(batch["pixels"]))
    assert found.rows == singularity(net, [x]).rows
    assert found.samples == 64


@pytest.mark.parametrize(
    ("net", "batches", "says"),
    [
        (
            nn.Sequential(nn.BatchNorm1d(3)),
            [],
            "at least one batch; Sequential showed .* 0 samples",
        ),
        (nn.Linear(3, 3), [torch.zeros(5, 3)], "normalizers or ReLUs, .* Linear .* on 5 samples"),
    ],
)
def test_nothing_to_see_is_an_error(net, batches, says):
    with pytest.raises(ConfigError, match=says):
        singularity(net, batches)


# ---- the same facts in every form


@pytest.fixture
def found():
    net = nn.Sequential(
        nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.BatchNorm2d(8)
    )
    return singularity(net, [images()])


def test_facts_for_json(found):
    facts = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert facts.keys() == {"samples", "dead", "rows"}
    assert (facts["samples"], facts["dead"]) == (64, found.dead)
    for row, of in zip(facts["rows"], found.rows, strict=True):
        assert row == {name: getattr(of, name) for name in of.__dataclass_fields__}


def test_the_table(found):
    head, *lines = found.cells()
    assert head == ["layer", "kind", "relu", "channels", "dead %", "|mean|", "|std-1|", "margin"]
    for line, row in zip(lines, found.rows, strict=True):
        assert line[:4] == [row.layer, row.kind, "yes" if row.relu else "no", "8"]
        numbers = [100 * row.dead, row.mean_distance, row.std_distance, row.margin]
        for text, number in zip(line[4:], numbers, strict=True):
            assert (text == "") is (number is None)
            assert number is None or float(text) == pytest.approx(number, abs=0.051)
    printed = found.table().splitlines()
    assert [re.split(r" {2,}", line) for line in printed] == [
        [text for text in line if text] for line in [head, *lines]
    ]


def test_the_table_in_a_notebook(found):
    html = found._repr_html_()
    assert re.findall(r"<th>(.*?)</th>", html) == found.cells()[0]
    cells = re.findall(r"<td>(.*?)</td>", html)
    assert cells == list(itertools.chain(*found.cells()[1:]))


def test_layers_with_signs_of_html_in_their_names():
    net = nn.Sequential()
    net.add_module("<b>", nn.GroupNorm(2, 8))
    assert "&lt;b&gt;" in singularity(net, [images()])._repr_html_()


def test_the_picture(found):
    drawn = found.plot().to_dict()
    points = {(p["layer"], p["what"]): p["value"] for p in drawn["data"]["values"]}
    expected = {}
    for k, row in enumerate(found.rows):
        name = f"{k:02d} {row.layer}"
        if row.relu:
            expected[name, "dead units, %"] = 100 * row.dead
        if row.mean_distance is not None:
            expected[name, "distance of means"] = row.mean_distance
            expected[name, "distance of deviations"] = row.std_distance
    assert points == expected
    assert len({p["layer"] for p in drawn["data"]["values"]}) == 3


# ---- evenkeel inspect


def command(monkeypatch, capsys, *arguments):
    """Exit code and what came on the two streams."""
    monkeypatch.setattr(sys, "argv", ["evenkeel", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a network's weights, as the working folder."""
    monkeypatch.chdir(tmp_path)
    net = ek.models.build("resnet8_digits").eval()
    save_file(net.state_dict(), "weights.safetensors")
    ek.save(net, "saved.safetensors")
    return net


def test_inspect_shows_writes_and_draws_the_same(here, monkeypatch, capsys, data):
    code, out, err = command(
        monkeypatch, capsys, "inspect", "resnet8_digits", "--weights", "weights.safetensors",
        "--samples", 130, "--json", "facts.json", "--plot", "picture.svg",
    )  # fmt: skip
    assert (code, err) == (0, "")
    x = torch.cat([x for x, _ in data.test])[:130]
    expected = singularity(here, [x])
    facts = json.loads(Path("facts.json").read_text())
    assert facts["samples"] == 130
    assert facts["dead"] == pytest.approx(expected.dead)
    for row, of in zip(facts["rows"], expected.rows, strict=True):
        assert (row["layer"], row["relu"]) == (of.layer, of.relu)
        known = {k: v for k, v in figures(of).items() if v is not None}
        assert {k: row[k] for k in known} == pytest.approx(known, rel=1e-3)
        (line,) = (line for line in out.splitlines() if line.strip().startswith(f"{of.layer}  "))
        assert of.kind in line
    assert f"{100 * expected.dead:.1f} % of the units before a ReLU are dead, on 130 samples" in out
    picture = Path("picture.svg").read_text()
    assert picture.startswith("<svg")
    assert all(of.layer in picture for of in expected.rows)


def test_inspect_cuts_nothing_off_in_80_columns(here, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = command(monkeypatch, capsys, "inspect", "saved.safetensors", "--samples", 20)
    said = " ".join(out.split())
    assert "…" not in said
    for title in ("layer", "kind", "relu", "channels", "dead", "|mean|", "|std-1|", "margin"):
        assert title in said


def test_inspect_of_a_saved_network_on_500_samples(here, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "inspect", "saved.safetensors")
    assert code == 0
    assert "on 500 samples" in out
    assert not Path("facts.json").exists()


GIVEN = ("resnet8_digits", "--weights", "weights.safetensors")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("resnet8", *GIVEN[1:]), "Did you mean 'resnet8_digits'"),
        (GIVEN[:1], "needs its trained weights"),
        ((*GIVEN, "--data", "digit"), "Did you mean 'digits'"),
        ((*GIVEN, "--samples", 0), "at least one batch"),
        ((*GIVEN, "--plot", "/proc/here/p.svg"), "Cannot write into"),
        ((*GIVEN, "--json", "weights.safetensors/x.json"), "Cannot write into"),
        ((*GIVEN, "--simples", 3), "simples"),
    ],
)
def test_what_inspect_cannot_do(arguments, says, here, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, "inspect", *arguments)
    assert code == 2
    said = " ".join((out + err).split())
    assert re.search(says, said), said
    assert "Traceback" not in said


# ---- evenkeel bench


@pytest.fixture
def quick(monkeypatch):
    """Blocks that take no time, of tiny layers."""
    monkeypatch.setattr(timing, "BLOCK_S", 1e-3)
    monkeypatch.setattr(bench_norm, "SHAPES", ((2, 16, 4, 4),))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_ratios_are_to_the_first(monkeypatch):
    monkeypatch.setattr(timing, "BLOCK_S", 0.03)
    seconds = (0.004, 0.012, 0.002)
    timings = timing.compare([functools.partial(time.sleep, s) for s in seconds], rounds=5)
    assert timings[0].ratio == 1
    assert [t.ratio for t in timings] == pytest.approx([1, 3, 0.5], rel=0.25)
    assert [t.median_ms for t in timings] == pytest.approx([4, 12, 2], rel=0.4)
    assert all(t.low_ms <= t.median_ms <= t.high_ms for t in timings)


def test_blocks_alternate_and_take_as_long(monkeypatch):
    monkeypatch.setattr(timing, "BLOCK_S", 0.02)
    log: list[str] = []

    def run(name: str, seconds: float) -> None:
        log.append(name)
        time.sleep(seconds)

    timing.compare([lambda: run("slow", 0.008), lambda: run("fast", 0.002)], rounds=3)
    blocks = [(name, len(list(calls))) for name, calls in itertools.groupby(log)]
    assert [name for name, _ in blocks] == ["slow", "fast"] * 4  # the first is for the counts
    assert {count for name, count in blocks[2:] if name == "slow"} <= {3, 4}
    assert min(count for name, count in blocks[2:] if name == "fast") >= 6


@pytest.mark.parametrize("rounds", [2, 3, 4, 9])
def test_quartiles_lie_within_what_was_timed(rounds, monkeypatch):
    blocks = itertools.cycle([1.0, 3.0])  # seconds
    monkeypatch.setattr(timing, "_calls_in_a_block", lambda run: 1)
    monkeypatch.setattr(timing, "_seconds", lambda run, calls: next(blocks))
    (found,) = timing.compare([lambda: None], rounds)
    assert 1000 <= found.low_ms <= found.median_ms <= found.high_ms <= 3000


def test_one_round_is_timed_or_refused(quick):
    with contextlib.suppress(ConfigError):
        assert len(timing.compare([lambda: None, lambda: None], rounds=1)) == 2


@pytest.mark.parametrize("layout", bench_norm.LAYOUTS)
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_rows_of_figures(layout, way, quick, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    rows = list(bench_norm._rows((2, 16, 4, 4), layout, way, "cpu", 3))
    assert [row["layer"] for row in rows] == list(bench_norm.layers(16))
    assert rows[0]["layer"] == "batch norm"
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert (row["shape"], row["layout"], row["way"]) == ([2, 16, 4, 4], layout, way)
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert row["ratio"] > 0
    expected = [1, 1, 2, 1, 1] if way == "eager" else [None] * 5
    assert [row["activations_kept"] for row in rows] == expected


def test_every_shape_layout_and_way_is_timed(quick, monkeypatch):
    asked, seen = [], []
    monkeypatch.setattr(bench_norm, "_rows", lambda *given: asked.append(given) or [{}])
    rows = bench_norm.bench("cpu", rounds=7, progress=lambda *done: seen.append(done))
    assert asked == [
        ((2, 16, 4, 4), layout, way, "cpu", 7)
        for layout in ("contiguous", "channels last")
        for way in ("eager", "compiled")
    ]
    assert len(rows) == 4
    assert seen == [(k, 4) for k in range(5)]
    asked.clear()
    bench_norm.bench("cpu", compiled=False)
    assert {way for _, _, way, _, _ in asked} == {"eager"}


def test_the_bench_command(quick, monkeypatch, capsys, tmp_path):
    code, out, err = command(
        monkeypatch, capsys, "bench", "norm", "--no-compiled", "--rounds", 2, "--threads", 1,
        "--json", tmp_path / "bench.json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert facts["command"].startswith("evenkeel bench norm --no-compiled")
    assert facts["environment"]["threads"] == 1
    assert facts["rounds"] == 2
    assert len(facts["rows"]) == 10
    for row in facts["rows"]:
        assert f"{row['median_ms']:.3f}" in out
    assert "2x16x4x4" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("norms",), "norm"),
        (("norm", "--json", "/proc/here/b.json"), "Cannot write into"),
        (("norm", "--rounds", 0), "rounds"),
        (("norm", "--device", "cudo"), "cudo"),
    ],
    ids=["what", "folder", "rounds", "device"],
)
def test_what_bench_cannot_do(arguments, says, quick, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, "bench", *arguments)
    assert code == 2
    assert says in out + err
