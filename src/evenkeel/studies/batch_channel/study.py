"""Batch-channel normalization: accuracy at small normalization batches, and dead units.

The paper's tables on ImageNet and COCO are not reproduced here (Qiao et al., arXiv 1911.09738);
what is measured on CIFAR-10 is the claim behind them, beside batch norm and group norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Method:
    """A row of the study.

    Attributes:
        norm: normalizer of the reference network.
        weight_standard: whether weights are standardized.
        update_rate: of "running", where it is not the default.
        together: samples normalized together in its runs; none where it does not see the batch.
        watched: whether dead units are looked at after every epoch.
    """

    norm: str
    weight_standard: bool = False
    update_rate: float | None = None
    together: tuple[int, ...] = (128, 2)
    watched: bool = False


METHODS = {
    "BN": Method("batch", watched=True),
    "GN": Method("group", together=(), watched=True),
    "GN+WS": Method("group", True, together=(), watched=True),
    "BCN": Method("batch_channel", watched=True),
    "BCN+WS": Method("batch_channel", True),
    "BCN running": Method("batch_channel_running"),
    "BCN running+WS": Method("batch_channel_running", True),
    "BCN running 0.01": Method("batch_channel_running", update_rate=0.01, together=(2,)),
    "LN": Method("layer", together=(), watched=True),
}
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"samples": 600, "epochs": 2, "seeds": 1, "micro": 100, "micro_epochs": 1},
    "small": {"samples": 5000, "epochs": 4, "seeds": 1, "micro": 1000, "micro_epochs": 1},
    "full": {"samples": 20000, "epochs": 12, "seeds": 3, "micro": 10000, "micro_epochs": 2},
}
DISTANCES = ((0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (4.0, 0.0), (0.0, 0.5), (0.0, 1.0), (2.0, 1.0),
             (4.0, 2.0))  # fmt: skip
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
        "precision": "32-true" if smoke else "bf16-mixed",
    }
    micro = {
        **common,
        "epochs": size["micro_epochs"],
        "samples": size["micro"],
        "batch_size": 2,
        "learning_rate": 0.2 * 2 / 128,
    }
    whole = [
        [name, together]
        for name, method in METHODS.items()
        for together in method.together or (None,)
    ]
    at_two = [[name, 2 if METHODS[name].together else None] for name in METHODS if name != "LN"]
    seeds = range(size["seeds"])
    return [
        Part(
            "toy",
            "Distances and dead channels right after normalizing",
            _toy,
            {"groups": 4, "draws": 10},
        ),
        *(
            Part(
                f"accuracy_{seed}",
                "Error over training by normalizer, with 2 or 128 samples normalized together",
                _runs,
                {**common, "seed": seed, "runs": whole},
            )
            for seed in seeds
        ),
        *(
            part
            for seed in seeds
            for part in (
                Part(
                    f"micro_{seed}",
                    "Error with two samples in each step of SGD",
                    _runs,
                    {**micro, "seed": seed, "runs": at_two},
                ),
                Part(
                    f"distance_{seed}",
                    "Error of networks whose batch norms are held away from their point",
                    _distance,
                    {
                        **common,
                        "epochs": max(1, size["epochs"] // 2),
                        "seed": seed,
                        "distances": [list(d) for d in DISTANCES[:: 4 if smoke else 1]],
                    },
                ),
            )
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


def _runs(desk: Desk, settings: Facts) -> Facts:
    chosen = [(name, METHODS[name], together) for name, together in settings["runs"]]
    items = [
        {
            **_common(desk, settings),
            "norm": method.norm,
            "weight_standard": method.weight_standard,
            "update_rate": method.update_rate,
            "normalization_batch": None if together == settings["batch_size"] else together,
            "watched": method.watched and settings["seed"] == 0 and together != 2,
        }
        for _, method, together in chosen
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
            for (name, _, together), run in zip(chosen, done, strict=True)
        ]
    }


def _distance(desk: Desk, settings: Facts) -> Facts:
    items = [
        {
            **_common(desk, settings),
            "norm": "batch",
            "weight_standard": False,
            "normalization_batch": None,
            "watched": True,
            "displaced": displaced,
        }
        for displaced in settings["distances"]
    ]
    done = desk.each(trained, items, "distances")
    return {
        "runs": [
            {
                "means": means,
                "scales": scales,
                "seed": settings["seed"],
                "epochs": [{k: e[k] for k in ("epoch", "error", "dead")} for e in run["epochs"]],
            }
            for (means, scales), run in zip(settings["distances"], done, strict=True)
        ]
    }


def _common(desk: Desk, settings: Facts) -> Facts:
    keys = "architecture", "epochs", "samples", "batch_size", "learning_rate", "precision", "seed"
    return {
        "data": desk.data_name,
        "root": desk.data_root,
        "cache": desk.cache,
        **{key: settings[key] for key in keys},
    }


STUDY = Study(
    name="batch_channel",
    data={"smoke": "digits", "small": "cifar10", "full": "cifar10"},
    parts=parts,
    draw=draw,
)
