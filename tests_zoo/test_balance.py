"""Balance on timm's networks: all that can be moved is found, and the function is kept."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import evenkeel as ek
from evenkeel.balance.apply import move
from evenkeel.graph import Scales, find_scales


def channels(net: nn.Module, *kinds: type[nn.Module]) -> int:
    """Over all normalizers of a kind."""
    return sum(len(m.weight) for m in net.modules() if isinstance(m, kinds))


def batch_norms(net: nn.Module) -> int:
    """All of them: what a batch norm gives may be scaled, up to what reads it."""
    return channels(net, nn.BatchNorm2d)


def densenet(net: nn.Module) -> int:
    """All but the stem's: what that gives, only batch norms read."""
    return batch_norms(net) - len(net.features.norm0.weight)


def without(*acts: type[nn.Module]) -> Callable[[nn.Module], int]:
    """Batch norms with none of these activations behind them, and ReLUs of squeeze-excitation."""

    def count(net: nn.Module) -> int:
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        gates = [m for m in net.modules() if isinstance(getattr(m, "conv_reduce", None), nn.Conv2d)]
        return sum(len(m.weight) for m in norms if not isinstance(m.act, acts)) + sum(
            m.conv_reduce.out_channels for m in gates if isinstance(m.act1, nn.ReLU)
        )

    return count


def regnet(net: nn.Module) -> int:
    """Batch norms, and the ReLUs of squeeze-excitation."""
    return batch_norms(net) + sum(
        m.fc1.out_channels for m in net.modules() if type(m).__name__ == "SEModule"
    )


def convnext(net: nn.Module) -> int:
    """In each block, what goes from the norm to the first layer, and from the last to its scale.

    Between stages and before the head, what goes from the norm. The stream is pinned, as every
    stage ends in a norm, and so is the stem's norm, which gives the stream.
    """
    return (
        channels(net, nn.LayerNorm)
        - len(net.stem[1].weight)
        + sum(
            len(m.gamma)
            for m in net.modules()
            if isinstance(getattr(m, "gamma", None), nn.Parameter)
        )
    )


def vision_transformer(net: nn.Module) -> int:
    """What goes from norms to layers, and the values of the attention."""
    return channels(net, nn.LayerNorm) + net.embed_dim * len(net.blocks)


NETWORKS: dict[str, tuple[Callable[[nn.Module], int], set[str]]] = {
    "resnet18": (batch_norms, {"batch_norm"}),
    "mobilenetv3_small_100": (without(nn.Hardswish), {"batch_norm", "hardswish", "hardsigmoid"}),
    "densenet121": (densenet, {"batch_norm"}),
    "regnety_002": (regnet, {"batch_norm", "sigmoid"}),
    "convnext_atto": (convnext, {"layer_norm", "gelu"}),
    "vit_tiny_patch16_224": (vision_transformer, {"layer_norm", "gelu", "attention"}),
    "efficientnet_b0": (without(nn.SiLU), {"batch_norm", "silu", "sigmoid"}),
}


@pytest.fixture(scope="module", params=NETWORKS)
def found(request) -> tuple[str, nn.Module, torch.Tensor, Scales]:
    torch.manual_seed(0)
    net = timm.create_model(request.param, num_classes=10)
    with torch.no_grad():
        for parameter in net.parameters():  # those that start at 0 or 1 too
            parameter.add_(0.01 * torch.randn(parameter.shape))
    x = torch.randn(4, 3, *(2 * [224 if "vit" in request.param else 64]))
    return request.param, net, x, find_scales(net, x[:2])


def test_all_that_can_be_moved_is_found(found):
    name, net, _, scales = found
    expected, reasons = NETWORKS[name]
    assert sum(layer.free for layer in scales.coverage) == expected(net)
    assert not scales.unknown
    said = {why for layer in scales.coverage for why in layer.pinned}
    assert all(any(word in why for why in said) for word in (*reasons, "output of the network"))
    assert len(said) == len(reasons) + 1


@pytest.mark.parametrize("training", [False, True])
def test_any_scales_keep_the_function(found, training):
    _, net, x, scales = found
    changed = copy.deepcopy(net)
    z = 2 * torch.rand(scales.number + 1, dtype=torch.float64) - 1
    z[-1] = 0
    by = move(scales.places, z)
    for path, parameter in changed.named_parameters():
        by.rescale_(path, parameter)
    before = copy.deepcopy(net)
    with torch.no_grad():
        outputs = []
        for model in (before, changed):
            torch.manual_seed(1)
            outputs.append(model.train(training)(x))
    change = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
    assert change < (1e-4 if training else 1e-5)


def test_balance_and_exact_balance(found):
    _, net, x, _ = found
    changed = copy.deepcopy(net).eval()
    done = ek.balance_(changed, x[:2])
    assert done.error < 1e-5
    assert done.objective_after < done.objective_before
    exact = copy.deepcopy(net).eval()
    assert ek.balance_(exact, x[:2], exact=True).error == 0
    with torch.no_grad():
        assert torch.equal(exact(x), net.eval()(x))
