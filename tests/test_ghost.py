"""Batch norm over parts of the batch."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from evenkeel.errors import ConfigError, ShapeError
from evenkeel.models import build
from evenkeel.norm import GhostBatchNorm2d

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def pair(size: int, **options) -> tuple[GhostBatchNorm2d, nn.BatchNorm2d]:
    own = GhostBatchNorm2d(6, size, dtype=torch.float64, **options)
    theirs = nn.BatchNorm2d(6, dtype=torch.float64, **options)
    nn.init.normal_(own.weight)
    nn.init.normal_(own.bias)
    theirs.load_state_dict(own.state_dict())
    return own, theirs


def images(samples: int, layout=torch.contiguous_format) -> torch.Tensor:
    x = 3 + 2 * torch.randn(samples, 6, 4, 5, dtype=torch.float64)
    return x.contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("samples", "size"), [(8, 2), (8, 8), (8, 16), (7, 3), (4, 1)])
def test_each_part_is_batch_normalized_by_itself(samples, size, layout):
    own, theirs = pair(size)
    x = images(samples, layout)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = own(mine), torch.cat([theirs(part) for part in other.split(size)])
    torch.testing.assert_close(y, z)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(own.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(own.bias.grad, theirs.bias.grad)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_follow_the_average_over_parts(momentum):
    own, _ = pair(2, momentum=momentum)
    mean, var = own.running_mean.clone(), own.running_var.clone()
    for step in range(3):
        x = images(8)
        own(x)
        rate = momentum or 1 / (step + 1)
        parts = [part.transpose(0, 1).flatten(1) for part in x.split(2)]
        mean += rate * (torch.stack([p.mean(1) for p in parts]).mean(0) - mean)
        var += rate * (torch.stack([p.var(1) for p in parts]).mean(0) - var)
    torch.testing.assert_close(own.running_mean, mean)
    torch.testing.assert_close(own.running_var, var)
    assert own.num_batches_tracked == 3


def test_in_eval_mode_it_is_batch_norm():
    own, theirs = pair(2)
    own(images(8))
    theirs.load_state_dict(own.state_dict())
    x = images(3)
    torch.testing.assert_close(own.eval()(x), theirs.eval()(x), rtol=0, atol=0)


def test_recomputation_updates_nothing():
    own, _ = pair(2)
    other = copy.deepcopy(own)
    x = images(4).requires_grad_()
    own(x).sum().backward()
    checkpoint(other, x, use_reentrant=False).sum().backward()
    assert all(torch.equal(v, own.state_dict()[k]) for k, v in other.state_dict().items())


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="1 or more; got 0"):
        GhostBatchNorm2d(3, 0)
    with pytest.raises(ShapeError, match="more than one value per channel in each part"):
        GhostBatchNorm2d(3, 1)(torch.randn(4, 3, 1, 1))
    with pytest.raises(ValueError, match="expected 4D"):
        GhostBatchNorm2d(3, 2)(torch.randn(4, 3))
    assert GhostBatchNorm2d(3, 2)(torch.randn(0, 3, 2, 2)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("norm", ["batch", "batch_channel", "batch_channel_running", "layer"])
def test_reference_networks_train_on_batches_of_two(norm, data):
    network = build("resnet8_digits", norm=norm, normalization_batch=2, weight_standard=True)
    x, y = data.train
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for step in range(60):
        batch = slice(8 * step, 8 * step + 8)
        loss = nn.functional.cross_entropy(network(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
