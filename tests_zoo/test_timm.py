"""Networks of timm and torchvision, with this package's normalizers and convolutions."""

import json
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import FrozenBatchNormAct2d, freeze_batch_norm_2d
from timm.models.densenet import DenseNet
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from evenkeel.analog import Gaussian, program
from evenkeel.norm import (
    BatchChannelNorm2d,
    NormAct,
    convert_,
    norm_act,
    singularity,
    standardize_weights_,
)

BatchNorm = nn.modules.batchnorm._BatchNorm


def running(channels: int) -> BatchChannelNorm2d:
    """In 8 groups or, of fewer than 16 channels, pairs; for batches of one."""
    return BatchChannelNorm2d(channels, min(8, channels // 2), statistics="running")


def images(count: int = 1, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size)


def train_a_step(net: nn.Module) -> None:
    """On one image; every parameter must be reached, and stay finite."""
    parameters = list(net.parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, 0.01)
    F.cross_entropy(net.train()(images()), torch.tensor([3])).backward()
    optimizer.step()
    assert all(p.grad is not None and torch.isfinite(p).all() for p in parameters)
    for end in (0, -1):
        assert not torch.equal(parameters[end], before[end])


def count(net: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in net.modules())


# ---- networks that are made with them


def test_resnet_takes_it_as_its_norm_layer():
    layer = partial(BatchChannelNorm2d, num_groups=8, statistics="running")
    net = timm.create_model("resnet18", num_classes=10, norm_layer=layer)
    assert (count(net, BatchChannelNorm2d), count(net, BatchNorm)) == (20, 0)
    train_a_step(net)
    assert net.bn1.num_batches_tracked == 1
    net.eval()
    x = images(3)
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-3, atol=1e-4)


def test_resnet_with_statistics_of_batches():
    layer = partial(BatchChannelNorm2d, num_groups=8)
    net = timm.create_model("resnet18", num_classes=10, norm_layer=layer)
    net(images(4)).sum().backward()
    assert torch.isfinite(net.eval()(images())).all()


def small_densenet(num_classes: int, norm_layer: Any) -> nn.Module:
    return DenseNet(16, (2, 2, 2, 2), num_classes=num_classes, norm_layer=norm_layer)


@pytest.mark.parametrize(
    ("make", "act", "layers"),
    [
        (small_densenet, nn.ReLU, 21),
        (partial(timm.create_model, "resnetv2_18"), nn.ReLU, 17),
        (partial(timm.create_model, "efficientnet_b0"), nn.SiLU, 49),
        (partial(timm.create_model, "regnetx_002"), nn.ReLU, 44),
    ],
    ids=["densenet", "resnetv2", "efficientnet", "regnet"],
)
def test_networks_that_want_the_activation_in_the_norm_layer(make, act, layers):
    net = make(num_classes=10, norm_layer=norm_act(running, act))
    made = [m for m in net.modules() if isinstance(m, NormAct)]
    assert (len(made), count(net, BatchNorm)) == (layers, 0)
    assert {type(m.act) for m in made} <= {act, nn.Identity}
    assert sum(type(m.act) is act for m in made) > layers / 2
    train_a_step(net)
    assert torch.isfinite(net.eval()(images(2))).all()


# ---- networks that are converted

ZOO = {
    "resnet18": 20,
    "efficientnet_b0": 49,
    "mobilenetv3_small_100": 34,
    "regnety_002": 44,
    "densenet121": 121,
    "mobilenetv2_050": 52,
}


@pytest.mark.parametrize("name", ZOO)
def test_all_batch_norms_are_converted(name):
    net = timm.create_model(name, num_classes=10)
    norms = [path for path, m in net.named_modules() if isinstance(m, BatchNorm)]
    x = images(2)
    with torch.no_grad():
        expected = net.eval()(x)
    convert_(net, running).undo()
    with torch.no_grad():
        assert torch.equal(net(x), expected)
    done = convert_(net, running)
    assert done.converted == norms
    assert len(norms) == ZOO[name]
    assert done.skipped == {}
    assert count(net, BatchNorm) == 0
    with torch.no_grad():
        assert torch.isfinite(net(x)).all()
    train_a_step(net)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenetv3_small_100"])
def test_converted_to_plain_batch_norm_it_is_the_same_network(name):
    net = timm.create_model(name, num_classes=10).eval()
    for module in net.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = images(2)
    expected = net(x)
    kinds = {type(m) for m in net.modules() if isinstance(m, BatchNorm)}
    assert (kinds == {nn.BatchNorm2d}) is (name == "resnet18")
    convert_(net, nn.BatchNorm2d)
    assert {type(m) for m in net.modules() if isinstance(m, BatchNorm)} == {nn.BatchNorm2d}
    torch.testing.assert_close(net(x), expected)


def test_torchvisions_resnet():
    net = torchvision.models.resnet18(num_classes=10)
    done = convert_(net, running)
    assert (len(done.converted), done.skipped) == (20, {})
    train_a_step(net)
    assert torch.isfinite(net.eval()(images(2))).all()


def test_torchvisions_frozen_batch_norm():
    net = torchvision.models.resnet18(num_classes=10, norm_layer=FrozenBatchNorm2d).eval()
    frozen = [path for path, m in net.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    for path in frozen:
        nn.init.uniform_(net.get_submodule(path).running_var, 0.5, 2)
        nn.init.normal_(net.get_submodule(path).bias, std=0.1)
    old = net.bn1
    done = convert_(net, running)
    assert (done.converted, done.skipped) == (frozen, {})
    assert type(net.bn1) is BatchChannelNorm2d
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(net.bn1, name), getattr(old, name))
    train_a_step(net)


def test_frozen_torchvision_networks_go_over_to_batch_norm_unchanged():
    net = torchvision.models.resnet18(num_classes=10, norm_layer=FrozenBatchNorm2d).eval()
    for module in net.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
    x = images(2)
    expected = net(x)
    convert_(net, nn.BatchNorm2d)
    assert count(net, nn.BatchNorm2d) == 20
    torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-4)


