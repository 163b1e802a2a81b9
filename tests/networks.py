"""Small networks of every kind, and how many of their channels' scales can be moved.

Each has its numbers by derivation, not by running the code: ``scales`` is the number of scales that
move independently, ``free`` that of the layers' output channels that move with them; a layer that
is used several times counts once.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from evenkeel.graph import Scales, find_scales
from evenkeel.norm import standardize_weights_

OUTPUT = "output of the network"
BEFORE_BN = "input of batch_norm"


@dataclass(frozen=True)
class Network:
    """A network and what must be found in it.

    ``pins`` are the reasons that must be given, by a part of each, and no others.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    scales: int
    free: int
    pins: tuple[str, ...] = (OUTPUT,)
    tokens: int = 0
    unknown: dict[str, int] = field(default_factory=dict)

    def build(self, seed: int = 0) -> nn.Module:
        """In train mode; no parameter or buffer is left at a special value such as 0 or 1."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return randomized_(self.make()).train()

    def inputs(self, batch: int = 3, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(self.tokens, (batch, *self.shape), generator=generator)
        return torch.randn(batch, *self.shape, generator=generator)


@torch.no_grad()
def randomized_(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if "running_mean" in name:
            buffer.normal_(0, 0.1)
        elif "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    return model


class Net(nn.Module):
    """Its forward is a function of the parts."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | nn.Parameter | torch.Tensor):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


# ---- chains


def mlp(*widths: int, bias: bool = True, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out, bias=bias), act()]
    return nn.Sequential(*layers[:-1])


def normed(layer: nn.Module, bn: bool) -> nn.Module:
    channels = layer.weight.shape[0]
    return nn.Sequential(layer, nn.BatchNorm2d(channels)) if bn else layer


