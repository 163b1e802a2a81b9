"""Search among binary vectors."""

import copy
import pickle

import numpy as np
import pytest
import torch

from evenkeel.bench import memory as bench
from evenkeel.errors import ConfigError, MissingExtraError, ShapeError
from evenkeel.memory import BitIndex, CrossbarMemory, KeyValueMemory, key_value, search

BACKENDS = ("faiss", "torch")


def hamming(queries, keys):
    return ((queries > 0)[:, None] != (keys > 0)).sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [1, 63, 64, 200, 512])
@pytest.mark.parametrize("many", [5, search.FEW + 4])
def test_the_nearest_are_those_of_all_distances(backend, dim, many, monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 7)  # several blocks, the last not full
    keys, queries = torch.randn(40, dim), torch.randn(many, dim)
    index = BitIndex(dim, backend)
    index.add(keys[:13])
    index.add(keys[13:])
    distances, rows = index.search(queries, 4)
    every = hamming(queries, keys)
    assert len(index) == 40
    torch.testing.assert_close(distances, every.sort(1).values[:, :4])
    torch.testing.assert_close(every.gather(1, rows), distances)
    assert all(len(set(row)) == 4 for row in rows.tolist())


@pytest.mark.parametrize("dim", [64, 512, 70_016])
@pytest.mark.parametrize("onednn", [True, False])
def test_distances_are_the_same_by_counting_and_by_products(dim, onednn, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    bits = torch.randint(0, 2, (13, dim), dtype=torch.uint8)
    bits[0], bits[1] = 0, 1
    words = np.packbits(bits.numpy(), axis=1).view(np.uint64)
    every = hamming(bits[:4], bits)
    assert every[0, 1] == dim
    for distances in (search.by_counting, search.by_products):
        assert torch.equal(distances(words[:4], words.T), every.int())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_more_are_found_than_there_are(backend):
    index = BitIndex(64, backend)
    index.add(torch.eye(64)[:3])
    distances, rows = index.search(torch.eye(64)[:1], 10)
    assert distances.tolist() == [[0, 2, 2]]
    assert sorted(rows[0].tolist()) == [0, 1, 2]


def test_long_vectors_whose_distances_pass_a_byte_and_two():
    ones, none = torch.ones(1, 70_000), -torch.ones(1, 70_000)
    index = BitIndex(70_000, "torch")
    index.add(none)
    assert index.search(ones)[0].item() == 70_000


def test_a_vector_takes_an_eighth_of_its_components():
    for backend in BACKENDS:
        index = BitIndex(512, backend)
        index.add(torch.randn(100, 512))
        assert index.nbytes == 100 * 64


@pytest.mark.parametrize(
    ("action", "error", "says"),
    [
        (lambda: BitIndex(0), ConfigError, "dim must be 1"),
        (lambda: BitIndex(64, "fais"), ConfigError, "Did you mean 'faiss'"),
        (lambda: BitIndex(64).search(torch.randn(1, 64)), ConfigError, "index is empty"),
        (lambda: BitIndex(64).add(torch.randn(2, 65)), ShapeError, r"\(n, 64\); got .* \(2, 65\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(action, error, says):
    with pytest.raises(error, match=says):
        action()


def test_without_faiss_it_is_torch(monkeypatch):
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    assert BitIndex(64).backend == "torch"
    with pytest.raises(MissingExtraError, match="memory"):
        BitIndex(64, "faiss")


# ---- in a memory


@pytest.mark.parametrize("code", ["bipolar", "complement"])
@pytest.mark.parametrize("prototypes", [False, True])
def test_many_keys_are_searched_as_bits_with_the_same_result(code, prototypes, monkeypatch):
    memory = KeyValueMemory(96, code=code, prototypes=prototypes)
    memory.write(torch.randn(60, 96), torch.arange(60) % 12)
    queries = torch.randn(2, 3, 96)
    by_products, _ = memory.nearest(queries, 3)
    monkeypatch.setattr(key_value, "PACKED_FROM", 10)
    by_bits, rows = memory.nearest(queries, 3)
    assert memory._index is not None
    torch.testing.assert_close(by_bits, by_products)
    every, _ = memory.similarities(key_value.encode(queries, code))
    torch.testing.assert_close(every.gather(-1, rows), by_bits)


def test_what_is_written_later_is_found_too(monkeypatch):
    monkeypatch.setattr(key_value, "PACKED_FROM", 1)
    memory, keys = KeyValueMemory(64, code="bipolar"), torch.randn(3, 64)
    memory.write(keys[:2], "ab")
    memory.nearest(keys)
    memory.write(keys[2:], "c")
    assert memory.nearest(keys)[1].flatten().tolist() == [0, 1, 2]
    memory.forget("a")
    assert memory.nearest(keys[1:])[1].flatten().tolist() == [0, 1]
    other = KeyValueMemory(64, code="bipolar")
    other.load_state_dict(memory.state_dict())
    assert other.nearest(keys[1:])[1].flatten().tolist() == [0, 1]


def test_a_memory_that_was_searched_is_copied_and_pickled(monkeypatch):
    monkeypatch.setattr(key_value, "PACKED_FROM", 1)
    memory, keys = KeyValueMemory(64, code="bipolar"), torch.randn(3, 64)
    memory.write(keys, "abc")
    memory.nearest(keys)
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert other.nearest(keys)[1].flatten().tolist() == [0, 1, 2]


def test_codes_that_are_no_bits_and_crossbars_are_searched_by_products(monkeypatch):
    monkeypatch.setattr(key_value, "PACKED_FROM", 1)
    from evenkeel.analog import Spread

    keys = torch.randn(3, 64)
    for code in ("real", "binary", "bipolar"):
        memory = KeyValueMemory(64, code=code)
        memory.write(keys, "abc")
        if code == "bipolar":
            memory = memory.program(Spread(0.1), seed=0)
            assert isinstance(memory, CrossbarMemory)
        similarity, rows = memory.nearest(keys, 2)
        assert memory._index is None
        assert rows.shape == similarity.shape == (3, 2)
        assert rows[:, 0].tolist() == [0, 1, 2]


def test_nearest_needs_something_to_search_and_to_find():
    memory = KeyValueMemory(64)
    with pytest.raises(ConfigError, match="memory is empty"):
        memory.nearest(torch.randn(1, 64))
    memory.write(torch.randn(1, 64), "a")
    with pytest.raises(ConfigError, match="k must be 1"):
        memory.nearest(torch.randn(1, 64), 0)


def test_the_bench_times_every_way():
    rows = bench.bench(sizes=(100,), rounds=1)
    assert [row["way"] for row in rows][:4] == [
        "faiss IndexBinaryFlat", "BitIndex, faiss", "BitIndex, torch", "products, float32",
    ]  # fmt: skip
    assert rows[0]["ratio"] == 1
    assert {row["bytes"] for row in rows[:3]} == {100 * 64}
    assert all(np.isfinite(row["median_ms"]) for row in rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_query_finds_nothing(backend):
    index = BitIndex(64, backend)
    index.add(torch.randn(3, 64))
    distances, rows = index.search(torch.randn(0, 64), 2)
    assert distances.shape == rows.shape == (0, 2)
