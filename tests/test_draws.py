"""Keyed draws: the key alone decides the numbers."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from evenkeel.draws import Draws, keyed_normal, read_key
from evenkeel.draws.keyed import digest

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def count(n: int) -> torch.Tensor:
    return torch.tensor(n)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pairs_that_agree_in_word(word: int, keys: int = 200_000) -> list[tuple[int, int]]:
    """Seeds whose 128-bit digests agree in one 32-bit word, found as in the birthday paradox."""
    seen: dict[int, int] = {}
    found = []
    for seed in range(keys):
        bits = digest(seed, "layer", "c") >> (32 * word) & 0xFFFFFFFF
        if bits in seen:
            found.append((seen[bits], seed))
        seen[bits] = seed
    return found


# ---- streams of a chip


def test_known_numbers_so_that_stored_results_keep_their_meaning():
    draws = Draws(0, "conv1")
    read = keyed_normal(torch.empty(3), read_key(0, "conv1", "read", ""), count(5))
    for numbers, known in [
        (draws.normal("programming", (3,)), [-0.5846508, 0.06885682, 0.9071189]),
        (draws.uniform("stuck", (3,)), [0.6643760, 0.6608294, 0.6731792]),
        (read, [0.2462189, -2.8712802, -0.7212485]),
    ]:
        assert torch.allclose(numbers, torch.tensor(known), rtol=0, atol=1e-7)


def test_numbers_do_not_depend_on_what_was_drawn_before(threads):
    draws = Draws(7, "layer1.0.conv")
    first = draws.normal("programming", (300, 217))
    exponent = draws.normal("drift exponent", (300, 217))
    stuck = draws.uniform("stuck", (5,))
    assert torch.equal(Draws(7, "layer1.0.conv").uniform("stuck", (5,)), stuck)
    assert torch.equal(draws.normal("drift exponent", (300, 217)), exponent)
    assert torch.equal(draws.normal("programming", (300, 217)), first)


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ((0, "a", "c"), (1, "a", "c")),
        ((0, "a", "c"), (0, "b", "c")),
        ((0, "a", "c"), (0, "a", "d")),
        ((0, "ab", "c"), (0, "a", "bc")),  # the parts are not run together
        ((1, "1a", "c"), (11, "a", "c")),
        ((0, "", "a"), (0, "a", "")),
        ((5, "a", "c"), (-5, "a", "c")),
        ((5, "a", "c"), (5 + 2**32, "a", "c")),
        ((5, "a", "c"), (5 + 2**64, "a", "c")),
        ((5, "a", "c"), (5 + 2**128, "a", "c")),
    ],
)
def test_another_key_gives_other_numbers(key, other):
    (seed, name, component), (seed2, name2, component2) = key, other
    a = Draws(seed, name).normal(component, (1000,))
    b = Draws(seed2, name2).normal(component2, (1000,))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.13  # four deviations of 1000 pairs
    like = torch.empty(1000)
    a, b = (keyed_normal(like, read_key(*k), count(0)) for k in (key, other))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.13


@pytest.mark.parametrize("word", range(4))
def test_every_part_of_the_128_bits_of_a_key_counts(word):
    # A generator that kept 32 bits of its seed, as torch's does, would give these pairs one stream.
    pairs = pairs_that_agree_in_word(word)
    assert len(pairs) > 1  # 4.7 expected
    like = torch.empty(8)
    for seed, other in pairs:
        a, b = (Draws(s, "layer").normal("c", (8,)) for s in (seed, other))
        assert not torch.equal(a, b)
        a, b = (keyed_normal(like, read_key(s, "layer", "c"), count(0)) for s in (seed, other))
        assert not torch.equal(a, b)


def test_global_generators_do_not_move():
    def states():
        numpy_state = np.random.get_state()  # noqa: NPY002 - the legacy generator is what is watched
        return torch.get_rng_state().tolist(), str(numpy_state), random.getstate()

    before = states()
    Draws(0, "a").normal("c", (10,))
    Draws(0, "a").uniform("c", (10,))
    keyed_normal(torch.empty(10), read_key(0, "a"), count(0))
    assert states() == before


@pytest.mark.parametrize("source", ["draws", "reads"])
def test_normal_numbers_have_normal_moments(source):
    n = 1_000_000
    if source == "draws":
        xi = Draws(3, "a").normal("c", (n,))
    else:
        xi = keyed_normal(torch.empty(n), read_key(3, "a"), count(2))
    assert xi.dtype == torch.float32
    powers = [float(xi.double().pow(k).mean()) for k in (1, 2, 3, 4)]
    variances = [1, 2, 15, 96]  # of xi, xi^2, xi^3, xi^4
    for power, expected, variance in zip(powers, [0, 1, 0, 3], variances, strict=True):
        assert abs(power - expected) < 4 * (variance / n) ** 0.5


def test_uniform_numbers_fill_the_half_open_unit_interval():
    n = 1_000_000
    u = Draws(3, "a").uniform("c", (n,))
    assert u.dtype == torch.float32
    assert 0 <= u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1
    assert abs(float(u.double().mean()) - 1 / 2) < 4 * (1 / 12 / n) ** 0.5
    assert abs(float(u.double().square().mean()) - 1 / 3) < 4 * (4 / 45 / n) ** 0.5


# ---- read noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_reads_have_the_shape_and_dtype_of_their_model(dtype, threads):
    key = read_key(0, "a")
    noise = keyed_normal(torch.full((40, 3, 201), 9.0, dtype=dtype), key, count(1))
    assert noise.shape == (40, 3, 201)
    assert noise.dtype == dtype
    assert torch.equal(noise, keyed_normal(torch.zeros(40, 3, 201), key, count(1)).to(dtype))


def test_every_read_has_its_own_numbers():
    key = read_key(0, "a")
    like = torch.empty(10_000)
    reads = [keyed_normal(like, key, count(n)) for n in (0, 1, 2, 2**32, 2**32 + 1)]
    for a, b in pairwise(reads):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.04
    assert not torch.equal(reads[0], reads[3])  # more than 32 bits of the count matter
    assert torch.equal(keyed_normal(like, key, count(1)), reads[1])


def read_twice(like, key, n):
    first = keyed_normal(like, key, n)
    return first, keyed_normal(like, key, n + 1)


def compiled(like, key, n):
    torch._dynamo.reset()
    return torch.compile(read_twice, fullgraph=True, backend="eager")


def exported(like, key, n):
    class Reader(torch.nn.Module):
        def forward(self, like, key, n):
            return read_twice(like, key, n)

    return torch.export.export(Reader(), (like, key, n)).module()


@pytest.mark.parametrize("capture", [compiled, exported])
def test_captured_graphs_draw_the_same_numbers_and_freeze_none(capture):
    like = torch.empty(4, 5)
    captured = capture(like, read_key(0, "a"), count(0))
    for key, n in [(read_key(0, "a"), 0), (read_key(0, "a"), 8), (read_key(1, "a"), 8)]:
        got = captured(like, key, count(n))
        for a, b in zip(got, read_twice(like, key, count(n)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "like",
    [torch.zeros(3, 4), torch.zeros(2, 5, 3).bfloat16(), torch.zeros(())],
    ids=["matrix", "bfloat16", "scalar"],
)
def test_the_operator_keeps_torchs_contract(like):
    torch.library.opcheck(
        torch.ops.evenkeel.keyed_normal.default, (like, read_key(0, "a"), count(3))
    )


@on_gpu
def test_a_gpu_gets_the_numbers_of_the_cpu():
    cuda = torch.device("cuda")
    draws = Draws(0, "a")
    assert torch.equal(draws.normal("c", (9,), device=cuda).cpu(), draws.normal("c", (9,)))
    assert torch.equal(draws.uniform("c", (9,), device=cuda).cpu(), draws.uniform("c", (9,)))
    key = read_key(0, "a")
    noise = keyed_normal(torch.empty(9, device=cuda), key.to(cuda), count(3).to(cuda))
    assert noise.is_cuda
    assert torch.equal(noise.cpu(), keyed_normal(torch.empty(9), key, count(3)))
