"""Equi-normalization: how fast it balances, what it does to training, and to analog arrays.

The paper's figure on CIFAR-10 (Stock et al., ICLR 2019, as reprinted in a report of the ICLR 2019
reproducibility challenge) is put beside ours; its ImageNet table was not to be had.
"""

from dataclasses import asdict, dataclass
from typing import Any

from evenkeel.models import build
from evenkeel.saving import save
from evenkeel.studies.equi_norm.cost import rounds, seconds, share_of_a_step
from evenkeel.studies.equi_norm.figures import draw
from evenkeel.studies.equi_norm.training import trained
from evenkeel.studies.frame import Desk, Facts, Part, Study
from evenkeel.train import fit


@dataclass(frozen=True)
class Method:
    """A row of the training runs.

    Attributes:
        norm: normalizer.
        depth_factor: of the balancing after each step; None for none.
        learning_rate: of the first step, by the authors' recipe for 15 and 19 layers.
    """

    norm: str
    depth_factor: float | None
    learning_rate: float


DENSE = {
    "baseline": Method("none", None, 0.05),
    "BN": Method("batch", None, 0.1),
    "GN": Method("group", None, 0.1),
    "ENorm": Method("none", 1.2, 0.05),
    "ENorm + BN, output side": Method("batch", 1.2, 0.1),
}
RESIDUAL = {
    "none": Method("none", None, 0.01),
    "BN": Method("batch", None, 0.02),
    "GN": Method("group", None, 0.02),
    "ENorm": Method("none", 1.1, 0.01),
}
RESIDUAL_TRAINING = {"batch_size": 8, "momentum": 0.9, "weight_decay": 5e-4}
LOWER: dict[str, Method] = {
    "ENorm, rate 0.003": Method("none", 1.1, 0.003),
    "ENorm, rate 0.003, depth factor 1": Method("none", 1.0, 0.003),
}
"""At the rate of "no normalizer" the balanced residual network does not learn."""
REMEDIES = (
    "none", "balance", "balance:p=8", "balance:arrays", "calibrate", "balance+calibrate",
    "balance:p=8+calibrate", "balance:arrays+calibrate", "balance+balance:arrays+calibrate",
    "match+clip+calibrate", "match+balance:arrays+calibrate", "match+balance:arrays+clip+calibrate",
)  # fmt: skip
DEVICES = ("gaussian:0.05", "gaussian:0.08", "gaussian:0.1", "gaussian:0.12", "gaussian:0.15")
AGES = ("0", "1d")
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"samples": 600, "epochs": 2, "residual_epochs": 1, "seeds": 1, "width": 50,
              "intermediate": (2,), "chains": (7,), "chips": 2, "test": 100, "repeats": 1},
    "small": {"samples": 10000, "epochs": 5, "residual_epochs": 2, "seeds": 1, "width": 500,
              "intermediate": (15,), "chains": (7, 21, 51), "chips": 4, "test": 1000, "repeats": 3},
    "full": {"samples": 50000, "epochs": 20, "residual_epochs": 4, "seeds": 3, "width": 500,
             "intermediate": (15, 19), "chains": (7, 21, 51), "chips": 16, "test": 2000,
             "repeats": 5},
}  # fmt: skip


def parts(scale: str) -> list[Part]:
    """The questions, in the order of work."""
    size, smoke = SIZES[scale], scale == "smoke"
    training = {
        "samples": size["samples"],
        "precision": "32-true" if smoke else "bf16-mixed",
    }
    return [
        Part(
            "rounds",
            "Rounds of the solver to a relative excess of 1e-8, for chains of layers",
            _rounds,
            {"chains": list(size["chains"]), "widths": [8, 64], "seeds": 1 if smoke else 5},
        ),
        Part(
            "cost",
            "Seconds to balance a ResNet-50, and the share of a sweep in a step of training",
            _cost,
            {"repeats": size["repeats"], "batch": 8 if smoke else 128},
        ),
        Part(
            "analog",
            "Balancing of both kinds before analog arrays, alone and before calibration",
            _analog,
            {
                "chips": size["chips"],
                "test_samples": size["test"],
                "epochs": 2 if smoke else 0,
                "devices": list(DEVICES[-1:] if smoke else DEVICES),
                "aging": [] if smoke else ["pcm"],
                "ages": list(AGES),
                "remedies": list(REMEDIES),
            },
            () if smoke else ("resnet14.safetensors",),
        ),
        *(
            []
            if smoke
            else [
                Part(
                    "residual_rates",
                    "The balanced residual network at a lower rate",
                    _lower,
                    {
                        **training,
                        **RESIDUAL_TRAINING,
                        "seed": 0,
                        "epochs": size["residual_epochs"],
                        "architecture": "resnet14_cifar10",
                        "methods": {name: asdict(method) for name, method in LOWER.items()},
                    },
                )
            ]
        ),
        *(
            part
            for seed in range(size["seeds"])
            for part in (
                Part(
                    f"dense_{seed}",
                    "Error of fully connected networks over training",
                    _dense,
                    {
                        **training,
                        "seed": seed,
                        "epochs": size["epochs"],
                        "width": size["width"],
                        "intermediate": list(size["intermediate"]),
                        "batch_size": 256,
                        "momentum": 0.0,
                        "weight_decay": 1e-3,
                        "methods": list(DENSE),
                    },
                ),
                Part(
                    f"residual_{seed}",
                    "Error of a residual network over training with 8 samples in each step",
                    _residual,
                    {
                        **training,
                        "seed": seed,
                        "epochs": size["residual_epochs"],
                        "architecture": "resnet8_digits" if smoke else "resnet14_cifar10",
                        **RESIDUAL_TRAINING,
                        "methods": list(RESIDUAL),
                    },
                ),
            )
        ),
    ]


