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
    device,
    program,
)
from evenkeel.analog.blocks import blockwise
from evenkeel.draws import Draws

DEVICES = [
    PCM(), HERMES(), WanReRAM(), CMOHfOx(), Gaussian(0.1), LogNormal(0.2),
    Device(PCM(), StuckAt(0.01, 0.02)),
]  # fmt: skip


def of_size(size, monkeypatch):
    for module in (blocks, device):
        monkeypatch.setattr(module, "BLOCK", size)


@pytest.mark.parametrize("of", DEVICES, ids=lambda d: d.name)
def test_a_chip_is_the_same_in_blocks(of, monkeypatch):
    net, x = nn.Linear(37, 23), torch.randn(2, 37)
    of_size(10**9, monkeypatch)
    whole = program(net, of, seed=1).age_(3600.0).rewind_("x")
    for size in (96, 848, 1696):  # whole vectors, as what is left over may round otherwise
        of_size(size, monkeypatch)
        parts = program(net, of, seed=1).age_(3600.0).rewind_("x")
        for (name, a), b in zip(
            whole.state_dict().items(), parts.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
        assert torch.equal(whole(x), parts(x))
        whole.rewind_("x")


def test_draws_in_turn_are_those_of_one_call():
    draws = Draws(3, "layer")
    with draws.in_turn([5, 5, 3]) as turns:
        mixed = [
            (turns.normal("a", (1, 5)), turns.uniform("b", (5,))),
            (turns.normal("a", (5,)), turns.uniform("b", (5, 1))),
            (turns.normal("a", (3,)), turns.uniform("b", (3,))),
        ]
    for k, whole in enumerate((draws.normal("a", (13,)), draws.uniform("b", (13,)))):
        assert torch.equal(torch.cat([pair[k].flatten() for pair in mixed]), whole)


def test_what_is_handed_through_is_not_copied(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    x = torch.randn(2, 3, 5)
    same, twice, nothing = blockwise(
        lambda of: (of[0], 2 * of[0] + of[1]["y"], None), (x, {"y": x})
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

    of_size(10, monkeypatch)
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


def test_what_is_handed_through_at_first_and_changed_later(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    x = torch.arange(10.0).view(1, 2, 5)
    found = blockwise(lambda g: g * 0 if bool((g > 8).any()) else g, x)
    assert found.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0]
    assert torch.equal(x, torch.arange(10.0).view(1, 2, 5))
