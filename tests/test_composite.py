"""Attention and recurrent layers as the linear layers that they are made of."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence

import evenkeel as ek
from evenkeel.analog import PCM, Converter, Device, Gain, Periphery, count, program
from evenkeel.errors import ConfigError, ShapeError
from evenkeel.layers import composite, expanded, register_composite

close = torch.testing.assert_close
T, N, E = 4, 3, 8


def same(found, wanted):
    flat = torch.utils._pytree.tree_leaves
    for a, b in zip(flat(found), flat(wanted), strict=True):
        assert a is b is None or a.shape == b.shape
        if a is not None:
            close(a, b, rtol=1e-4, atol=1e-5)


ATTENTION = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 5, "vdim": 6},
    "extras": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("average", [True, False])
def test_attention_is_the_layer(name, average):
    options = ATTENTION[name]
    layer = nn.MultiheadAttention(E, 2, **options).eval()
    nn.init.normal_(layer.out_proj.bias) if layer.out_proj.bias is not None else None
    twin = expanded(layer)
    q = torch.randn(T, N, E)
    k, v = torch.randn(5, N, options.get("kdim", E)), torch.randn(5, N, options.get("vdim", E))
    if options.get("batch_first"):
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    padding = torch.zeros(N, 5, dtype=torch.bool)
    padding[1, 3:] = True
    masks = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(T, 5, dtype=torch.bool).triu(1)},
        "added": {"attn_mask": torch.randn(N * 2, T, 5)},
        "no weights": {"need_weights": False},
    }
    for given in masks.values():
        same(twin(q, k, v, average_attn_weights=average, **given),
             layer(q, k, v, average_attn_weights=average, **given))  # fmt: skip


def test_attention_of_one_sample():
    layer = nn.MultiheadAttention(E, 4).eval()
    x, padding = torch.randn(T, E), torch.tensor([False, False, True, False])
    twin = expanded(layer)
    same(twin(x, x, x), layer(x, x, x))
    same(twin(x, x, x, key_padding_mask=padding), layer(x, x, x, key_padding_mask=padding))


RECURRENT = [
    (kind, options)
    for kind, options in itertools.product(
        (nn.LSTM, nn.GRU, nn.RNN),
        ({}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}),
    )
] + [(nn.LSTM, {"proj_size": 3, "num_layers": 2}), (nn.RNN, {"nonlinearity": "relu"})]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "options"), RECURRENT, ids=str)
def test_recurrent_layers_are_the_layers(kind, options):
    layer = kind(E, 6, **options).eval()
    twin, x = expanded(layer), torch.randn(T, N, E)
    same(twin(x), layer(x))
    _, state = layer(x)
    state = torch.utils._pytree.tree_map(torch.randn_like, state)
    same(twin(x, state), layer(x, state))
    alone = x[:, 0]
    same(twin(alone), layer(alone))


@pytest.mark.parametrize(
    "cell",
    [
        nn.LSTMCell(E, 6),
        nn.GRUCell(E, 6, bias=False),
        nn.RNNCell(E, 6),
        nn.RNNCell(E, 6, nonlinearity="relu"),
    ],
    ids=str,
)
def test_cells_are_the_cells(cell):
    twin, x = expanded(cell), torch.randn(N, E)
    same(twin(x), cell(x))
    state = torch.utils._pytree.tree_map(torch.randn_like, cell(x))
    same(twin(x, state), cell(x, state))
    same(twin(x[0]), cell(x[0]))


def test_packed_sequences_are_refused_in_words():
    twin = expanded(nn.LSTM(E, 6))
    with pytest.raises(ShapeError, match="padded, not packed"):
        twin(pack_sequence([torch.randn(3, E), torch.randn(2, E)]))


class Own(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def test_what_has_a_forward_of_its_own_is_not_guessed_at():
    assert expanded(Own(2, 2)) is None
    assert expanded(nn.Linear(2, 2)) is None
    layer = nn.GRU(2, 2)
    layer.forward = lambda x: x
    assert expanded(layer) is None


def test_a_kind_of_ones_own(monkeypatch):
    monkeypatch.setattr(composite, "_KINDS", dict(composite._KINDS))
    register_composite(Own, lambda layer: nn.Sequential(composite.linear(layer.weight_ih_l0, None)))
    assert expanded(Own(2, 3))(torch.ones(1, 2)).shape == (1, 12)


# ---- on a chip


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, E)
        self.lstm = nn.LSTM(E, E, batch_first=True)
        layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(E, 3)

    def forward(self, tokens, padding=None):
        x, _ = self.lstm(self.embed(tokens))
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_reader_of_text_is_all_on_the_chip(padded, grad):
    net = Reader().eval()
    tokens = torch.randint(0, 11, (N, 5))
    padding = torch.zeros(N, 5, dtype=torch.bool)
    padding[0, 4] = padded
    given = (tokens, padding) if padded else (tokens,)
    with torch.set_grad_enabled(grad):
        wanted, chip = net(*given), program(net, Gain(1.0), seed=0)
        # torch's own fast path leaves out what is padded; the others only do not look at it.
        if padded and not grad:
            net.encoder.use_nested_tensor = False
            wanted = net(*given)
        same(chip(*given), wanted)
        aged = program(net, PCM(), seed=0).age_(60.0)(*given)
    assert set(chip.digital) == {"embed"}
    names = [path for path, _ in chip.arrays()]
    assert {"lstm.ih_l0", "lstm.hh_l0", "encoder.layers.1.self_attn.k_proj", "head"} <= set(names)
    assert len(names) == 2 + 2 * 6 + 1
    assert 0 < (aged - wanted).abs().max() < 1


def test_only_some_of_its_layers():
    net = Reader().eval()
    chip = program(net, Gain(0.5), seed=0, layers=["encoder.layers.0.self_attn.*"])
    assert len(list(chip.arrays())) == 4
    assert chip.digital["lstm.ih_l0"] == "left out by `layers`"
    tokens = torch.randint(0, 11, (N, 5))
    assert not torch.allclose(chip(tokens), net(tokens))
    assert isinstance(chip.model.lstm.ih_l0, nn.Linear)  # digital, and nothing goes past it
    counts = count(chip, tokens)
    assert counts.digital["lstm.hh_l0"] == 5 * E * 4 * E


def test_a_layer_in_two_places_is_one_array():
    lstm = nn.LSTM(E, E)
    net = nn.ModuleDict({"a": lstm, "b": lstm})
    chip = program(net, PCM(), seed=0)
    assert chip.model["a"] is chip.model["b"]
    assert len(list(chip.arrays())) == 2


# ---- what a fresh look found

COARSE = Device(Gain(1.0), periphery=Periphery(dac=Converter(2), adc=Converter(2)))


@pytest.mark.parametrize("layers", [["linear1", "linear2"], None])
def test_torch_does_not_compute_past_the_arrays(layers):
    net, x = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True).eval(), torch.randn(N, 5, E)
    chip = program(net, COARSE, seed=0, layers=layers)
    slow = chip(x)
    with torch.no_grad():
        close(chip(x), slow)
    assert (slow - net(x)).abs().max() > 0.05


class Sub(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_what_is_not_taken_apart_stays_digital_as_a_whole():
    net, x = nn.ModuleDict({"a": Sub(E, 2), "b": nn.Linear(E, E)}).eval(), torch.randn(5, N, E)
    chip = program(net, COARSE, seed=0)
    assert [path for path, _ in chip.arrays()] == ["b"]
    assert "forward of its own" in chip.digital["a"]
    same(chip.model["a"](x, x, x), net["a"](x, x, x))


def test_weights_that_a_hook_makes_are_refused():
    pruned = nn.MultiheadAttention(E, 2)
    prune.random_unstructured(pruned, "in_proj_weight", 0.5)
    with pytest.raises(ConfigError, match="'in_proj_weight' of a MultiheadAttention is made by a"):
        program(pruned, PCM(), seed=0)


def test_a_samples_range_is_its_own():
    chip = program(
        nn.LSTM(E, 6, batch_first=True, num_layers=2),
        Device(Gain(1.0), periphery=Periphery(dac=Converter(4), adc=Converter(5))),
        seed=0,
    )
    x = torch.randn(4, 7, E)
    x[3] *= 100
    close(chip(x)[0][:3], chip(x[:3])[0])


def test_hooks_and_attributes_are_those_of_the_layer():
    net = nn.LSTM(E, 6, bidirectional=True).requires_grad_(False)
    net.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    x, chip = torch.randn(T, N, E), program(net, Gain(1.0), seed=0)
    same(chip(x), net(x))
    chip.model.flatten_parameters()
    assert (chip.model.bidirectional, chip.model.input_size, chip.model.hidden_size) == (True, E, 6)
    assert not any(p.requires_grad for p in chip.parameters())


def test_what_torch_refuses_is_refused():
    x = torch.randn(T, N, E)
    with pytest.raises(ShapeError, match="give the mask too"):
        expanded(nn.MultiheadAttention(E, 2))(x, x, x, is_causal=True)
    lstm = expanded(nn.LSTM(E, 6))
    with pytest.raises(ShapeError, match=r"States must be \(1, 3"):
        lstm(x, (torch.zeros(1, 1, 6), torch.zeros(1, 1, 6)))
    with pytest.raises(ShapeError, match="one step in time"):
        lstm(x[:0])


class Twice(nn.Module):
    """Recurrent, then attention, one layer of it in two places."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.again = self.attention
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        y, _ = self.rnn(x)
        for attend in (self.attention, self.again):
            y, _ = attend(y, y, y)
        return self.head(y.mean(1))