def _rounds(desk: Desk, settings: Facts) -> Facts:
    items = [
        {"layers": layers, "width": width, "seed": seed}
        for layers in settings["chains"]
        for width in settings["widths"]
        for seed in range(settings["seeds"])
    ]
    return {"runs": desk.each(rounds, items, "solving")}


def _cost(desk: Desk, settings: Facts) -> Facts:
    desk.progress("timing", 0, 2)
    figures = {"resnet50": seconds(settings["repeats"])}
    desk.progress("timing", 1, 2)
    figures["resnet18"] = share_of_a_step(settings["batch"], settings["repeats"])
    desk.progress("timing", 2, 2)
    return figures


def _analog(desk: Desk, settings: Facts) -> Facts:
    network = desk.networks / "resnet14.safetensors"
    if settings["epochs"]:
        network = desk.cache / "network.safetensors"
        save(
            fit(lambda: build("resnet8_digits"), *desk.training_data(), epochs=settings["epochs"]),
            network,
        )
    options = {
        "remedies": settings["remedies"],
        "chips": settings["chips"],
        "test_samples": settings["test_samples"],
    }
    figures = desk.audit(network, "devices", devices=settings["devices"], **options)
    if settings["aging"]:
        aging = desk.audit(
            network, "PCM", devices=settings["aging"], ages=settings["ages"], **options
        )
        figures["cells"] += aging["cells"]
    return figures


def _dense(desk: Desk, settings: Facts) -> Facts:
    chosen = [(name, n) for n in settings["intermediate"] for name in settings["methods"]]
    items = [
        _item(desk, settings, DENSE[name], {"intermediate": n, "width": settings["width"]}, False)
        for name, n in chosen
    ]
    done = desk.each(trained, items, "training")
    return {
        "runs": [
            {"method": name, "intermediate": n, "seed": settings["seed"], "epochs": run["epochs"]}
            for (name, n), run in zip(chosen, done, strict=True)
        ]
    }


def _residual(desk: Desk, settings: Facts) -> Facts:
    return _trained(desk, settings, {name: RESIDUAL[name] for name in settings["methods"]})


def _lower(desk: Desk, settings: Facts) -> Facts:
    return _trained(desk, settings, LOWER)


def _trained(desk: Desk, settings: Facts, methods: dict[str, Method]) -> Facts:
    image = settings["architecture"] != "resnet8_digits"
    network = {"name": settings["architecture"]}
    items = [_item(desk, settings, method, network, image) for method in methods.values()]
    done = desk.each(trained, items, "training")
    return {
        "runs": [
            {"method": name, "seed": settings["seed"], "epochs": run["epochs"]}
            for name, run in zip(methods, done, strict=True)
        ]
    }


def _item(
    desk: Desk, settings: Facts, method: Method, network: dict[str, Any], augment: bool
) -> Facts:
    keys = "seed", "epochs", "samples", "batch_size", "momentum", "weight_decay", "precision"
    return {
        "data": desk.data_name,
        "root": desk.data_root,
        "cache": desk.cache,
        "network": network,
        "norm": method.norm,
        "depth_factor": method.depth_factor,
        "learning_rate": method.learning_rate,
        "augment": augment,
        **{key: settings[key] for key in keys},
    }


STUDY = Study(
    name="equi_norm",
    data={"smoke": "digits", "small": "cifar10", "full": "cifar10"},
    parts=parts,
    draw=draw,
)
