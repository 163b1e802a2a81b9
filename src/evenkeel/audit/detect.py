"""Which objects there are, and where: boxes, scored as COCO does."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evenkeel.audit.picture import Colour, beside, outlined
from evenkeel.batches import size
from evenkeel.errors import ConfigError, MissingExtraError, nearest

MEASURES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}
MOST = 100
"""Detections of a picture that count, as in COCO."""
SURE = 0.3
"""Score from which a detection is drawn, and held against the network where it errs."""
COLOURS: Sequence[Colour] = (
    (0.85, 0.15, 0.15), (0.1, 0.45, 0.9), (0.0, 0.6, 0.4), (0.9, 0.6, 0.0), (0.6, 0.3, 0.75),
)  # fmt: skip


@dataclass(frozen=True)
class Detect:
    """Batches are (pictures, boxes); the metric is COCO's average precision, in percent.

    AP is the mean over classes and over IoU thresholds of 0.5, 0.55, ..., 0.95, AP50 and AP75 that
    at one; with at most 100 detections of a picture. The figures are those of faster-coco-eval.

    Boxes are (N, M, 6): left, top, right, bottom in pixels, class, and 1 for a box around a crowd,
    which is neither right nor wrong; class -1 fills up. Outputs are detections (N, K, 6): left,
    top, right, bottom, score, class; or for each picture a mapping with boxes, scores and labels,
    as torchvision's detectors give it.

    Args:
        measure: "ap", "ap50" or "ap75".
        first_label: the network's number for the first class; 1 for torchvision's detectors.

    Examples:
        >>> import torch
        >>> boxes = torch.tensor([[[0.0, 0, 10, 10, 0, 0]]])
        >>> found = torch.tensor([[[0.0, 0, 10, 8, 0.9, 0]]])
        >>> task = Detect("ap75")
        >>> task.value(task.gathered([task.score(found, (torch.zeros(1, 3, 16, 16), boxes))]))
        100.0

    References:
        Lin et al., "Microsoft COCO: common objects in context", ECCV 2014.
    """

    measure: str = "ap50"
    first_label: int = 0

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ConfigError(
                f"Unknown measure {self.measure!r}. {nearest(self.measure, MEASURES)}"
            )
        object.__setattr__(self, "first_label", int(self.first_label))  # from a name it is a float

    @property
    def metric(self) -> str:
        """Name of the measure."""
        return MEASURES[self.measure]

    def check(self, model: nn.Module, batches: Sequence[Any], classes: Sequence[str]) -> None:
        """Pictures with boxes, and detections of classes that there are."""
        _coco()
        for batch in batches:
            pair = isinstance(batch, tuple | list) and len(batch) > 1
            boxes = batch[1] if pair else None
            if not isinstance(boxes, Tensor) or boxes.dim() != 3 or boxes.shape[2] != 6:
                got = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
                raise ConfigError(
                    f"Detection needs batches of (pictures, boxes), boxes being (N, M, 6): left, "
                    f"top, right, bottom, class, crowd; got {got}. From COCO's files: "
                    f"evenkeel.data.coco_detection."
                )
        real = [(b[1][..., 4] >= 0) & (b[1][..., 5] == 0) for b in batches]
        if not any(bool(each.any()) for each in real):
            raise ConfigError("Detection needs some boxes; all are of class -1, or around crowds.")
        first = batches[0]
        with torch.no_grad():
            output = self.run(model, first)
        fits = (
            output.dim() == 3 and output.shape[0] == size(first) and output.shape[2] == 6
            if isinstance(output, Tensor)
            else isinstance(output, Sequence)
            and len(output) == size(first)
            and all(
                isinstance(one, Mapping) and {"boxes", "scores", "labels"} <= set(one)
                for one in output
            )
        )
        if not fits:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(
                f"Detection needs outputs (N, K, 6): left, top, right, bottom, score, class; or a "
                f"mapping with boxes, scores and labels for each picture. The network gives {got}."
            )

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The first item of a batch is the input."""
        return model(batch[0])

    def score(self, output: Any, batch: Any) -> list[tuple[Tensor, Tensor]]:
        """What is there and what is found, for each picture; :meth:`gathered` compares them."""
        return [
            (boxes[boxes[:, 4] >= 0].cpu(), found)
            for boxes, found in zip(batch[1], self._found(output), strict=True)
        ]

    def gathered(self, scores: Sequence[list[tuple[Tensor, Tensor]]]) -> Tensor:
        """AP, AP50 and AP75 over all classes, then of each class; NaN of one that is not there."""
        pictures = [picture for score in scores for picture in score]
        classes = 1 + max(int(boxes[:, 4].max()) for boxes, _ in pictures if len(boxes))
        precision = torch.from_numpy(_precision(pictures, classes))  # (IoU, recall, class)
        known = (precision > -1).all(1)
        by_class = torch.where(known, precision.mean(1), torch.nan)  # (IoU, class)
        chosen = torch.stack([by_class.mean(0), by_class[0], by_class[5]])  # (measure, class)
        return 100 * torch.cat([chosen.nanmean(1, keepdim=True), chosen], 1).flatten()

    def value(self, sums: Tensor) -> float:
        """Percent."""
        return float(self._by_class(sums, self.measure)[0])

    def interval(self, sums: Tensor) -> tuple[float, float] | None:
        """Not known: pictures cannot be told apart in a ranking of all detections."""
        return None

    def figures(self, sums: Tensor, classes: Sequence[str]) -> dict[str, float]:
        """All measures, for all classes and for each."""
        figures = {}
        for measure, name in MEASURES.items():
            mean, *each = self._by_class(sums, measure).tolist()
            figures[name] = mean
            named = list(classes) or [str(k) for k in range(len(each))]
            figures |= {f"{name} {of}": value for of, value in zip(named, each, strict=False)}
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def errors(self, output: Any, batch: Any) -> Tensor:
        """Boxes that no sure detection fits (IoU 0.5), and sure ones that fit none, by boxes."""
        shares = []
        for boxes, found in self.score(output, batch):
            hits, sure = _hits(boxes, found)
            shares.append((len(boxes) + sure - 2 * hits) / max(1, len(boxes)))
        return torch.tensor(shares)

    def draw(self, batch: Any, index: int, outputs: dict[str, Any], classes: Sequence[str]) -> str:
        """The picture with its boxes, and with those of each network."""
        picture = batch[0][index]
        boxes = batch[1][index][batch[1][index][:, 4] >= 0].cpu()
        shown = [("truth", _framed(picture, boxes, 4), f": {len(boxes)}")]
        for who, output in outputs.items():
            found = self._found(output)[index]
            hits, sure = _hits(boxes, found)
            of_those = _framed(picture, found[found[:, 4] >= SURE], 5)
            shown.append((who, of_those, f": {hits} right of {sure}"))
        return beside(shown)

    @property
    def legend(self) -> str:
        """What is drawn."""
        return (
            f"Boxes with a score of at least {SURE}, a colour for each class; right: IoU of 0.5 "
            f"or more with a box of that class."
        )

    def to_dict(self) -> dict[str, Any]:
        """Type, version and settings."""
        return {"type": "Detect", "version": self.version, **asdict(self)}

    def _by_class(self, sums: Tensor, measure: str) -> Tensor:
        """The mean over classes, and each."""
        return sums.reshape(len(MEASURES), -1)[list(MEASURES).index(measure)]

    def _found(self, output: Any) -> list[Tensor]:
        """Detections (K, 6) of each picture in float64, the best first, classes from 0."""
        if not isinstance(output, Tensor):
            rows = [
                torch.cat([one["boxes"], one["scores"][:, None], one["labels"][:, None]], 1)
                for one in output
            ]
        else:
            rows = list(output)
        made = []
        for one in rows:
            found = one.detach().double().cpu()
            found = found[found.isfinite().all(1)]  # a broken chip's
            found = found[found[:, 4].argsort(descending=True, stable=True)][:MOST]
            found[:, 5] -= self.first_label
            made.append(found[(found[:, 4] > 0) & (found[:, 5] >= 0)])
        return made


