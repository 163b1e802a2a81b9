"""Codes, attention and the key-value memory."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evenkeel.errors import ConfigError, ShapeError
from evenkeel.memory import (
    CODES,
    SHARPENINGS,
    EpisodeSampler,
    HDController,
    KeyValueMemory,
    attention,
    encode,
    similarity,
    softabs,
)

DOUBLE = torch.float64
D = 512


def vectors(*shape):
    return torch.randn(*shape, D, dtype=DOUBLE)


def written(n=20, classes=5, **options):
    memory = KeyValueMemory(D, dtype=DOUBLE, **options)
    memory.write(vectors(n), [f"class {i % classes}" for i in range(n)])
    return memory


# ---- the published values


def test_softabs_has_its_published_values_and_derivative():
    alpha = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 1], dtype=DOUBLE, requires_grad=True)
    expected = [0.013386, 0.020459, 0.076411, 0.500045, 0.924146, 0.993307]
    assert softabs(alpha).tolist() == pytest.approx(expected, abs=5e-7)
    torch.testing.assert_close(softabs(-alpha), softabs(alpha))
    (slope,) = torch.autograd.grad(softabs(alpha).sum(), alpha)
    up, down = (torch.sigmoid(10 * (sign * alpha - 0.5)) for sign in (1, -1))
    torch.testing.assert_close(slope, 10 * (up * (1 - up) - down * (1 - down)))
    assert slope[0] == 0


def test_the_identities_between_codes():
    a, b = vectors(30), vectors(40)
    x, y = encode(a, "bipolar"), encode(b, "bipolar")
    p, q = encode(a, "binary"), encode(b, "binary")
    hamming = (x[:, None] != y).sum(-1)
    torch.testing.assert_close(x @ y.T, (D - 2 * hamming).to(DOUBLE))
    counts = p.sum(1)[:, None], q.sum(1)
    torch.testing.assert_close(p @ q.T, (counts[0] + counts[1] - hamming) / 2)
    both = encode(a, "complement") @ encode(b, "complement").T
    torch.testing.assert_close(both, (D - hamming).to(DOUBLE))
    bipolar = similarity(x, y, "bipolar")
    torch.testing.assert_close(bipolar, F.cosine_similarity(x[:, None], y, dim=-1))
    torch.testing.assert_close(
        similarity(encode(a, "complement"), encode(b, "complement"), "complement"), bipolar
    )


def test_binary_is_bipolar_shifted_where_half_of_all_bits_are_set():
    order = torch.stack([torch.randperm(D) for _ in range(9)])
    x = torch.where(order < D // 2, 1.0, -1.0).to(DOUBLE)
    alpha = similarity(encode(x, "bipolar"), encode(x, "bipolar"), "bipolar")
    shifted = similarity(encode(x, "binary"), encode(x, "binary"), "binary")
    torch.testing.assert_close(shifted, (alpha + 1) / 2)


def test_noise_of_the_keys_moves_similarity_by_sigma_over_the_root_of_d():
    x, y = encode(vectors(2000), "bipolar"), encode(vectors(2000), "bipolar")
    noisy = y * (1 + 0.3 * torch.randn_like(y))
    moved = ((x * noisy).sum(1) - (x * y).sum(1)) / D
    assert moved.std().item() == pytest.approx(0.3 / math.sqrt(D), rel=0.05)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_zero_is_on_the_lower_side_and_the_dtype_stays(code, dtype):
    coded = encode(torch.tensor([[0.0, -0.0, 1e-3]], dtype=dtype), code)
    assert coded.dtype == dtype
    low = {"real": 0.0, "bipolar": -1.0}.get(code, 0.0)
    assert coded[0, :2].tolist() == [low, low]


# ---- attention


@pytest.mark.parametrize("sharpening", SHARPENINGS)
def test_attention_sums_to_one_and_is_a_gradient_right(sharpening):
    alpha = (2 * torch.rand(3, 4, 6, dtype=DOUBLE) - 1).requires_grad_()
    weights = attention(alpha, sharpening)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, dtype=DOUBLE))
    assert (weights >= 0).all()
    assert torch.autograd.gradcheck(lambda a: attention(a, sharpening), alpha)


@pytest.mark.parametrize("sharpening", ["abs", "identity"])
def test_where_there_is_nothing_to_choose_by_all_are_alike(sharpening):
    alpha = torch.zeros(2, 4, requires_grad=True)
    weights = attention(alpha, sharpening)
    assert weights.tolist() == [[0.25] * 4] * 2
    weights.sum().backward()
    assert alpha.grad.isfinite().all()


def test_softmax_is_softmax_of_what_is_stiffened():
    alpha = 2 * torch.rand(3, 6, dtype=DOUBLE) - 1
    torch.testing.assert_close(attention(alpha, "softmax", 7.0), (7 * alpha).softmax(-1))
    assert attention(1e4 * alpha, "softmax").isfinite().all()


# ---- the memory


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("read_out", ["sum", "nearest"])
def test_it_reads_as_the_equations_say(code, read_out):
    memory, queries = written(code=code, read_out=read_out), vectors(2, 3)
    reading = memory.read(queries)
    assert reading.scores.shape == (2, 3, 5)
    assert reading.attention.shape == reading.similarity.shape == (2, 3, 20)
    alpha = similarity(encode(queries, code), memory.keys, code)
    weights = attention(alpha, memory.sharpening)
    for c in range(5):
        own = weights[..., torch.arange(20) % 5 == c]
        expected = own.sum(-1) if read_out == "sum" else own.amax(-1)
        torch.testing.assert_close(reading.scores[..., c], expected)
    assert reading.labels == [f"class {i}" for i in reading.scores.argmax(-1).flatten().tolist()]


@pytest.mark.parametrize("prototypes", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_what_was_written_is_recalled(code, prototypes):
    memory, keys = KeyValueMemory(D, code=code, prototypes=prototypes), torch.randn(50, D)
    memory.write(keys, range(50))
    assert memory.read(keys + 0.5 * torch.randn(50, D)).labels == list(range(50))


def test_complement_reads_as_bipolar_exactly():
    keys, labels = vectors(30), [i % 6 for i in range(30)]
    queries, read = vectors(100), []
    for code in ("bipolar", "complement"):
        memory = KeyValueMemory(D, code=code, dtype=DOUBLE)
        memory.write(keys, labels)
        read.append(memory.read(queries))
    torch.testing.assert_close(read[0].scores, read[1].scores)
    assert read[0].labels == read[1].labels


@pytest.mark.parametrize("code", CODES)
def test_a_prototype_is_the_mean_or_the_majority(code):
    memory = written(15, 3, code=code, prototypes=True)
    rows, owners = memory.rows()
    assert owners.tolist() == [0, 1, 2]
    for c in range(3):
        own = memory.keys[memory.owners == c]
        if code == "real":
            expected = own.mean(0)
        elif code == "bipolar":
            expected = own.sum(0).sign()
        else:
            expected = (own.mean(0) > 0.5).to(DOUBLE)
        torch.testing.assert_close(rows[c], expected)
    assert memory.read(vectors(2)).attention.shape == (2, 3)


def test_a_split_prototype_is_what_zero_is():
    for code, expected in (("bipolar", [-1, 1]), ("binary", [0, 1]), ("complement", [0, 1, 1, 0])):
        memory = KeyValueMemory(2, code=code, prototypes=True)
        memory.write(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), ["a", "a"])
        assert memory.rows()[0].tolist() == [expected]


def test_writing_in_pieces_is_writing_at_once():
    keys, labels = vectors(9), list("abcabcdab")
    whole, parts = (KeyValueMemory(D, dtype=DOUBLE) for _ in range(2))
    whole.write(keys, labels)
    for start in range(0, 9, 2):
        parts.write(keys[start : start + 2], labels[start : start + 2])
    assert torch.equal(whole.keys, parts.keys)
    assert whole.classes == parts.classes == list("abcd")
    queries = vectors(4)
    assert torch.equal(whole.read(queries).scores, parts.read(queries).scores)


def test_forgetting_and_replacing():
    memory, queries = written(12, 4), vectors(5)
    without = KeyValueMemory(D, dtype=DOUBLE)
    keep = [i for i in range(12) if i % 4 != 1]
    without.write(memory.keys[keep], [f"class {i % 4}" for i in keep])
    memory.forget("class 1")
    assert memory.classes == without.classes == ["class 0", "class 2", "class 3"]
    torch.testing.assert_close(memory.read(queries).scores, without.read(queries).scores)
    new = vectors(2)
    memory.replace("class 2", new)
    assert len(memory) == 3 + 2 + 3
    assert memory.read(new).labels == ["class 2"] * 2
    assert memory.classes == without.classes


def test_gradients_reach_queries_and_keys():
    keys, queries = vectors(4)[:, :6].clone(), vectors(3)[:, :6].clone()

    def scores(keys, queries):
        memory = KeyValueMemory(6, dtype=DOUBLE)
        memory.write(keys, [0, 1, 0, 2])
        return memory.read(queries).scores

    leaves = [t.requires_grad_() for t in (keys, queries)]
    assert torch.autograd.gradcheck(scores, leaves)
    memory = KeyValueMemory(6, dtype=DOUBLE)
    memory.write(keys.detach(), [0, 1, 0, 2])
    memory.read(queries).scores[:, 0].sum().backward()
    assert queries.grad.abs().max() > 0
    assert keys.grad is None


# ---- a citizen


@pytest.mark.parametrize("code", CODES)
def test_state_copies_and_pickles(code):
    memory, queries = written(code=code), vectors(3)
    other = KeyValueMemory(D, code=code, dtype=DOUBLE)
    other.write(vectors(2), ["gone", "too"])
    other.load_state_dict(memory.state_dict())
    for same in (other, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert same.classes == memory.classes
        assert torch.equal(same.read(queries).scores, memory.read(queries).scores)
    other.forget("class 0")
    assert len(memory) == 20


def test_it_compiles():
    memory, queries = written(), vectors(3)
    compiled = torch.compile(lambda q: memory.read(q).scores, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(queries), memory.read(queries).scores)


def test_labels_of_any_kind():
    memory = KeyValueMemory(D, dtype=DOUBLE)
    memory.write(vectors(2), torch.tensor([7, 3]))
    memory.write(vectors(2), [("a", 1), None])
    assert memory.classes == [7, 3, ("a", 1), None]


# ---- what is refused


def unchanged(memory, action, error, says):
    before = memory.state_dict()
    with pytest.raises(error, match=says):
        action()
    after = memory.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in ("keys", "owners"))
    assert before["_extra_state"] == after["_extra_state"]


@pytest.mark.parametrize(
    ("keys", "labels", "says"),
    [
        (torch.zeros(2, 3), ["a", "b"], r"512 dimensions.*\(2, 3\)"),
        (torch.zeros(2, D), ["a"], r"a label for each.*\(2, 512\) and 1 labels"),
        (torch.zeros(D), ["a"], "a label for each"),
        (torch.full((3, D), math.nan), ["a", "b", "c"], "NaN or infinity in 3 of 3"),
        (torch.full((1, D), math.inf), ["new"], "Look at the encoder"),
    ],
)
def test_a_write_that_fails_leaves_it_as_it_was(keys, labels, says):
    memory = written()
    unchanged(memory, lambda: memory.write(keys, labels), ShapeError, says)
    unchanged(memory, lambda: memory.replace("class 1", keys[..., :3]), ShapeError, "512")


def test_other_refusals():
    memory = written()
    unchanged(memory, lambda: memory.forget("class"), ConfigError, "no class 'class'.*class 0")
    unchanged(memory, lambda: memory.replace("x", vectors(1)), ConfigError, "no class 'x'")
    with pytest.raises(ConfigError, match="empty: write some keys"):
        KeyValueMemory(D).read(torch.zeros(1, D))
    with pytest.raises(ShapeError, match="queries of 512 dimensions"):
        memory.read(torch.zeros(4, 5))
    with pytest.raises(ShapeError, match="queries that are finite"):
        memory.read(torch.full((2, D), math.nan))
    with pytest.raises(ConfigError, match="Did you mean 'bipolar'"):
        KeyValueMemory(4, code="bipolr")
    with pytest.raises(ConfigError, match="Unknown sharpening 'soft'"):
        KeyValueMemory(4, sharpening="soft")
    with pytest.raises(ConfigError, match="Unknown read_out"):
        KeyValueMemory(4, read_out="max")
    with pytest.raises(ConfigError, match="dim must be 1 or more"):
        KeyValueMemory(0)


# ---- episodes

LABELS = [f"letter {i % 30}" for i in range(30 * 20)]


def test_an_episode_is_of_its_classes_and_asks_nothing_that_was_written():
    sampler = EpisodeSampler(LABELS, 5, 2, 7)
    for episode in [sampler[k] for k in range(50)]:
        assert len(set(episode.classes)) == 5
        for indices, labels, each in (
            (episode.support, episode.support_labels, 2),
            (episode.queries, episode.query_labels, 7),
        ):
            assert torch.bincount(labels).tolist() == [each] * 5
            told = [episode.classes[c] for c in labels.tolist()]
            assert [LABELS[i] for i in indices.tolist()] == told
        everything = torch.cat([episode.support, episode.queries])
        assert len(everything.unique()) == 5 * 9


def test_an_episode_is_the_same_by_its_number():
    before = torch.get_rng_state()
    sampler, again = (EpisodeSampler(LABELS, 5, 1, 3, seed=4) for _ in range(2))
    all_of_them = list(sampler)
    for k in (999, 3, 0):
        assert torch.equal(again[k].support, all_of_them[k].support)
        assert torch.equal(again[k].queries, all_of_them[k].queries)
    assert torch.equal(torch.get_rng_state(), before)
    other = EpisodeSampler(LABELS, 5, 1, 3, seed=5)
    assert not torch.equal(other[0].support, sampler[0].support)
    numbers = EpisodeSampler(torch.arange(600) % 30, 5, 1, 3, seed=4)
    assert torch.equal(numbers[7].support, sampler[7].support)


def test_all_classes_and_samples_are_drawn_alike():
    sampler = EpisodeSampler(LABELS, 6, 2, 3, episodes=1500)
    seen = torch.zeros(600)
    for episode in sampler:
        seen[episode.support] += 1
    expected = 1500 * 12 / 600
    assert (seen - expected).square().mean().item() == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((31, 1, 1), "31 ways needs as many classes; the samples have 30"),
        ((5, 15, 6), "15 shots and 6 queries, 21 samples; 30 of 30 have fewer, 'letter 0' has 20"),
        ((0, 1, 1), "ways must be 1 or more; got 0"),
        ((5, 1, 0), "queries must be 1 or more"),
    ],
)
def test_episodes_that_cannot_be(options, says):
    with pytest.raises(ConfigError, match=says):
        EpisodeSampler(LABELS, *options)
    with pytest.raises(IndexError, match="0 to 999; got 1000"):
        EpisodeSampler(LABELS, 2, 1, 1)[1000]


# ---- the controller


def test_the_controller_is_the_published_one():
    net = HDController()
    each = [3_328, 409_728, 147_584, 147_584, 1_049_088]
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [sum(p.numel() for p in m.parameters()) for m in layers] == each
    shapes = []
    for layer in layers:
        layer.register_forward_hook(lambda m, args, y: shapes.append(tuple(y.shape[1:])))
    net(torch.zeros(1, 1, 32, 32))
    sizes = [(128, 28, 28), (128, 24, 24), (128, 10, 10), (128, 8, 8), (512,)]
    assert shapes == sizes
    macs = sum(m.weight[0].numel() * math.prod(s) for m, s in zip(layers, shapes, strict=True))
    assert macs == pytest.approx(263.7e6, rel=1e-3)


def test_an_episode_through_controller_and_memory_trains_the_controller():
    net = HDController(32, channels=8)
    images, labels = torch.rand(60, 1, 32, 32), [i % 6 for i in range(60)]
    episode = EpisodeSampler(labels, 3, 2, 2)[0]
    memory = KeyValueMemory(32)
    with torch.no_grad():
        memory.write(net(images[episode.support]), episode.support_labels)
    scores = memory.read(net(images[episode.queries])).scores
    truth = F.one_hot(episode.query_labels, 3).float()
    F.binary_cross_entropy(scores.clamp(1e-7, 1 - 1e-7), truth).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    ("code", "measure"), [("real", "dot"), ("binary", "cosine"), ("bipolar", "cosine")]
)
def test_another_measure_than_the_codes_own(code, measure):
    memory = KeyValueMemory(D, code=code, measure=measure, dtype=DOUBLE)
    keys, queries = vectors(6), vectors(3)
    memory.write(keys, range(6))
    a, b = encode(queries, code), encode(keys, code)
    expected = {
        "real": a @ b.T,
        "binary": F.cosine_similarity(a[:, None], b, dim=-1),
        "bipolar": F.cosine_similarity(a[:, None], b, dim=-1),
    }
    torch.testing.assert_close(memory.read(queries).similarity, expected[code])


def test_an_unknown_measure_is_refused():
    with pytest.raises(ConfigError, match=r"Unknown measure 'cosin'.*cosine"):
        KeyValueMemory(D, measure="cosin")
