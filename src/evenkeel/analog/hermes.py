"""The phase-change memory of the HERMES chip, with one or two devices for each sign of a weight."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evenkeel.analog.pcm import TINY, PhaseChange
from evenkeel.errors import ConfigError


@dataclass(frozen=True)
class HERMES(PhaseChange):
    r"""Phase-change memory as it was measured on the HERMES chip, IBM's 14 nm inference chip.

    The course of things is that of :class:`PCM`; the laws of $x = G/G_{\max}$ are fits to the chip:

    - one device: $G_{\max}$ = 10.35 µS, $t_0$ = 200 s,
      $\sigma_P = 0.1578 + 2.3244\,x - 2.1631\,x^2 + 0.6884\,x^3$ µS;
    - two: $G_{\max}$ = 20.7 µS, $t_0$ = 300 s,
      $\sigma_P = 0.1660 + 4.7181\,x - 8.4810\,x^2 + 4.6896\,x^3$ µS;

    a read takes 512 ns. Two devices in parallel are programmed as one, the first to its full before
    the second.

    Args:
        devices: for each sign of a weight, 1 or 2.
        programming: factor on the programming noise (0: exact writes).
        drifting: factor on the drift exponents (0: none).
        reading: factor on the read noise (0: exact reads).

    Raises:
        ConfigError: another number of devices.

    Examples:
        >>> HERMES(devices=1).g_max, HERMES().g_max
        (10.35, 20.7)

    References:
        Le Gallo et al., "A 64-core mixed-signal in-memory compute chip based on phase-change memory
        for deep neural network inference", Nature Electronics 6, 680 (2023); Vasilopoulos et al.,
        IEEE Transactions on Electron Devices 70 (2023); fits as published with aihwkit 1.1.0.
    """

    devices: int = 2

    t_read_s: ClassVar[float] = 512e-9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices not in (1, 2) or isinstance(self.devices, bool):
            raise ConfigError(f"HERMES has 1 or 2 devices for each sign; got {self.devices!r}.")
        object.__setattr__(self, "devices", int(self.devices))  # one from the command line is 2.0

    @property
    def g_max(self) -> float:  # type: ignore[override]
        """In µS."""
        return 10.35 * self.devices

    @property
    def t0_s(self) -> float:  # type: ignore[override]
        """From programming to the first read."""
        return 200.0 if self.devices == 1 else 300.0

    def deviation(self, x: Tensor) -> Tensor:
        """A cubic."""
        if self.devices == 1:
            return _cubic(x, 0.15781817, 2.32443916, -2.16310839, 0.68841818)
        return _cubic(x, 0.16603222, 4.71806468, -8.48101252, 4.68961419)

    def exponent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Straight in the logarithm, clipped, for low states; a parabola above."""
        log_x = x.clamp_min(TINY).log()
        mean = torch.where(
            x < 0.0945,
            (-0.0387 * log_x - 0.0182).clamp(0.0720, 0.13),
            _cubic(x, 0.0736, -0.0126, -0.0436),
        )
        if self.devices == 1:
            low = (-0.0120 * log_x - 0.0023).clamp(0.0124, 0.04)
            return mean, torch.where(x < 0.3039, low, _cubic(x, 0.0104, 0.0116, -0.0165))
        low = (-0.0117 * log_x - 0.0057).clamp(0.0091, 0.04)
        return mean, torch.where(x < 0.3055, low, _cubic(x, 0.0073, 0.0093, -0.0118))

    def noise(self, x: Tensor) -> Tensor:
        """Straight in the logarithm, clipped, for low states; a cubic above."""
        log_x = x.clamp_min(TINY).log()
        if self.devices == 1:
            low = (-0.0078 * log_x + 0.0038).clamp(0.0179, 0.04)
            return torch.where(x < 0.1591, low, _cubic(x, 0.0088, 0.0768, -0.1352, 0.0664))
        low = (-0.0117 * log_x - 0.0069).clamp(0.015, 0.04)
        return torch.where(x < 0.16, low, _cubic(x, 0.0123, 0.0211, -0.0280, 0.0069))


def _cubic(x: Tensor, a: float, b: float, c: float, d: float = 0.0) -> Tensor:
    return a + x * (b + x * (c + x * d))