def _coco() -> tuple[Any, Any]:
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise MissingExtraError("The task detect", "tasks") from error
    return COCO, COCOeval_faster


def _precision(pictures: Sequence[tuple[Tensor, Tensor]], classes: int) -> Any:
    """(IoU thresholds, 101 recalls, classes) for areas of all sizes; -1 where a class is not."""
    COCO, evaluation_of = _coco()
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for k, (boxes, found) in enumerate(pictures, 1):
        for left, top, right, bottom, label, crowd in boxes.double().tolist():
            box = [left, top, right - left, bottom - top]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": k, "category_id": int(label),
                    "bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd),
                }
            )  # fmt: skip
        for left, top, right, bottom, score, label in found.tolist():
            box = [left, top, right - left, bottom - top]
            detections.append(
                {"image_id": k, "category_id": int(label), "bbox": box, "score": score}
            )
    truth = COCO(
        {
            "images": [{"id": k} for k in range(1, len(pictures) + 1)],
            "categories": [{"id": label, "name": str(label)} for label in range(classes)],
            "annotations": annotations,
        }
    )
    evaluation = evaluation_of(truth, truth.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][..., 0, -1]


def _hits(boxes: Tensor, found: Tensor) -> tuple[int, int]:
    """Boxes that a sure detection of their class fits, each one only; and sure detections."""
    sure = found[found[:, 4] >= SURE]
    iou = _iou(sure[:, :4], boxes[:, :4].double())
    iou[sure[:, 5, None] != boxes[None, :, 4]] = 0
    hits = 0
    for row in range(len(sure)):  # the best first
        if len(boxes) and float(iou[row].max()) >= 0.5:
            iou[:, int(iou[row].argmax())] = 0
            hits += 1
    return hits, len(sure)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Of every box of a (n, 4) with every one of b (m, 4)."""
    low, high = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    both = (high - low).clamp_min(0).prod(2)
    areas = [(x[:, 2:] - x[:, :2]).clamp_min(0).prod(1) for x in (a, b)]
    return both / (areas[0][:, None] + areas[1] - both).clamp_min(1e-12)


def _framed(picture: Tensor, boxes: Tensor, label: int) -> Tensor:
    frames = [(box[:4], COLOURS[int(box[label]) % len(COLOURS)]) for box in boxes.tolist()]
    return outlined(picture, frames)