def test_a_network_that_is_taken_apart_computes_what_it_did():
    network, x = Twice().eval(), torch.randn(4, 5, 8)
    y = network(x)
    assert ek.layers.take_apart_(network) == ["rnn", "attention", "again"]
    assert network.again is network.attention
    torch.testing.assert_close(network(x), y, atol=1e-5, rtol=1e-5)
    assert ek.layers.take_apart_(network) == []


def test_taken_apart_every_matrix_is_reached():
    batches = [torch.randn(16, 5, 8) for _ in range(2)]
    whole, apart = Twice().eval(), Twice().eval()
    ek.layers.take_apart_(apart)
    assert list(ek.analog.clip_weights_(whole)) == ["attention.out_proj", "head"]
    assert {"rnn", "attention", "head"} == {p.split(".")[0] for p in ek.analog.clip_weights_(apart)}
    y = apart(batches[0])
    done = ek.balance.balance_arrays_(apart, batches)
    torch.testing.assert_close(apart(batches[0]), y, atol=1e-5, rtol=1e-4)
    assert sum(path.startswith(("rnn", "attention")) for path in done.noise_after) >= 6


def test_a_stack_that_is_taken_apart_does_not_compute_past_its_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    network = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    y = network(x, src_key_padding_mask=mask)
    ek.layers.take_apart_(network)
    seen = []
    network.layers[0].self_attn.q_proj.register_forward_hook(lambda *given: seen.append(1))
    z = network(x, src_key_padding_mask=mask)
    torch.testing.assert_close(z[~mask], y[~mask], atol=1e-5, rtol=1e-5)
    assert seen


