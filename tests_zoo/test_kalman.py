"""Priors on timm's networks: how many normalizers have one, and why the others have not."""

import pytest
import timm
import torch

import evenkeel as ek

INPUT = "it reads the network's input"
EXPECTED = {
    "resnet18": (20, {INPUT: 1}),
    "resnet50": (53, {INPUT: 1}),
    "resnetv2_50": (49, {INPUT: 1}),
    "vgg11_bn": (8, {INPUT: 1}),
    "inception_v3": (94, {INPUT: 1}),
    "densenet121": (121, {INPUT: 1}),
    "regnetx_002": (44, {INPUT: 1}),
    "mobilenetv3_small_050": (34, {INPUT: 1}),
    "efficientnet_b0": (49, {INPUT: 1}),
    "repvgg_a0": (61, {INPUT: 2}),
    "skresnet18": (36, {INPUT: 1, "stack is on the way": 16, "split is on the way": 16}),
}
"""Normalizers, and how many have no prior for which reason."""


@pytest.mark.parametrize("name", EXPECTED)
def test_all_normalizers_that_can_have_a_prior_have_one(name):
    normalizers, reasons = EXPECTED[name]
    size = 128 if "inception" in name else 64
    kalman = ek.norm.kalmanize(timm.create_model(name), torch.zeros(2, 3, size, size)).train()
    for reason, number in reasons.items():
        assert sum(why.startswith(reason) for why in kalman.without.values()) == number
    assert len(kalman.without) == sum(reasons.values())
    assert len(kalman.priors) == normalizers - len(kalman.without)
    found = {}
    kalman.listen(lambda path, prior, fused, observed: found.update({path: prior is not None}))
    kalman(torch.randn(4, 3, size, size)).sum().backward()
    assert found == dict.fromkeys(kalman.priors, True) | dict.fromkeys(kalman.without, False)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in kalman.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_in_eval_mode_it_is_the_network_itself(name):
    network = timm.create_model(name).eval()
    kalman, x = ek.norm.kalmanize(network, torch.zeros(2, 3, 64, 64)), torch.randn(3, 3, 64, 64)
    assert torch.equal(kalman(x), network(x))
    assert torch.equal(kalman.to_batch_norm()(x), network(x))