def test_timms_frozen_fused_batch_norm_is_converted_or_listed():
    net = freeze_batch_norm_2d(timm.create_model("mobilenetv3_small_100", num_classes=10))
    net.extra = nn.BatchNorm2d(8)  # so that there is something to convert
    frozen = [path for path, m in net.named_modules() if isinstance(m, FrozenBatchNormAct2d)]
    assert frozen
    done = convert_(net, running)
    assert set(frozen) <= {*done.converted, *done.skipped}


# ---- weight standardization


def test_standardized_weights_of_resnet():
    net = timm.create_model("resnet18", norm_layer="groupnorm", zero_init_last=False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    done = standardize_weights_(net)
    assert len(done.standardized) == count(net, nn.Conv2d) == 20
    assert not done.skipped
    filters = net.layer2[0].conv1.weight.flatten(1)
    assert filters.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(filters.var(1), torch.ones(len(filters)), rtol=0.05, atol=0)
    train_a_step(net)
    done.undo()
    assert net.state_dict().keys() == before.keys()
    net.load_state_dict(before)


def test_standardized_resnet_on_a_chip():
    net = timm.create_model("resnet18", num_classes=10).eval()
    standardize_weights_(net)
    x = images(2)
    chip = program(net, Gaussian(0.0), seed=0)
    assert not chip.digital
    torch.testing.assert_close(chip(x), net(x), rtol=1e-3, atol=1e-3)


# ---- singularity


def test_singularity_of_resnet():
    net = timm.create_model("resnet18", num_classes=10, zero_init_last=False)
    found = singularity(net, [images(4), images(4)])
    assert found.samples == 8
    rows = {row.layer: row for row in found.rows if row.kind == "BatchNorm2d"}
    assert list(rows) == [p for p, m in net.named_modules() if isinstance(m, BatchNorm)]
    taken = {path for path, row in rows.items() if row.relu}
    assert taken == {"bn1"} | {f"layer{k}.{i}.bn1" for k in (1, 2, 3, 4) for i in (0, 1)}
    sums = [row.layer for row in found.rows if row.kind == "relu"]
    assert sums == [f"layer{k}.{i}.act2 (relu 1)" for k in (1, 2, 3, 4) for i in (0, 1)]


def test_singularity_of_resnet_as_it_starts_is_json():
    net = timm.create_model("resnet18", num_classes=10)
    assert not net.layer1[0].bn2.weight.any()  # timm starts the branches at zero
    json.dumps(singularity(net, [images(4)]).to_dict(), allow_nan=False)


def test_singularity_of_converted_efficientnet_is_of_what_comes_before_the_activation():
    net, x = timm.create_model("efficientnet_b0", num_classes=10), images(4)
    convert_(net, nn.BatchNorm2d)
    expected = singularity(net, [x]).rows
    torch.manual_seed(0)
    fused = timm.create_model("efficientnet_b0", num_classes=10)
    found = singularity(fused, [x]).rows
    assert [row.layer for row in found] == [row.layer.removesuffix(".norm") for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.mean_distance == pytest.approx(other.mean_distance, rel=1e-2, abs=1e-3)
        assert row.std_distance == pytest.approx(other.std_distance, rel=1e-2, abs=1e-3)


def test_singularity_of_a_network_with_layer_norm_of_images():
    net = timm.create_model("convnext_atto", num_classes=10)
    found = singularity(net, [images(4)])
    channels = [row.channels for row in found.rows if row.kind == "LayerNorm2d"]
    assert channels[0] == net.stem[1].normalized_shape[0]
