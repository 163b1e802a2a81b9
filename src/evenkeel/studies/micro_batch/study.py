"""Which normalizer to train a dense network with, when a batch is one or two pictures.

All runs of a seed start at the same weights, see the same number of pictures, and have a peak of
the learning rate in proportion to the batch. Frozen batch norm is the exception: it starts at the
network that batch norm gave at the largest batch, with its statistics and its scales and shifts
fixed, and is trained as long again, as detectors are from pretrained networks.
"""

from typing import Any

from evenkeel.studies.frame import Desk, Facts, Part, Study
from evenkeel.studies.micro_batch.figures import draw
from evenkeel.studies.micro_batch.training import FROZEN, trained

METHODS: dict[str, Facts] = {
    "batch": {"norm": "batch"},
    FROZEN: {"norm": "batch"},
    "group": {"norm": "group"},
    "group, standardized weights": {"norm": "group", "weight_standard": True},
    "batch-channel": {"norm": "batch_channel_running"},
    "batch-channel, standardized weights": {
        "norm": "batch_channel_running", "weight_standard": True,
    },
    "batch Kalman": {"norm": "batch_kalman"},
}  # fmt: skip
"""Options of the networks. Batch-channel norm is the one with running statistics, which is for
batches of one or two."""
SEGMENTATION = {"data": "nuclei", "task": "segment", "architecture": "unet"}
DETECTION = {"data": "bccd", "task": "detect", "architecture": "centre_detector"}
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"seeds": 1, "batches": (2, 4), "width": 8, "epochs": 1, "samples": 8, "test": 4,
              "precision": "32-true"},
    "small": {"seeds": 3, "batches": (2, 16), "width": 8, "epochs": 15, "samples": 428,
              "test": None, "precision": "32-true"},
    "full": {"seeds": 3, "batches": (1, 2, 16), "width": 16, "epochs": 60, "samples": 428,
             "test": None, "precision": "32-true"},
}  # fmt: skip


def parts(scale: str) -> list[Part]:
    """Segmentation; at full scale, which is for an accelerator, detection too."""
    size = SIZES[scale]
    of_all = {
        "methods": METHODS,
        "batches": size["batches"],
        "seeds": size["seeds"],
        "epochs": size["epochs"],
        "samples": size["samples"],
        "test_samples": size["test"],
        "precision": size["precision"],
    }
    segmentation = {**SEGMENTATION, "width": size["width"], "peak": 0.1, **of_all}
    made = [Part("segmentation", "Normalizers of a U-Net in small batches", _runs, segmentation)]
    if scale == "full":
        detection = {**DETECTION, "width": 2 * size["width"], "peak": 0.02, **of_all}
        made.append(
            Part("detection", "Normalizers of a detector in small batches", _runs, detection)
        )
    return made


def _runs(desk: Desk, settings: Facts) -> Facts:
    common = {k: v for k, v in settings.items() if k not in ("methods", "batches", "seeds", "peak")}
    largest = max(settings["batches"])
    items = [
        {
            "method": method,
            "options": options,
            "batch_size": batch,
            "seed": seed,
            # The peak of a run is that of 16 pictures, in proportion.
            "learning_rate": settings["peak"] * batch / 16,
            "started_at": largest if method == FROZEN else None,
            "root": desk.data_root,
            "cache": desk.cache,
            **common,
        }
        for seed in range(settings["seeds"])
        for method, options in settings["methods"].items()
        for batch in settings["batches"]
    ]
    first = [item for item in items if item["started_at"] is None]
    runs = desk.each(trained, first, f"{settings['task']}: training")
    others = [item for item in items if item["started_at"] is not None]
    return {"runs": runs + desk.each(trained, others, f"{settings['task']}: going on")}


STUDY = Study(
    name="micro_batch",
    data=dict.fromkeys(SIZES, "nuclei"),
    parts=parts,
    draw=draw,
)
"""``evenkeel study micro_batch``."""
