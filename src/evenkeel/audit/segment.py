"""Which pixels belong to objects, and which objects there are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.audit.picture import beside, tinted
from evenkeel.batches import size
from evenkeel.errors import ConfigError, nearest

MEASURES = {"iou": "foreground IoU", "dice": "Dice", "ap": "object AP", "ap50": "object AP50"}
THRESHOLDS = np.arange(0.5, 1.0, 0.05)
"""IoU from which an object counts as found, of the AP."""
TERMS = 5
"""Sums that are kept of each measure."""
HIT, MISSED, INVENTED = (0.0, 0.62, 0.45), (0.95, 0.6, 0.1), (0.8, 0.1, 0.55)


@dataclass(frozen=True)
class Segment:
    r"""Batches are (pictures, objects); the metric is the IoU of the foreground, in percent.

    $$ \mathrm{IoU} = \frac{\sum TP}{\sum TP + FP + FN}, \qquad
       \mathrm{Dice} = \frac{2\sum TP}{\sum 2\,TP + FP + FN} $$

    over the pixels of all pictures, and for objects, which are what hangs together (8 neighbours)
    of the foreground that the network sees,

    $$ \mathrm{AP} = \mathrm{mean}_{\text{pictures}}\;
       \mathrm{mean}_{\tau = 0.5, 0.55, \ldots, 0.95}\;
       \frac{TP_\tau}{TP_\tau + FP_\tau + FN_\tau} $$

    where an object is found that has an IoU above $\tau$ with one that is seen. Objects are whole
    numbers (N, H, W): 0 is the background, -1 what does not count. Outputs are scores (N, 1, H, W),
    above 0 for the foreground, or (N, classes, H, W) of which class 0 is the background; as in a
    mapping's "out", too.

    Args:
        measure: "iou", "dice", "ap", or "ap50", its term of $\tau = 0.5$.

    Examples:
        >>> import torch
        >>> task, objects = Segment(), torch.tensor([[[0, 1, 1, -1]]])
        >>> scores = torch.tensor([[[[-1.0, 1.0, -1.0, 1.0]]]])
        >>> task.value(task.score(scores, (torch.zeros(1, 3, 1, 4), objects)))
        50.0

    References:
        Caicedo et al., "Nucleus segmentation across imaging experiments: the 2018 Data Science
        Bowl", Nature Methods 16 (2019), for the AP.
    """

    measure: str = "iou"

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ConfigError(
                f"Unknown measure {self.measure!r}. {nearest(self.measure, MEASURES)}"
            )

    @property
    def metric(self) -> str:
        """Name of the measure."""
        return MEASURES[self.measure]

    def check(self, model: nn.Module, batches: Sequence[Any], classes: Sequence[str]) -> None:
        """Pictures with a map of objects each, and scores for every pixel."""
        for batch in batches:
            pair = isinstance(batch, tuple | list) and len(batch) > 1
            objects = batch[1] if pair else None
            if not isinstance(objects, Tensor) or objects.dim() != 3 or objects.is_floating_point():
                got = (
                    f"{objects.dtype} {tuple(objects.shape)}"
                    if isinstance(objects, Tensor)
                    else type(objects).__name__
                )
                raise ConfigError(
                    f"Segmentation needs batches of (pictures, objects), objects being whole "
                    f"numbers (N, H, W); got {got}. From masks in files: evenkeel.data.image_masks."
                )
        first = batches[0]
        objects = first[1]
        if not any(bool((batch[1] > 0).any()) for batch in batches):
            raise ConfigError("Segmentation needs some foreground; all objects are 0 or less.")
        with torch.no_grad():
            scores = _scores(self.run(model, first))
        if scores is None or scores.dim() != 4 or scores.shape[2:] != objects.shape[1:]:
            shape = "none" if scores is None else str(tuple(scores.shape))
            raise ConfigError(
                f"Segmentation needs scores of shape (N, classes, {objects.shape[1]}, "
                f"{objects.shape[2]}), one for each pixel; the network gives {shape}."
            )

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The first item of a batch is the input."""
        return model(batch[0])

    def score(self, output: Any, batch: Any) -> Tensor:
        """Of each measure the sums a, b, aa, ab, bb of what it is the ratio a / b of; pictures."""
        parts = [_parts(seen, objects) for seen, objects in _pairs(output, batch)]
        a, b = (
            torch.tensor([part[k] for part in parts], dtype=torch.float64).reshape(
                -1, len(MEASURES)
            )
            for k in (0, 1)
        )
        sums = torch.stack([a, b, a * a, a * b, b * b], 2).sum(0)  # (measures, 5)
        return torch.cat([sums.flatten(), torch.tensor([float(len(parts))], dtype=torch.float64)])

    def value(self, sums: Tensor) -> float:
        """Percent; 100 where there was nothing to see and nothing was seen."""
        return self._of(sums, self.measure)

    def interval(self, sums: Tensor) -> tuple[float, float] | None:
        """Of a ratio of means over pictures, by its linear terms and Student's t."""
        n = float(sums[-1])
        a, b, aa, ab, bb = self._terms(sums, self.measure)
        if n < 2 or b <= 0:
            return None
        from scipy.special import stdtrit

        ratio = a / b
        spread = max(0.0, aa - 2 * ratio * ab + ratio * ratio * bb) * n / (n - 1)
        half = float(stdtrit(n - 1, 0.975)) * math.sqrt(spread) / b
        return 100 * max(0.0, ratio - half), 100 * min(1.0, ratio + half)

    def figures(self, sums: Tensor, classes: Sequence[str]) -> dict[str, float]:
        """All measures."""
        return {name: self._of(sums, measure) for measure, name in MEASURES.items()}

    def errors(self, output: Any, batch: Any) -> Tensor:
        """1 less the IoU of each picture's foreground."""
        shares = []
        for seen, objects in _pairs(output, batch):
            hits, either, _ = _pixels(seen, objects)
            shares.append(1 - hits / either if either else 0.0)
        return torch.tensor(shares)

    def draw(self, batch: Any, index: int, outputs: dict[str, Any], classes: Sequence[str]) -> str:
        """The picture, and on it what each network sees, misses and invents."""
        picture, objects = batch[0][index], batch[1][index]
        shown = [("truth", tinted(picture, [(objects > 0, HIT)]), "")]
        for who, output in outputs.items():
            seen = _foreground(output)[index] & (objects >= 0)
            truth = objects > 0
            tints = [(seen & truth, HIT), (truth & ~seen, MISSED), (seen & ~truth, INVENTED)]
            hits, either, _ = _pixels(seen.numpy(), objects.numpy())
            share = f": IoU {100 * hits / either:.0f} %" if either else ""
            shown.append((who, tinted(picture, tints), share))
        return beside(shown)

    @property
    def legend(self) -> str:
        """What the colours of the drawings mean."""
        return "Green: seen; orange: missed; magenta: invented."

    def to_dict(self) -> dict[str, Any]:
        """Type, version and measure."""
        return {"type": "Segment", "version": self.version, **asdict(self)}

    def _of(self, sums: Tensor, measure: str) -> float:
        a, b, *_ = self._terms(sums, measure)
        return 100 * a / b if b else 100.0

    def _terms(self, sums: Tensor, measure: str) -> list[float]:
        start = TERMS * list(MEASURES).index(measure)
        return [float(term) for term in sums[start : start + TERMS]]