def test_what_is_itself_such_a_layer_is_refused():
    with pytest.raises(ConfigError, match="LSTM cannot be taken apart"):
        ek.layers.take_apart_(nn.LSTM(4, 4))


def test_a_refusal_takes_nothing_apart():
    network = nn.ModuleDict({"r": nn.LSTM(4, 4), "a": nn.MultiheadAttention(4, 2)})
    prune.l1_unstructured(network.a, "in_proj_weight", 0.3)
    with pytest.raises(ConfigError, match="made by a hook"):
        ek.layers.take_apart_(network)
    assert type(network.r) is nn.LSTM


def test_what_is_taken_apart_has_no_parameters_without_use():
    network = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)})
    ek.layers.take_apart_(network)
    assert {name.split(".")[1] for name, _ in network.named_parameters()} == {
        "q_proj", "k_proj", "v_proj", "out_proj",
    }  # fmt: skip


def test_a_layer_of_several_matrices_is_chosen_by_its_path():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    chip = program(Two(), Gain(1.0), seed=0, layers=["rnn"])
    assert list(chip.digital) == ["head"]
    assert all(path.startswith("rnn.") for path, _ in chip.arrays())
    one = next(path for path, _ in chip.arrays())
    few = program(Two(), Gain(1.0), seed=0, layers=[one, "head"])
    assert {path for path, _ in few.arrays()} == {one, "head"}