def conv(into: int, out: int, size: int = 3, *, bn: bool = False, **options) -> nn.Module:
    return normed(nn.Conv2d(into, out, size, padding=size // 2, **options), bn)


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]


def vgg(*, bn: bool) -> nn.Module:
    return nn.Sequential(
        conv(3, 6, bn=bn), nn.ReLU(), nn.MaxPool2d(2),
        conv(6, 8, bn=bn), nn.ReLU(), nn.AvgPool2d(2, padding=1), nn.Flatten(),
        nn.Linear(8 * 9, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


def around(make: Callable[[int], nn.Module]) -> nn.Module:
    """A convolution, something with 6 channels, a convolution and a head."""
    return nn.Sequential(conv(3, 6), make(6), nn.ReLU(), conv(6, 4), nn.ReLU(), *head(4))


# ---- branches


class Block(nn.Module):
    def __init__(self, into: int, out: int, kind: str, *, bn: bool):
        super().__init__()
        stride = 1 if into == out else 2
        self.first = conv(into, out, bn=bn, stride=stride)
        self.second = conv(out, out, bn=bn)
        project = kind == "C" or (kind == "B" and into != out)
        self.shortcut = conv(into, out, 1, bn=bn, stride=stride) if project else None
        self.gap = (out - into) // 2

    def forward(self, x):
        y = self.second(F.relu(self.first(x)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.gap:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.gap, self.gap))
        return F.relu(x + y)


def resnet(kind: str, *, bn: bool) -> nn.Module:
    blocks = [Block(a, b, kind, bn=bn) for a, b in ((4, 4), (4, 8), (8, 8))]
    return nn.Sequential(conv(3, 4, bn=bn), nn.ReLU(), *blocks, *head(8))


def dense(m, x):
    x = F.relu(m.stem(x))
    for layer in (m.a, m.b):
        x = torch.cat([x, F.relu(layer(x))], 1)
    return m.head(x)


def dense_norm_first(m, x):
    x = m.stem(x)
    for norm, layer in ((m.na, m.a), (m.nb, m.b)):
        x = torch.cat([x, layer(F.relu(norm(x)))], 1)
    return m.head(F.relu(m.nc(x)))


class Inverted(nn.Module):
    def __init__(self, into: int, out: int, act: Callable[[], nn.Module]):
        super().__init__()
        self.body = nn.Sequential(
            conv(into, 8, 1, bn=True), act(), conv(8, 8, groups=8, bn=True), act(),
            conv(8, out, 1, bn=True),
        )  # fmt: skip
        self.keeps = into == out

    def forward(self, x):
        return x + self.body(x) if self.keeps else self.body(x)


def mobilenet(act: Callable[[], nn.Module]) -> nn.Module:
    blocks = [Inverted(4, 4, act), Inverted(4, 5, act)]
    return nn.Sequential(conv(3, 4, bn=True), act(), *blocks, *head(5))


def shuffle(m, x):
    a, b = F.relu(m.stem(x)).chunk(2, 1)
    b = F.relu(m.last(m.each(F.relu(m.first(b)))))
    x = torch.cat([a, b], 1)
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return m.head(F.relu(m.grouped(x)))


def unet(m, x):
    high = F.relu(m.high(x))
    low = F.relu(m.low(F.max_pool2d(high, 2)))
    smooth = F.interpolate(low, scale_factor=2, mode="bilinear")
    return m.last(F.relu(m.join(torch.cat([high, m.up(low), smooth], 1))))


def gate_by_squeezing(m, x):
    x = F.relu(m.conv(x))
    gate = torch.sigmoid(m.excite(F.relu(m.squeeze(x.mean((2, 3))))))
    return m.head(x * gate[:, :, None, None])


def shapes(m, x):
    a, b, c = F.relu(m.first(x)).split([2, 2, 4], 1)
    y = torch.cat([b, a], 1) + c
    y = torch.stack([y, y.roll(1, 1)], 2).flatten(1, 2)
    return m.head(F.relu(m.last(F.pixel_shuffle(F.relu(m.second(y)), 2))))


# ---- sequences


def attend(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attend_by_hand(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    return m.out((weights @ v).transpose(1, 2).flatten(2))


def attend_by_torch(m, x):
    return m.own(x, x, x, need_weights=False)[0]


def attention(form: str) -> nn.Module:
    if form == "torch":
        return Net(attend_by_torch, own=nn.MultiheadAttention(8, 2, batch_first=True))
    run = attend if form == "fused" else attend_by_hand
    return Net(run, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))


def transformer(m, x):
    x = torch.cat([m.token.expand(len(x), -1, -1), m.embed(x)], 1) + m.position
    x = x + m.attention(m.norm1(x))
    x = x + m.mlp(m.norm2(x))
    return m.head(m.norm3(x)[:, 0])


def vit(form: str) -> nn.Module:
    return Net(
        transformer,
        token=nn.Parameter(torch.randn(1, 1, 8)),
        position=nn.Parameter(torch.randn(1, 5, 8)),
        embed=nn.Linear(6, 8),
        norm1=nn.LayerNorm(8),
        attention=attention(form),
        norm2=nn.LayerNorm(8),
        mlp=mlp(8, 12, 8),
        norm3=nn.LayerNorm(8),
        head=nn.Linear(8, 3),
    )


def rnn(**options) -> nn.Module:
    own = nn.RNN(5, 6, nonlinearity="relu", batch_first=True, **options)
    width = 12 if own.bidirectional else 6
    return Net(lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=own, head=nn.Linear(width, 3))


def loop(m, x):
    h = x.new_zeros(len(x), 6)
    for step in x.unbind(1):
        h = F.relu(m.into(step) + m.state(h))
    return m.head(h)


def loop_from_the_first(m, x):
    h = F.relu(m.into(x[:, 0]))
    for step in x[:, 1:].unbind(1):
        h = F.relu(m.into(step) + m.state(h))
    return m.head(h)


# ---- in place


def in_place(m, x):
    h = F.relu(m.a(x))
    h += F.relu(m.b(x))
    h.add_(F.relu(m.c(x)))
    return m.head(h)


def into_slices(m, x):
    z = x.new_zeros(len(x), 8)
    z[:, :4] = F.relu(m.a(x))
    z[:, 4:] = F.relu(m.b(x))
    return m.head(z)


def read_by_an_older_view(m, x):
    h = F.relu(m.a(x))
    view = h.view(len(x), 6)
    h += F.relu(m.b(x))
    return m.head(view)


def scaled_under_an_older_view(m, x):
    h = F.relu(m.a(x))
    view = h.view(len(x), 6)
    h *= m.scale
    return m.head(view)


def in_place_with_norms(m, x):
    h = m.norm(m.conv(x))
    h = h.relu_()
    y = m.other(h).relu_()
    y += h
    return m.head(y)


# ---- all of them


def weights_from_parameters() -> nn.Module:
    net = nn.Sequential(
        conv(3, 4), nn.ReLU(), conv(4, 5), nn.ReLU(), conv(5, 6), nn.ReLU(), *head(6)
    )
    standardize_weights_(net, ["2"])
    return net


def shared_with_zeros(m, x):
    inputs = x.new_zeros(len(x), 6), F.relu(m.a(x)), F.relu(m.b(x))
    return m.head(sum(F.relu(m.both(i)) for i in inputs))


def shared_module() -> nn.Module:
    both = nn.Linear(6, 6)
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), both, nn.ReLU(), both, nn.ReLU(), nn.Linear(6, 3)
    )


def shared_by_name() -> nn.Module:
    net = mlp(5, 6, 6, 6, 3)
    net[4].weight, net[4].bias = net[2].weight, net[2].bias
    return net


def convolutions() -> nn.Module:
    return nn.Sequential(
        conv(3, 4), nn.ReLU(), conv(4, 8, groups=2), nn.ReLU(), conv(8, 16, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2, stride=2, groups=4), nn.ReLU(), *head(8),
    )  # fmt: skip


def along(kind: type[nn.Module], pool: nn.Module) -> nn.Module:
    return nn.Sequential(
        kind(2, 4, 3), nn.ReLU(), kind(4, 5, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(5, 3)
    )


IMAGE = (3, 8, 8)
FLAT = (5,)
STEPS = (4, 5)

NETWORKS: dict[str, Network] = {
    # the two hidden widths
    "mlp": Network(lambda: mlp(5, 8, 6, 3), FLAT, 14, 14),
    "mlp_without_biases": Network(lambda: mlp(5, 8, 6, 3, bias=False), FLAT, 14, 14),
    "leaky": Network(lambda: mlp(5, 8, 6, 3, act=nn.LeakyReLU), FLAT, 14, 14),
    # channels of the convolutions 6 + 8, each one scale for its 9 features, and 10 hidden
    "vgg": Network(lambda: vgg(bn=False), IMAGE, 24, 24),
    # the same, of the norms instead of the convolutions
    "vgg_bn": Network(lambda: vgg(bn=True), IMAGE, 24, 24, (OUTPUT, BEFORE_BN)),
    # inside blocks 4 + 8 + 8; one stream of 8, of which 4 begin at the stem: convolutions are
    # stem 4, blocks 8 + 16 + 16
    **{
        f"resnet_a{'_bn' * bn}": Network(
            lambda bn=bn: resnet("A", bn=bn), IMAGE, 20 + 8, 44, (OUTPUT, *[BEFORE_BN] * bn)
        )
        for bn in (False, True)
    },
    # inside blocks 20; a stream of 4 and one of 8; one projection of 8 more
    **{
        f"resnet_b{'_bn' * bn}": Network(
            lambda bn=bn: resnet("B", bn=bn), IMAGE, 20 + 12, 44 + 8, (OUTPUT, *[BEFORE_BN] * bn)
        )
        for bn in (False, True)
    },
    # inside blocks 20; what stem and blocks give 4 + 4 + 8 + 8; projections of 4 + 8 + 8 more
    **{
        f"resnet_c{'_bn' * bn}": Network(
            lambda bn=bn: resnet("C", bn=bn), IMAGE, 20 + 24, 44 + 20, (OUTPUT, *[BEFORE_BN] * bn)
        )
        for bn in (False, True)
    },
    # 4 of the stem, 3 of each layer, whoever reads them
    "densenet": Network(
        lambda: Net(
            dense, stem=conv(3, 4), a=conv(4, 3), b=conv(7, 3), head=nn.Sequential(*head(10))
        ),
        IMAGE, 10, 10,
    ),
    # each norm has its own scale for each channel that it reads: 4 + 7 + 10
    "densenet_norm_first": Network(
        lambda: Net(
            dense_norm_first, stem=conv(3, 4), a=conv(4, 3), b=conv(7, 3), na=nn.BatchNorm2d(4),
            nb=nn.BatchNorm2d(7), nc=nn.BatchNorm2d(10), head=nn.Sequential(*head(10)),
        ),
        IMAGE, 21, 21, (OUTPUT, BEFORE_BN),
    ),
    # norms: stem 4, the first block 8 + 8 and 4 tied to the stem, the second 8 + 8 + 5
    "mobilenet": Network(
        lambda: mobilenet(nn.ReLU), IMAGE, 41, 45, (OUTPUT, BEFORE_BN)
    ),
    # only the second block's last norm has no ReLU6 after it or beside it
    "mobilenet_relu6": Network(
        lambda: mobilenet(nn.ReLU6), IMAGE, 5, 5, (OUTPUT, BEFORE_BN, "hardtanh", "added to what")
    ),
    # stem 8, unit 4 + 4 + 4, grouped convolution 8
    "shufflenet": Network(
        lambda: Net(
            shuffle, stem=conv(3, 8), first=conv(4, 4, 1), each=conv(4, 4, groups=4),
            last=conv(4, 4, 1), grouped=conv(8, 8, groups=2), head=nn.Sequential(*head(8)),
        ),
        IMAGE, 28, 28,
    ),
    # 4 above, 6 below, 4 of the transposed convolution, 5 of the join
    "unet": Network(
        lambda: Net(
            unet, high=conv(3, 4), low=conv(4, 6), up=nn.ConvTranspose2d(6, 4, 2, stride=2),
            join=conv(14, 5), last=conv(5, 2, 1),
        ),
        IMAGE, 19, 19,
    ),
    # norms 8 + 8 + 8, values 8, hidden 12; the stream is normalized, queries and keys meet
    **{
        f"vit_{form}": Network(
            lambda form=form: vit(form), (4, 6), 44, 44, (OUTPUT, "input of layer_norm", why)
        )
        for form, why in (
            ("fused", "query, key or mask of an attention"),
            ("torch", "query, key or mask of an attention"),
            ("by_hand", "a product of two activations"),
        )
    },
    # 6 units in each layer, which input and state weights both feed
    "rnn": Network(lambda: rnn(num_layers=2), STEPS, 12, 24),
    "rnn_without_biases": Network(lambda: rnn(num_layers=2, bias=False), STEPS, 12, 24),
    # 6 units in each direction
    "rnn_both_ways": Network(lambda: rnn(bidirectional=True), STEPS, 12, 24),
    # 6 units, fed by two layers at every step
    "rnn_as_a_loop": Network(
        lambda: Net(loop, into=nn.Linear(5, 6), state=nn.Linear(6, 6), head=nn.Linear(6, 3)),
        STEPS, 6, 12,
    ),
    # the same, without the state's layer in the first step
    "rnn_from_the_first": Network(
        lambda: Net(
            loop_from_the_first, into=nn.Linear(5, 6), state=nn.Linear(6, 6), head=nn.Linear(6, 3)
        ),
        STEPS, 6, 12,
    ),
    # 4, grouped 8, two for each of 8, transposed in groups 8
    "convolutions": Network(convolutions, IMAGE, 36, 36),
    "conv1d": Network(lambda: along(nn.Conv1d, nn.AdaptiveMaxPool1d(1)), (2, 9), 9, 9),
    "conv3d": Network(lambda: along(nn.Conv3d, nn.AdaptiveAvgPool3d(1)), (2, 6, 5, 6), 9, 9),
    # 6 + 4; slopes stay
    "prelu": Network(
        lambda: nn.Sequential(conv(3, 6), nn.PReLU(6), conv(6, 4), nn.PReLU(), *head(4)),
        IMAGE, 10, 10,
    ),
    # stream 6, of stem and LayerScale; hidden 7; before LayerScale 6
    "layer_scale": Network(
        lambda: Net(
            lambda m, x: m.head(F.relu(m.stem(x)) + m.scale * m.body(F.relu(m.stem(x)))),
            stem=nn.Linear(5, 6), body=mlp(6, 7, 6), scale=nn.Parameter(torch.randn(6)),
            head=nn.Linear(6, 3),
        ),
        FLAT, 19, 25,  # the stem is called twice, and counts once
    ),
    # added to each channel: it goes with the channel
    "raw_parameter": Network(
        lambda: Net(
            lambda m, x: m.head(F.relu(m.stem(x) + m.raw)), stem=nn.Linear(5, 6),
            raw=nn.Parameter(torch.randn(1, 6)), head=nn.Linear(6, 3),
        ),
        FLAT, 6, 6,
    ),
    # one number added to all channels ties them
    "raw_number": Network(
        lambda: Net(
            lambda m, x: m.head(F.relu(m.stem(x) + m.raw)), stem=nn.Linear(5, 6),
            raw=nn.Parameter(torch.tensor(0.7)), head=nn.Linear(6, 3),
        ),
        FLAT, 1, 6,
    ),
    # 6 that are gated, 4 that make the gate
    "squeeze_and_excite": Network(
        lambda: Net(
            gate_by_squeezing, conv=conv(3, 6), squeeze=nn.Linear(6, 4), excite=nn.Linear(4, 6),
            head=nn.Sequential(*head(6)),
        ),
        IMAGE, 10, 10, (OUTPUT, "sigmoid"),
    ),
    # half of 12 are values
    "glu": Network(
        lambda: nn.Sequential(nn.Linear(5, 12), nn.GLU(), nn.Linear(6, 3)),
        FLAT, 6, 6, (OUTPUT, "gate of a glu"),
    ),
    # 7 that are gated
    "swiglu": Network(
        lambda: Net(
            lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), gate=nn.Linear(5, 7),
            up=nn.Linear(5, 7), down=nn.Linear(7, 3),
        ),
        FLAT, 7, 7, (OUTPUT, "silu"),
    ),
    # both factors have a scale of their own
    "product": Network(
        lambda: Net(
            lambda m, x: m.down(m.gate(x) * m.up(x)), gate=nn.Linear(5, 7), up=nn.Linear(5, 7),
            down=nn.Linear(7, 3),
        ),
        FLAT, 0, 0, (OUTPUT, "a product of two activations"),
    ),
    "gelu": Network(lambda: mlp(5, 8, 6, 3, act=nn.GELU), FLAT, 0, 0, (OUTPUT, "gelu")),
    # only the last of three convolutions: the second's weights are computed
    "standardized": Network(weights_from_parameters, IMAGE, 6, 6, (OUTPUT, "conv2d are computed")),
    # what one layer gives, it reads: 6 of the stem and of the layer, which counts once
    "shared": Network(
        lambda: Net(
            lambda m, x: m.head(F.relu(m.both(F.relu(m.both(F.relu(m.stem(x))))))),
            stem=nn.Linear(5, 6), both=nn.Linear(6, 6), head=nn.Linear(6, 3),
        ),
        FLAT, 6, 12,
    ),
    # what all zeros come from has any scale, but what comes at other times must share one: 6 of
    # both stems, 4 of the layer, which is used three times
    "shared_with_zeros": Network(
        lambda: Net(
            shared_with_zeros, a=nn.Linear(5, 6), b=nn.Linear(5, 6), both=nn.Linear(6, 4),
            head=nn.Linear(4, 3),
        ),
        FLAT, 10, 16,
    ),
    # the same under two names
    "shared_by_name": Network(shared_by_name, FLAT, 6, 12),
    "shared_module": Network(shared_module, FLAT, 6, 12),
    # a decoder that is the encoder's transpose
    "shared_transposed": Network(
        lambda: Net(
            lambda m, x: F.linear(F.relu(F.linear(x, m.weight)), m.weight.t()),
            weight=nn.Parameter(torch.randn(6, 5)),
        ),
        FLAT, 0, 0, ("weight is used in several ways", OUTPUT),
    ),
    # both halves of one parameter are layers: 4 + 4
    "halves": Network(
        lambda: Net(
            lambda m, x: m.head(
                torch.cat([F.relu(F.linear(x, w)) for w in m.weight.chunk(2)], 1)
            ),
            weight=nn.Parameter(torch.randn(8, 5)), head=nn.Linear(8, 3),
        ),
        FLAT, 8, 8,
    ),
    # 6 features, 7 hidden, whatever the token
    "embedding": Network(
        lambda: nn.Sequential(
            nn.Embedding(10, 6), nn.Linear(6, 7), nn.ReLU(), nn.Flatten(), nn.Linear(21, 3)
        ),
        (3,), 13, 13, tokens=10,
    ),
    # three layers share the 6 scales
    "in_place": Network(
        lambda: Net(
            in_place, a=nn.Linear(5, 6), b=nn.Linear(5, 6), c=nn.Linear(5, 6), head=nn.Linear(6, 3)
        ),
        FLAT, 6, 18,
    ),
    # 4 + 4, side by side
    "into_slices": Network(
        lambda: Net(into_slices, a=nn.Linear(5, 4), b=nn.Linear(5, 4), head=nn.Linear(8, 3)),
        FLAT, 8, 8,
    ),
    # two layers share the 6 scales
    "read_by_an_older_view": Network(
        lambda: Net(
            read_by_an_older_view, a=nn.Linear(5, 6), b=nn.Linear(5, 6), head=nn.Linear(6, 3)
        ),
        FLAT, 6, 12,
    ),
    # 6 before the scale, 6 behind it, which is what the older view shows then
    "scaled_under_an_older_view": Network(
        lambda: Net(
            scaled_under_an_older_view, a=nn.Linear(5, 6), scale=nn.Parameter(torch.randn(6)),
            head=nn.Linear(6, 3),
        ),
        FLAT, 12, 12,
    ),
    # a norm and a convolution share the 6 scales
    "in_place_with_norms": Network(
        lambda: Net(
            in_place_with_norms, conv=conv(3, 6), norm=nn.BatchNorm2d(6), other=conv(6, 6),
            head=nn.Sequential(*head(6)),
        ),
        IMAGE, 6, 12, (OUTPUT, "input of"),
    ),
    # 6 of the norm, 4 of the convolution behind
    "group_norm": Network(
        lambda: around(lambda n: nn.GroupNorm(2, n)), IMAGE, 10, 10, (OUTPUT, "input of group_norm")
    ),
    "instance_norm": Network(
        lambda: around(lambda n: nn.InstanceNorm2d(n, affine=True)),
        IMAGE, 10, 10, (OUTPUT, "input of instance_norm"),
    ),
    # without weights of its own, it has no scale to move
    "instance_norm_plain": Network(
        lambda: around(nn.InstanceNorm2d), IMAGE, 4, 4, (OUTPUT, "input of instance_norm")
    ),
    # 6 x 8 x 8 weights, of which the convolution behind ties those of a channel
    "layer_norm": Network(
        lambda: around(lambda n: nn.LayerNorm([n, 8, 8])),
        IMAGE, 10, 384 + 4, (OUTPUT, "input of layer_norm"),
    ),
    "rms_norm": Network(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.RMSNorm(6), nn.ReLU(), nn.Linear(6, 3)),
        FLAT, 6, 6, (OUTPUT, "input of rms_norm"),
    ),
    # 8 tied to 4 by the sum, 8 tied to 2 by pixel_shuffle, 3
    "shapes": Network(
        lambda: Net(
            shapes, first=conv(3, 8), second=conv(8, 8), last=conv(2, 3),
            head=nn.Sequential(*head(3)),
        ),
        IMAGE, 9, 19,
    ),
}  # fmt: skip


@cache
def found(name: str, batch: int = 2, train: bool = True) -> Scales:
    """What is found in a network, once."""
    network = NETWORKS[name]
    return find_scales(network.build().train(train), network.inputs(batch))


FREE = [name for name, network in NETWORKS.items() if network.scales]