def _scores(output: Any) -> Tensor | None:
    found = output.get("out") if isinstance(output, Mapping) else output
    return found if isinstance(found, Tensor) else None


def _foreground(output: Any) -> Tensor:
    """Which pixels are seen as foreground, (N, H, W), on the CPU."""
    scores = _scores(output)
    assert scores is not None  # it was checked
    seen = scores[:, 0] > 0 if scores.shape[1] == 1 else scores.argmax(1) > 0
    return seen.cpu()


def _pairs(output: Any, batch: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """What is seen and what is there, for each picture."""
    seen, objects = _foreground(output), batch[1].cpu()
    return [(s.numpy(), o.numpy()) for s, o in zip(seen, objects[: size(batch)], strict=True)]


def _pixels(seen: np.ndarray, objects: np.ndarray) -> tuple[int, int, int]:
    """Foreground pixels that are seen, that are or are seen, and both numbers together."""
    truth, seen = objects > 0, seen & (objects >= 0)
    both = int(truth.sum()) + int(seen.sum())
    hits = int((truth & seen).sum())
    return hits, both - hits, both


def _parts(seen: np.ndarray, objects: np.ndarray) -> tuple[list[float], list[float]]:
    """Numerators and denominators of all measures for one picture."""
    hits, either, both = _pixels(seen, objects)
    precision = _object_precision(seen & (objects >= 0), objects)
    numerators = [hits, 2 * hits, float(precision.mean()), float(precision[0])]
    return numerators, [either, both, 1.0, 1.0]


def _object_precision(seen: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """TP / (TP + FP + FN) of a picture's objects at each threshold; 1 where there are none."""
    from scipy import ndimage

    found, n = ndimage.label(seen, np.ones((3, 3)))
    _, there = np.unique(np.where(objects > 0, objects, 0), return_inverse=True)
    there = there.reshape(objects.shape)  # 0 the background if there is any, as it is the lowest
    if (objects > 0).all():
        there = there + 1
    m = int(there.max())
    if n == 0 and m == 0:
        return np.ones(len(THRESHOLDS))
    overlap = np.bincount((there * (n + 1) + found).ravel(), minlength=(m + 1) * (n + 1))
    overlap = overlap.reshape(m + 1, n + 1)
    # What does not count has been taken out of `found`, and is background in `there`.
    either = overlap.sum(1)[1:, None] + overlap.sum(0)[None, 1:] - overlap[1:, 1:]
    iou = overlap[1:, 1:] / np.maximum(either, 1)
    # Above one half there is at most one partner for each, so no assignment is needed.
    matched = np.array([(iou > t).sum() for t in THRESHOLDS])
    precision: np.ndarray = matched / (n + m - matched)
    return precision
