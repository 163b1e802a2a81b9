"""Networks of timm, torchvision and Hugging Face on chips, without a line of code about them."""

from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from evenkeel.analog import PCM, Converter, Device, Gain, Periphery, count, program

IDEAL = Periphery(dac=Converter(24), adc=Converter(24))
SIZES = {"vit_tiny_patch16_224": 224}
NAMES = ["resnet18", "mobilenetv3_small_100", "convnext_atto", "vit_tiny_patch16_224"]


class Text(nn.Module):
    """A small encoder of text, of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, 64)
        self.positions = nn.Parameter(torch.randn(32, 64) * 0.02)
        layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(64, 1000)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.encoder(self.tokens(tokens) + self.positions))


class Bert(nn.Module):
    """A small BERT of Hugging Face, and its scores alone."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, max_position_embeddings=64,
        )  # fmt: skip
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.bert(tokens).logits


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name == "text":
        return Text().eval(), torch.randint(0, 1000, (2, 32))
    if name == "bert":
        return Bert().eval(), torch.randint(0, 500, (2, 16))
    if name == "vit_b_16":
        net = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10)
        nn.init.normal_(net.heads.head.weight)
        return net.eval(), torch.randn(2, 3, 32, 32)
    size = SIZES.get(name, 64)
    return timm.create_model(name, num_classes=10).eval(), torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", [*NAMES, "vit_b_16", "text", "bert"])
def test_nearly_all_of_it_is_on_the_chip(name):
    net, x = made(name)
    chip = program(net, PCM(), seed=0)
    counts = count(chip, x)
    assert counts.analog_share >= 0.95, (counts.digital, chip.digital)
    assert torch.isfinite(chip.age_(3600.0)(x)).all()


@pytest.mark.parametrize("name", [*NAMES, "vit_b_16", "text", "bert"])
@torch.no_grad()
def test_ideal_arrays_and_converters_give_the_digital_output(name):
    net, x = made(name)
    wanted = net(x)
    for periphery in (None, IDEAL):
        found = program(net, Device(Gain(1.0), periphery=periphery), seed=0)(x)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-6
