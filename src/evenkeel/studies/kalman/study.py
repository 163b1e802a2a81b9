"""Batch Kalman normalization: how good its statistics are, what they cost, and what they bring.

The published curves are of a pre-activation ResNet-32 on all of CIFAR-10 for 400 epochs (Wang et
al., arXiv 1802.03133; the authors' repository). Ours have the protocol of the batch-channel study,
whose runs of batch and group norm stand beside them.
"""

from typing import Any

from evenkeel.studies.frame import Desk, Facts, Part, Study
from evenkeel.studies.kalman.calibration import few_images
from evenkeel.studies.kalman.cost import step_times
from evenkeel.studies.kalman.figures import draw
from evenkeel.studies.kalman.training import trained

METHODS: dict[str, tuple[int, Facts]] = {
    "BKN 0.1": (2, {"gain": 0.1, "propagate": "raw"}),
    "BKN 0.1, learned": (2, {"gain": 0.1, "propagate": "raw", "learn_gain": True}),
    "BKN 0.1, observed": (2, {"gain": 0.1, "propagate": "observed"}),
    "BKN 0.1, observed, learned": (
        2, {"gain": 0.1, "propagate": "observed", "learn_gain": True},
    ),
    "BKN 0.95": (128, {"gain": 0.95, "propagate": "raw"}),
}  # fmt: skip
"""Samples normalized together, and options of ``kalmanize``. BN and GN are those of the
batch-channel study."""
VARIANTS = [
    [gain, propagate] for propagate in ("raw", "observed", "normalized") for gain in (0.1, 0.5)
]
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"samples": 600, "epochs": 2, "seeds": 1, "chips": 1, "test": 200, "images": (8,),
              "networks": ("resnet14_cifar10",), "batch": 8, "rounds": 1},
    "small": {"samples": 5000, "epochs": 4, "seeds": 1, "chips": 4, "test": 1000, "images": (8, 32),
              "networks": ("resnet14_cifar10",), "batch": 128, "rounds": 5},
    "full": {"samples": 20000, "epochs": 12, "seeds": 3, "chips": 8, "test": 2000,
             "images": (8, 16, 32, 64), "networks": ("resnet14_cifar10", "ResNet-18"),
             "batch": 128, "rounds": 5},
}  # fmt: skip


def parts(scale: str) -> list[Part]:
    """The questions, in the order of work."""
    size, smoke = SIZES[scale], scale == "smoke"
    training = {
        "architecture": "resnet8_digits" if smoke else "resnet14_cifar10",
        "epochs": size["epochs"],
        "samples": size["samples"],
        "batch_size": 128,
        "learning_rate": 0.2,
        "precision": "32-true" if smoke else "bf16-mixed",
    }
    watched = {
        "epochs": [0, 1] if smoke else sorted({0, 1, 3, size["epochs"]}),
        "sizes": [1, 2, 8] if smoke else [1, 2, 8, 32, 128],
        "variants": VARIANTS[:1] if smoke else VARIANTS,
        "batches": 1 if smoke else 2,
        "oracle": 200 if smoke else 10000,
    }
    return [
        Part(
            "cost",
            "Time of a training step with priors, against batch norm over the same parts",
            _cost,
            {key: size[key] for key in ("networks", "batch", "rounds")} | {"together": [2, 128]},
        ),
        Part(
            "estimates",
            "Errors of statistics observed, predicted and fused, over training with batch norm",
            _estimates,
            {**training, "seed": 0, "watched": watched},
        ),
        *(
            Part(
                f"accuracy_{seed}",
                "Error over training with priors",
                _accuracy,
                {**training, "seed": seed, "methods": [[n, *METHODS[n]] for n in METHODS]},
            )
            for seed in range(size["seeds"])
        ),
        *(
            [
                Part(
                    "calibration",
                    "Whether predicted statistics help to calibrate by a handful of images",
                    _calibration,
                    {
                        "levels": [0.05, 0.1],
                        "chips": size["chips"],
                        "images": list(size["images"]),
                        "test_samples": size["test"],
                    },
                    ("resnet14.safetensors",),
                )
            ]
            if not smoke
            else []
        ),
    ]


def _cost(desk: Desk, settings: Facts) -> Facts:
    runs: list[Facts] = []
    for k, network in enumerate(settings["networks"]):
        desk.progress("timing", k, len(settings["networks"]))
        runs += step_times(network, settings["batch"], settings["together"], settings["rounds"])
    return {"runs": runs}


def _estimates(desk: Desk, settings: Facts) -> Facts:
    item = {**_common(desk, settings), "kalman": None, "normalization_batch": None}
    (run,) = desk.each(trained, [item | {"watched": settings["watched"]}], "training")
    rows = [{"epoch": 0, **row} for row in run["distances"]]
    for epoch in run["epochs"]:
        rows += [{"epoch": epoch["epoch"], **row} for row in epoch.get("distances", ())]
    return {"rows": rows}


def _accuracy(desk: Desk, settings: Facts) -> Facts:
    items = [
        {
            **_common(desk, settings),
            "kalman": kalman,
            "normalization_batch": None if together == settings["batch_size"] else together,
        }
        for _, together, kalman in settings["methods"]
    ]
    done = desk.each(trained, items, "training")
    return {
        "runs": [
            {
                "method": name,
                "together": together,
                "seed": settings["seed"],
                "epochs": run["epochs"],
            }
            for (name, together, _), run in zip(settings["methods"], done, strict=True)
        ]
    }


def _calibration(desk: Desk, settings: Facts) -> Facts:
    items = [
        {
            "network": desk.networks / "resnet14.safetensors",
            "data": desk.data_name,
            "root": desk.data_root,
            "level": level,
            "chip": chip,
            "images": images,
            "test_samples": settings["test_samples"],
        }
        for level in settings["levels"]
        for images in settings["images"]
        for chip in range(settings["chips"])
    ]
    return {"runs": desk.each(few_images, items, "calibrating")}


def _common(desk: Desk, settings: Facts) -> Facts:
    keys = "architecture", "epochs", "samples", "batch_size", "learning_rate", "precision", "seed"
    return {
        "data": desk.data_name,
        "root": desk.data_root,
        "cache": desk.cache,
        "norm": "batch",
        **{key: settings[key] for key in keys},
    }


STUDY = Study(
    name="kalman",
    data={"smoke": "digits", "small": "cifar10", "full": "cifar10"},
    parts=parts,
    draw=draw,
)
