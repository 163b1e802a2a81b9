"""Moments of what a device model gives, to be held against a law or a measurement."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from evenkeel.analog.device import Device, DeviceModel, as_device
from evenkeel.draws import Draws

Moments = Mapping[tuple[float, float], tuple[float, float]]
"""(target as a share of g_max, age in s) -> (mean, deviation), both as shares of g_max."""

PCM_MOMENTS: Moments = {
    (0, 0.0): (0.004298, 0.007457),
    (0, 3600.0): (0.002651, 0.004889),
    (0, 86400.0): (0.002025, 0.003977),
    (0, 31556952.0): (0.001288, 0.002948),
    (0.1, 0.0): (0.100000, 0.024311),
    (0.1, 3600.0): (0.073658, 0.021091),
    (0.1, 86400.0): (0.061538, 0.020499),
    (0.1, 31556952.0): (0.044653, 0.019852),
    (0.25, 0.0): (0.250000, 0.035439),
    (0.25, 3600.0): (0.194124, 0.031391),
    (0.25, 86400.0): (0.166642, 0.030471),
    (0.25, 31556952.0): (0.125896, 0.029382),
    (0.5, 0.0): (0.500000, 0.047814),
    (0.5, 3600.0): (0.387900, 0.042286),
    (0.5, 86400.0): (0.332507, 0.041106),
    (0.5, 31556952.0): (0.250089, 0.039654),
    (1.0, 0.0): (1.000000, 0.056013),
    (1.0, 3600.0): (0.775799, 0.056357),
    (1.0, 86400.0): (0.665013, 0.060577),
    (1.0, 31556952.0): (0.500179, 0.066014),
}
"""One read of a device of :class:`evenkeel.analog.PCM`: closed forms of its laws with the clamps.

From the laws by integration over programming noise and drift exponent in float64, with the moments
of the clamped read in closed form; the integration stands in ``tests/test_devices.py``. Another
simulator of the same laws must give the same.
"""


def device_moments(
    device: Device | DeviceModel,
    shares: Sequence[float],
    ages_s: Sequence[float],
    *,
    draws: int = 200_000,
    seed: int = 0,
) -> dict[tuple[float, float], tuple[float, float]]:
    """Mean and deviation of one read of a device, by sampling.

    Args:
        device: a device or a single effect.
        shares: targets as shares of the device's ``g_max``.
        ages_s: seconds since programming.
        draws: devices for each target.
        seed: of the draws.

    Returns:
        (share, age) -> (mean, deviation), as shares of ``g_max``.

    Examples:
        >>> from evenkeel.analog import Gaussian
        >>> mean, deviation = device_moments(Gaussian(0.1), [0.5], [0.0])[0.5, 0.0]
        >>> abs(mean - 0.5) < 1e-3, abs(deviation - 0.1 / 2**0.5) < 1e-3  # each half of a pair
        (True, True)
    """
    device = as_device(device)
    targets = torch.tensor(list(shares)).view(1, -1, 1) * device.g_max
    key = Draws(seed, "moments")
    programmed, states = device.write(targets.expand(1, -1, draws).contiguous(), key)
    found = {}
    for age_s in ages_s:
        g = device.drift(programmed, states, age_s)
        std = device.read_std(g, programmed, states, age_s)
        if std is not None:
            g = (g + std * key.normal(f"read at {age_s}", tuple(g.shape))).clamp_min(0)
        values = (g / device.g_max).double()  # (1, shares, draws)
        for share, mean, deviation in zip(
            shares, values.mean(2)[0].tolist(), values.std(2)[0].tolist(), strict=True
        ):
            found[share, age_s] = (mean, deviation)
    return found


def assert_device_moments(
    device: Device | DeviceModel, expected: Moments, *, rtol: float = 0.01, draws: int = 200_000
) -> None:
    """Fail where a device's mean or deviation is off by more than ``rtol`` of what is expected.

    200,000 draws have a sampling error of about 0.2 % of a deviation, so 1 % is a fair bound.

    Raises:
        AssertionError: with every point that is off.
    """
    shares = sorted({share for share, _ in expected})
    ages_s = sorted({age_s for _, age_s in expected})
    found = device_moments(device, shares, ages_s, draws=draws)
    off = [
        f"at {share:g} of g_max after {age_s:g} s the {what} is {got:.5f}, expected {want:.5f}"
        for (share, age_s), wanted in expected.items()
        for what, got, want in zip(("mean", "deviation"), found[share, age_s], wanted, strict=True)
        if abs(got - want) > rtol * abs(want)
    ]
    if off:
        raise AssertionError(f"{as_device(device).name} is off: " + "; ".join(off))


@torch.no_grad()
def assert_transparent(
    device: Device | DeviceModel, model: nn.Module, x: Tensor, *, rtol: float = 1e-5
) -> None:
    """Fail unless a device without noise leaves a network's output as it is, to ``rtol``.

    Args:
        device: with all its noise set to zero.
        model: a network in eval mode.
        x: an input.
        rtol: of the output's largest value.

    Raises:
        AssertionError: with the largest difference.
    """
    digital, analog = model(x), as_device(device).program(model, seed=0)(x)
    worst = float((digital - analog).abs().max())
    bound = rtol * float(digital.abs().max())
    if not worst <= bound:
        raise AssertionError(
            f"{as_device(device).name} without noise changes the output by {worst:.3g}; at most "
            f"{bound:.3g} was allowed."
        )
