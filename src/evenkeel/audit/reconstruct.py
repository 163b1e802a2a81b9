"""Pictures that a network must give back as they were: auto-encoders, denoisers, compression."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evenkeel.audit.picture import beside
from evenkeel.errors import ConfigError

LEAST = 1e-10
"""Of a mean squared error, in shares of the peak's square: no picture counts for over 100 dB."""


@dataclass(frozen=True)
class Reconstruct:
    r"""Batches are (pictures,) or (pictures, originals); the metric is the mean PSNR, in dB.

    $$ \mathrm{PSNR} = 10 \log_{10} \frac{\text{peak}^2}
       {\mathrm{mean}\,(\mathrm{clip}(\hat x, 0, \text{peak}) - x)^2} $$

    for each picture, of which the mean is taken. A float tensor of the pictures' shape beside them
    is what they should become, as for a denoiser; without one, or with labels, it is they.

    Args:
        peak: largest value of a pixel.

    Examples:
        >>> import torch
        >>> task = Reconstruct()
        >>> x = torch.full((2, 1, 4, 4), 0.5)
        >>> round(task.value(task.score(x + 0.1, (x,))), 3)
        20.0
    """

    peak: float = 1.0

    metric: ClassVar[str] = "PSNR"
    unit: ClassVar[str] = "dB"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf:
            raise ConfigError(f"Reconstruct peak must be above 0 and finite; got {self.peak!r}.")

    def check(self, model: nn.Module, batches: Sequence[Any], classes: Sequence[str]) -> None:
        """Pictures of values from 0 to the peak, and outputs of their shape."""
        first = batches[0]
        x = _input(first)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ConfigError(
                f"Reconstruction needs batches of (pictures,), float tensors (N, C, H, W); got "
                f"{got}."
            )
        target = _target(first)
        low = min(float(_target(batch).min()) for batch in batches)
        high = max(float(_target(batch).max()) for batch in batches)
        if low < 0 or high > self.peak:
            raise ConfigError(
                f"Pictures must lie in 0 to {self.peak:g}; got {low:.3g} to {high:.3g}. Give "
                f"Reconstruct(peak=...), and no mean or std to take off."
            )
        with torch.no_grad():
            y = self.run(model, first)
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        if shape != tuple(target.shape):
            raise ConfigError(
                f"Reconstruction needs outputs of the pictures' shape, {tuple(target.shape)}; the "
                f"network gives {shape}."
            )

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The first item of a batch is the input."""
        return model(_input(batch))

    def score(self, output: Tensor, batch: Any) -> Tensor:
        """Sum of the PSNRs, of their squares, and pictures."""
        psnr = self._psnr(output, batch)
        return torch.stack([psnr.sum(), psnr.square().sum(), psnr.new_tensor(len(psnr))])

    def value(self, sums: Tensor) -> float:
        """Mean over pictures."""
        return float(sums[0] / sums[2])

    def interval(self, sums: Tensor) -> tuple[float, float] | None:
        """Student's, of the mean over pictures."""
        total, squares, n = sums.tolist()
        if n < 2:
            return None
        from scipy.special import stdtrit

        variance = max(0.0, squares - total * total / n) / (n - 1)
        half = float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n)
        return total / n - half, total / n + half

    def errors(self, output: Tensor, batch: Any) -> Tensor:
        """Mean squared error of each picture."""
        return self._squares(output, batch).float()

    def draw(self, batch: Any, index: int, outputs: dict[str, Any], classes: Sequence[str]) -> str:
        """The picture, and what each network makes of it, with its PSNR."""
        shown = [("original", _target(batch)[index], "")]
        for who, output in outputs.items():
            psnr = float(self._psnr(output, batch)[index])
            shown.append((who, output[index].clamp(0, self.peak), f": {psnr:.1f} dB"))
        return beside(shown, (0, self.peak))

    def to_dict(self) -> dict[str, Any]:
        """Type, version and peak."""
        return {"type": "Reconstruct", "version": self.version, **asdict(self)}

    def _psnr(self, output: Tensor, batch: Any) -> Tensor:
        return -10 * self._squares(output, batch).div(self.peak**2).clamp_min(LEAST).log10()

    def _squares(self, output: Tensor, batch: Any) -> Tensor:
        error = output.double().clamp(0, self.peak) - _target(batch).double()
        return error.square().flatten(1).mean(1)


def _input(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _target(batch: Any) -> Tensor:
    x: Tensor = _input(batch)
    beside = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if isinstance(beside, Tensor) and beside.is_floating_point() and beside.shape == x.shape:
        return beside
    return x
