"""Large arrays in blocks are the arrays that they would be in one piece."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from evenkeel.analog import (
    HERMES,
    PCM,
    CMOHfOx,
    Device,
    Gaussian,
    LogNormal,
    StuckAt,
    WanReRAM,
    blocks,
    program,
)
from evenkeel.analog.blocks import BLOCK, LANES, SPLIT, blockwise, layout, size_of, unfilled
from evenkeel.draws import Draws, in_turn
from evenkeel.errors import ConfigError

DEVICES = [
    PCM(), HERMES(), WanReRAM(), CMOHfOx(), Gaussian(0.1), LogNormal(0.2),
    Device(PCM(), StuckAt(0.01, 0.02)),
]  # fmt: skip


@pytest.mark.parametrize("of", DEVICES, ids=lambda d: d.name)
def test_a_chip_is_the_same_in_blocks(of, monkeypatch):
    net, x = nn.Sequential(nn.Linear(37, 23), nn.ReLU(), nn.Linear(23, 5)), torch.randn(2, 37)
    whole = program(net, of, seed=1).age_(3600.0).rewind_("x")
    for size in (64, 128, 832, 1728):
        monkeypatch.setattr(blocks, "BLOCK", size)
        parts = program(net, of, seed=1).age_(3600.0).rewind_("x")
        for (name, a), b in zip(
            whole.state_dict().items(), parts.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
        assert torch.equal(whole(x), parts(x))
        whole.rewind_("x")


@pytest.mark.parametrize("of", DEVICES, ids=lambda d: d.name)
def test_an_array_is_the_same_whatever_lies_beside_it(of):
    net = nn.Sequential(nn.Linear(37, 23), nn.ReLU(), nn.Linear(23, 5), nn.Linear(5, 3))
    both, last = (program(net, of, seed=1, layers=layers).age_(3600.0) for layers in (None, ["2"]))
    for (name, a), b in zip(
        both.model[2].state_dict().items(), last.model[2].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert torch.equal(both.model[2].weight, last.model[2].weight)


@pytest.mark.parametrize("numbers", [[1], [64], [65, 1, 200], [0, 3, 0], [1000], [10, 10, 10]])
def test_a_layout_holds_every_device_once_and_in_order(numbers):
    pieces = layout(numbers, 128)
    for array, number in enumerate(numbers):
        own = [p for block in pieces for p in block if p.array == array]
        assert [i for p in own for i in range(p.start, p.start + p.number)] == list(range(number))
    for block in pieces:
        assert sum(p.number for p in block) <= 128
        assert size_of(block) % SPLIT == 0
        assert all(p.at % LANES == 0 for p in block)
        ends = [p.at + p.number for p in block]
        assert all(end <= p.at for end, p in zip(ends, block[1:], strict=False))


def test_draws_in_turn_are_those_of_each_part():
    parts = [Draws(3, "layer"), Draws(3, "other")]
    blocks = [(5, [(0, 0, 5)]), (12, [(0, 0, 3), (1, 6, 4)]), (2, [(1, 0, 2)])]
    got = []
    for turn, (n, _) in zip(in_turn(parts, blocks), blocks, strict=True):
        got.append((turn.normal("a", (1, n)).flatten(), turn.uniform("b", (n,))))
        assert torch.equal(turn.normal("a", (n,)), got[-1][0])  # the key alone decides
    for k, law in enumerate(("normal", "uniform")):
        first, second, third = (pair[k] for pair in got)
        alone = [getattr(p, law)("ab"[k], (n,)) for p, n in zip(parts, (8, 6), strict=True)]
        assert torch.equal(torch.cat([first, second[:3]]), alone[0])
        assert torch.equal(torch.cat([second[6:10], third]), alone[1])
        assert not second[3:6].any()
        assert not second[10:].any()


def test_an_elementwise_effect_has_no_generator_of_its_own():
    class Own(Gaussian):
        def write(self, g, draws, g_max):
            draws.generator("mine")
            return g, {}

    with pytest.raises(ConfigError, match="elementwise = False"):
        program(nn.Linear(3, 2), Own(0.1), seed=0)


def test_effects_of_one_kind_are_independent():
    layer = nn.Linear(300, 300)
    nn.init.ones_(layer.weight)  # all at the largest conductance
    noisy = program(layer, Device(Gaussian(0.1), Gaussian(0.1)), seed=0).model.programmed[0]
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.02)  # 0.14 if they shared their numbers
    stuck = program(layer, Device(StuckAt(low=0.3), StuckAt(low=0.3)), seed=0).model
    lost = float((stuck.weight == 0).float().mean())
    assert lost == pytest.approx(1 - 0.7**2, abs=0.02)  # 0.3 if they did


def test_an_array_is_the_same_on_however_many_threads():
    net = nn.Sequential(nn.Linear(20, 200), nn.Linear(200, 200), nn.Linear(300, 301))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 4, 7):
            torch.set_num_threads(n)
            chip = program(net, PCM(), seed=0, layers=["1", "2"] if n == 3 else None).age_(60.0)
            found.append([{**a._buffers} for _, a in list(chip.arrays())[-2:]])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            for name, value in a.items():
                assert value is None or torch.equal(value, b[name]), name
    assert BLOCK % SPLIT == 0


class Odd(PCM):
    """A device of a user's, in ways that are allowed and that are not."""

    elementwise = True

    def __init__(self, write):
        super().__init__()
        object.__setattr__(self, "_write", write)

    def write(self, g, draws, g_max):
        return self._write(g, draws)

    def drift(self, g, state, age_s):
        return g

    def read_std(self, g, programmed, state, age_s):
        return None


