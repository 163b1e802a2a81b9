"""Drift compensation: one measured factor for each array, or for each of its output columns."""

from typing import Literal, get_args

import torch

from evenkeel.analog.chip import Chip
from evenkeel.errors import ConfigError

CompensatePer = Literal["layer", "column"]


@torch.no_grad()
def compensate_drift_(chip: Chip, per: CompensatePer = "layer") -> Chip:
    r"""Scale each array's output by how much its conductances have faded.

    $$ y \leftarrow \alpha\,y, \qquad \alpha = \frac{R(0)}{R(t)}, \qquad
       R = \mathrm{mean}_{ij}\,|W_{ij}| \text{ as read} $$

    The chip is read with one input line on at a time, right after programming and again now; both
    readings carry read noise, as on hardware. It needs no data, and undoes what is common to an
    array: the spread of the drift exponents, and programming noise, remain.

    Args:
        chip: at the age that is to be compensated.
        per: "layer": one factor an array. "column": one for each output.

    References:
        The global rule is that of Joshi et al., Nature Communications 11, 2473 (2020).
    """
    if per not in get_args(CompensatePer):
        raise ConfigError(f"compensate_drift_ needs per='layer' or 'column'; got {per!r}.")
    if not isinstance(chip, Chip):
        raise ConfigError(
            f"compensate_drift_ reads the arrays of an evenkeel.analog.Chip; got "
            f"{type(chip).__name__}. On other hardware compensate in its own driver."
        )
    age_s = chip.age_s
    for _, array in chip.arrays():
        array.compensate_(torch.ones_like(array.compensation))
        strength = []
        for at in (0.0, age_s):
            array.age_(at)
            array.rewind_("compensation")  # one stream: what differs between the two is the age
            read = array.read().abs()
            strength.append(read.mean(1, keepdim=True) if per == "column" else read.mean())
        then, now = strength
        array.compensate_(torch.where(now > 0, then / now, 1.0))
        array.rewind_("")
    return chip
