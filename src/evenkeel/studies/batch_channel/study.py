"""Batch-channel normalization: accuracy at small normalization batches, and dead units.

The paper's tables on ImageNet and COCO are not reproduced here (Qiao et al., arXiv 1911.09738);
what is measured on CIFAR-10 is the claim behind them, beside batch norm and group norm.
"""

from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import nn

from evenkeel.draws import Draws
from evenkeel.norm import BatchChannelNorm2d, singularity
from evenkeel.norm.singularity import Row
from evenkeel.studies.batch_channel.figures import draw
from evenkeel.studies.batch_channel.training import trained
from evenkeel.studies.frame import Desk, Facts, Part, Study

METHODS: dict[str, tuple[str, bool]] = {
    "BN": ("batch", False),
    "GN": ("group", False),
    "GN+WS": ("group", True),
    "BCN": ("batch_channel", False),
    "BCN+WS": ("batch_channel", True),
    "BCN running": ("batch_channel_running", False),
    "BCN running+WS": ("batch_channel_running", True),
    "LN": ("layer", False),
}
"""Normalizer, and whether weights are standardized."""
WATCHED = ("BN", "GN", "GN+WS", "LN", "BCN")
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"samples": 600, "epochs": 2, "seeds": 1, "micro": 100, "micro_epochs": 1},
    "small": {"samples": 5000, "epochs": 4, "seeds": 1, "micro": 1000, "micro_epochs": 1},
    "full": {"samples": 20000, "epochs": 12, "seeds": 3, "micro": 10000, "micro_epochs": 3},
}
DISTANCES = ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (4.0, 0.0), (0.0, 0.5), (0.0, 1.0),
             (1.0, 0.5), (2.0, 1.0), (4.0, 2.0))  # fmt: skip
"""Deviations of shifts and of log scales."""


def parts(scale: str) -> list[Part]:
    """The questions, in the order of work."""
    size, smoke = SIZES[scale], scale == "smoke"
    common = {
        "architecture": "resnet8_digits" if smoke else "resnet14_cifar10",
        "epochs": size["epochs"],
        "samples": size["samples"],
        "batch_size": 128,
        "learning_rate": 0.2,
    }
    runs = [
        [method, normalization]
        for normalization in (2, 128)
        for method in METHODS
        if not (method in ("GN", "GN+WS") and normalization == 2)  # they do not see the batch
        and not (method == "LN" and normalization == 2)
    ]
    micro = {
        **common,
        "epochs": size["micro_epochs"],
        "samples": size["micro"],
        "batch_size": 2,
        "learning_rate": 0.2 * 2 / 128,
    }
    return [
        Part(
            "toy",
            "Distances and dead channels right after normalizing",
            _toy,
            {"groups": 4, "draws": 10},
        ),
        Part(
            "accuracy",
            "Error over training by normalizer, with 2 or 128 samples normalized together",
            _accuracy,
            {**common, "seeds": size["seeds"], "runs": runs},
        ),
        Part(
            "micro",
            "Error with two samples in each step of SGD",
            _accuracy,
            {
                **micro,
                "seeds": min(2, size["seeds"]),
                "runs": [[m, 2] for m in METHODS if m != "LN"],
            },
        ),
        Part(
            "distance",
            "Error of networks whose batch norms are held away from their point",
            _distance,
            {
                **common,
                "epochs": max(1, size["epochs"] // 2),
                "distances": [list(d) for d in DISTANCES[:: 4 if smoke else 1]],
            },
        ),
    ]


def _toy(desk: Desk, settings: Facts) -> Facts:
    """Channels of unlike means and scales, through normalizers as they are when new."""
    groups = settings["groups"]
    makers: dict[str, Callable[[], nn.Module]] = {
        "GN": lambda: nn.GroupNorm(groups, 32),
        "LN": lambda: nn.GroupNorm(1, 32),
        "BN": lambda: nn.BatchNorm2d(32),
        "BCN": lambda: BatchChannelNorm2d(32, groups),
        "BCN running": lambda: BatchChannelNorm2d(32, groups, statistics="running"),
    }
    rows: dict[str, list[Row]] = {name: [] for name in makers}
    for seed in range(settings["draws"]):
        draws = Draws(seed, "toy")
        scale = draws.normal("scale", (32, 1, 1)).exp()
        shift = 2 * draws.normal("shift", (32, 1, 1))
        x = draws.normal("input", (64, 32, 8, 8)) * scale + shift
        for name, make in makers.items():
            network = nn.Sequential(make(), nn.ReLU()).train()
            with torch.no_grad():
                for _ in range(100):  # running statistics come to the batch's
                    network(x)
            rows[name] += singularity(network, [x]).rows
    return {
        name: {
            "mean": fmean(r.mean_distance or 0.0 for r in of),
            "std": fmean(r.std_distance or 0.0 for r in of),
            "dead": fmean(r.dead for r in of),
        }
        for name, of in rows.items()
    }


def _accuracy(desk: Desk, settings: Facts) -> Facts:
    keys = ("architecture", "epochs", "samples", "batch_size", "learning_rate")
    items = [
        {
            "data": desk.data_name,
            "root": desk.data_root,
            "cache": desk.cache,
            **{key: settings[key] for key in keys},
            "norm": METHODS[method][0],
            "weight_standard": METHODS[method][1],
            "normalization_batch": size if size < settings["batch_size"] else None,
            "seed": seed,
            "watched": method in WATCHED and seed == 0 and size >= settings["batch_size"],
        }
        for seed in range(settings["seeds"])
        for method, size in settings["runs"]
        if method != "LN" or seed == 0
    ]
    names = [
        (method, size)
        for seed in range(settings["seeds"])
        for method, size in settings["runs"]
        if method != "LN" or seed == 0
    ]
    runs = desk.each(trained, items, "training")
    return {
        "runs": [
            {"method": method, "normalization_batch": size, "seed": run["seed"],
             "epochs": run["epochs"]}
            for (method, size), run in zip(names, runs, strict=True)
        ]
    }  # fmt: skip


def _distance(desk: Desk, settings: Facts) -> Facts:
    keys = ("architecture", "epochs", "samples", "batch_size", "learning_rate")
    items = [
        {
            "data": desk.data_name,
            "root": desk.data_root,
            "cache": desk.cache,
            **{key: settings[key] for key in keys},
            "norm": "batch",
            "weight_standard": False,
            "normalization_batch": None,
            "seed": 0,
            "watched": True,
            "displaced": displaced,
        }
        for displaced in settings["distances"]
    ]
    runs = desk.each(trained, items, "distances")
    return {
        "runs": [
            {"means": means, "scales": scales, "epochs": run["epochs"]}
            for (means, scales), run in zip(settings["distances"], runs, strict=True)
        ]
    }


STUDY = Study(
    name="batch_channel",
    data={"smoke": "digits", "small": "cifar10", "full": "cifar10"},
    parts=parts,
    draw=draw,
)