def test_a_state_of_one_number_is_that_of_every_device():
    of = Odd(lambda g, draws: (g, {"loss": torch.tensor(0.25)}))
    chip = program(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), of, seed=0)
    for _, array in chip.arrays():
        assert array.states[0]["loss"].shape == array.programmed.shape
        assert bool((array.states[0]["loss"] == 0.25).all())


@pytest.mark.parametrize("sides", [(5, 4), (24, 16)], ids=["part of a block", "all of it"])
def test_what_an_effect_is_given_is_not_to_be_changed(sides):
    for elementwise in (True, False):
        of = Odd(lambda g, draws: (g.mul_(0.5), {}))
        object.__setattr__(of, "elementwise", elementwise)
        with pytest.raises(ConfigError, match=r"instead of g\.mul_"):
            program(nn.Linear(*sides), of, seed=0)


def test_numbers_that_a_block_has_no_use_for_are_passed_over():
    def where_any(g, draws):
        return (g + draws.normal("x", g.shape) if bool((g > 0).any()) else g), {}

    net = nn.Sequential(nn.Linear(32, 12), nn.Linear(12, 32))
    nn.init.zeros_(net[0].weight)
    whole = program(net, Odd(where_any), seed=0, layers=["1"]).model[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 768)
        assert torch.equal(
            program(net, Odd(where_any), seed=0).model[1].programmed, whole.programmed
        )


@pytest.mark.parametrize("shape", [(1,), (7, 9)])
def test_an_elementwise_effect_draws_for_each_device(shape):
    with pytest.raises(ConfigError, match=r"the shape of g, of 768 devices; got"):
        program(nn.Linear(3, 2), Odd(lambda g, draws: (g + draws.normal("x", shape), {})), seed=0)


def test_who_draws_is_known_where_it_is_one():
    def named(g, draws):
        assert repr(draws)
        return g + draws.seed + len(draws.name), {}

    of = Odd(named)
    with pytest.raises(ConfigError, match="one array at a time"):
        program(nn.Linear(3, 2), of, seed=0)
    object.__setattr__(of, "elementwise", False)
    program(nn.Linear(3, 2), of, seed=0)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_weights_is_refused():
    with pytest.raises(ConfigError, match="must have weights"):
        program(nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2)), PCM(), seed=0)


def in_blocks_of_64(f, *arrays):
    pieces = layout([next(iter(a.values())).numel() for a in arrays], 64)
    return blockwise(f, arrays, pieces)


def test_what_is_handed_through_is_not_copied():
    x = torch.randn(2, 30, 5)
    ((same, twice, nothing),) = (
        found.values()
        for found in in_blocks_of_64(
            lambda of: {"a": of["x"], "b": 2 * of["x"] + of["y"], "c": None}, {"x": x, "y": x}
        )
    )
    assert same.data_ptr() == x.data_ptr()
    assert torch.equal(twice, 3 * x)
    assert nothing is None


def test_an_effect_that_looks_at_its_neighbours_is_given_the_whole(monkeypatch):
    seen = []

    class Neighbours(PCM):
        elementwise = False

        def write(self, g, draws, g_max):
            seen.append(tuple(g.shape))
            return super().write(g, draws, g_max)

    monkeypatch.setattr(blocks, "BLOCK", 64)
    program(nn.Linear(7, 5), Neighbours(), seed=0)
    assert seen == [(2, 5, 7)]


MEMORY = """
import resource, torch
from torch import nn
from evenkeel.analog import PCM, program
program(nn.Linear(300, 300), PCM(), seed=0)
net = nn.Linear(4000, 2500, bias=False)
if {programmed}:
    chip = program(net, PCM(), seed=0).age_(3600.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / net.weight.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_programming_takes_at_most_nine_copies_of_the_weights():
    """Eight are what an aged chip with read noise holds; the rest is what is on the way."""
    without, programmed = (
        float(subprocess.check_output([sys.executable, "-c", MEMORY.format(programmed=p)]))
        for p in (False, True)
    )
    assert programmed - without < 9


def test_what_is_handed_through_at_first_and_changed_later():
    x = torch.arange(100.0).view(1, 2, 50)
    (found,) = in_blocks_of_64(
        lambda of: {"x": of["x"] * 0 if of["x"].max() > 90 else of["x"]}, {"x": x}
    )
    assert found["x"].flatten().tolist() == [*range(64), *[0] * 36]
    assert torch.equal(x, torch.arange(100.0).view(1, 2, 50))
    (found,) = in_blocks_of_64(
        lambda of: {"x": of["x"] * 0 if of["x"].min() < 9 else of["x"]}, {"x": x}
    )
    assert found["x"].flatten().tolist() == [*[0] * 64, *range(64, 100)]
    assert torch.equal(x, torch.arange(100.0).view(1, 2, 50))


def test_room_for_large_arrays_is_of_the_kind_that_was_asked_for():
    for like in (torch.zeros(1), torch.zeros(1, dtype=torch.bool), torch.zeros(1).half()):
        for shape in ((3, 5), (2, 1 << 22)):
            room = unfilled(like, *shape)
            assert room.shape == shape
            assert room.dtype == like.dtype
            room.fill_(1)
            assert bool(room.all())
