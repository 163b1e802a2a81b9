"""Noise-aware normalization: what it recovers, what it needs, and where it does not help.

The paper (Tsai et al., arXiv 2007.03230) is known by its abstracts only: its tables are not
reproduced here. What is measured are its claims, each beside what else one could do: that
re-aligning statistics mends networks whatever the noise, without retraining, more reliably than
methods that know the noise beforehand.
"""

import functools
from pathlib import Path
from typing import Any

from evenkeel.models import build
from evenkeel.saving import save
from evenkeel.studies.frame import Desk, Facts, Part, Study
from evenkeel.studies.noise_aware.figures import draw
from evenkeel.studies.noise_aware.harden import hardened_network
from evenkeel.studies.noise_aware.stream import aged, served
from evenkeel.train import fit

CLASSIFIER = "match+calibrate:layers=*.match"
"""The classifier's outputs alone, by their moments."""
ROWS = (
    "none", "clip", "pooled", "online", CLASSIFIER, "calibrate:adabs:gate=false", "calibrate",
    "calibrate:samples=32", "match+calibrate", "match+clip+calibrate",
)  # fmt: skip
DRIFT_ROWS = (*ROWS, "drift", "match+drift+calibrate")

FAMILIES = {
    "gaussian": (
        "gaussian:0.02",
        "gaussian:0.05",
        "gaussian:0.08",
        "gaussian:0.1",
        "gaussian:0.15",
    ),
    "pcm": ("pcm",),
    "stuck_at": ("stuck_at:0.005:0.005", "stuck_at:0.025:0.025"),
    "log_normal": ("log_normal:0.2", "log_normal:0.4"),
    "gain": ("gain:0.7", "gain:0.4"),
}
AGES = ("0", "1h", "1d", "1mo", "1y")
HEADLINE = (("gaussian:0.1", "0"), ("pcm", "1d"), ("stuck_at:0.005:0.005", "0"))
HARDENED_ON = "gaussian:0.08"
DEPLOYED_ON = ((HARDENED_ON, "0"), ("gaussian:0.1", "0"), ("log_normal:0.4", "0"),
               ("gain:0.4", "0"), ("stuck_at:0.025:0.025", "0"), ("pcm", "0"),
               ("pcm", "1d"))  # fmt: skip

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"chips": 2, "test": 100, "many": 200, "epochs": 2, "harden_epochs": 1},
    "small": {"chips": 4, "test": 1000, "many": 2000, "epochs": 0, "harden_epochs": 1},
    "full": {"chips": 16, "test": 2000, "many": 10000, "epochs": 0, "harden_epochs": 3},
}
"""By scale: chips, test samples of a sweep, those of a headline row, and epochs of trainings.

Networks are trained on the way only for the smallest scale; the others take trained ones.
"""


def parts(scale: str) -> list[Part]:
    """The questions, in the order of work."""
    size = SIZES[scale]
    small = scale == "smoke"
    common = {"chips": size["chips"], "test_samples": size["test"], "epochs": size["epochs"]}

    def files(norm: str) -> tuple[str, ...]:
        return () if size["epochs"] else (published(norm),)

    sweeps = [
        Part(
            family,
            f"Every remedy, alone and combined, on {family}",
            _sweep,
            {
                **common,
                "network": "batch",
                "devices": list(devices[-1:] if small else devices),
                "ages": list(AGES[2:3] if small else AGES) if family == "pcm" else ["0"],
                "remedies": list(DRIFT_ROWS if family == "pcm" else ROWS),
            },
            files("batch"),
        )
        for family, devices in FAMILIES.items()
    ]
    without = [
        Part(
            f"norm_{norm}",
            f"Output matching on a network with {norm} norm",
            _sweep_each,
            {
                **common,
                "network": norm,
                "cells": [["gaussian:0.05", "0"], ["gaussian:0.1", "0"], ["log_normal:0.4", "0"],
                          ["pcm", "1d"]][: 1 if small else 4],
                "remedies": ["none", "match+calibrate", "clip", "match+clip+calibrate"],
            },
            files(norm),
        )
        for norm in ("group", "none")
    ]  # fmt: skip
    more = [
        Part(
            "online",
            "The online layer on a shuffled stream, and on streams of one class",
            _streams,
            {
                "runs": [
                    [device, age, batch, max(2, chips)]
                    for device, age in HEADLINE[:2]
                    for batch, chips in ((50, size["chips"] // 2), (4, size["chips"] // 8))
                ],
                "stream": size["many"],
                "epochs": size["epochs"],
            },
            files("batch"),
        ),
        Part(
            "ageing",
            "The online layer on a PCM chip that ages from a minute to a month while it serves",
            _ageing,
            {
                "chips": max(2, size["chips"] // 2),
                "warm_up": 1200 if not small else 60,
                "steps": 20 if not small else 4,
                "samples": 400 if not small else 20,
                "epochs": size["epochs"],
            },
            files("batch"),
        ),
        Part(
            "hardened",
            f"A network hardened by noise injection on {HARDENED_ON}, deployed on every device",
            _hardened,
            {
                **common,
                "on": HARDENED_ON,
                "harden_epochs": size["harden_epochs"],
                "cells": [list(cell) for cell in DEPLOYED_ON[: 2 if small else None]],
                "remedies": ["none", "calibrate", "match+calibrate", "match+clip+calibrate"],
            },
            files("batch"),
        ),
    ]
    last = [
        Part(
            "reads",
            "Few images where noise is new at every read: each run once, or eight times",
            _sweep_each,
            {
                **common,
                "network": "batch",
                "cells": [["pcm", "1d"], ["pcm", "1y"]][: 1 if small else 2],
                "remedies": ["none", *(
                    f"calibrate:samples={n}" + (f":reads={r}" if r > 1 else "")
                    for n in (16, 64) for r in (1, 8)
                )],
            },
            files("batch"),
        ),
        Part(
            "headline",
            "The headline rows on all test samples",
            _sweep_each,
            {
                **common,
                "test_samples": size["many"],
                "network": "batch",
                "cells": [list(cell) for cell in HEADLINE[: 1 if small else 3]],
                "remedies": ["none", "drift", "online", "calibrate:adabs:gate=false", "calibrate",
                             "match+calibrate", "match+clip+calibrate"],
            },
            files("batch"),
        ),
    ]  # fmt: skip
    return [sweeps[0], more[0], *without, *more[1:], *sweeps[1:], *last]


def published(norm: str) -> str:
    """File of the trained network with that norm."""
    return "resnet14.safetensors" if norm == "batch" else f"resnet14_{norm}.safetensors"


def trained(desk: Desk, norm: str, epochs: int) -> Path:
    """The network with that norm: trained here in so many epochs, or as published for 0."""
    if epochs == 0:
        return desk.networks / published(norm)
    path = desk.cache / f"resnet8_{norm}_{epochs}.safetensors"
    if not path.exists():
        make = functools.partial(build, "resnet8_digits", norm=norm)
        save(fit(make, *desk.training_data(), epochs=epochs, learning_rate=0.1), path)
    return path


def _sweep(desk: Desk, settings: Facts) -> Facts:
    return desk.audit(
        trained(desk, settings["network"], settings["epochs"]),
        " ".join(settings["devices"]),
        devices=settings["devices"],
        ages=settings["ages"],
        remedies=settings["remedies"],
        chips=settings["chips"],
        test_samples=settings["test_samples"],
    )


def _sweep_each(desk: Desk, settings: Facts, network: Path | None = None) -> Facts:
    """As a sweep, for pairs of device and age."""
    path = network or trained(desk, settings["network"], settings["epochs"])
    audits = [
        desk.audit(
            path,
            f"{device} {age}",
            devices=[device],
            ages=[age],
            remedies=settings["remedies"],
            chips=settings["chips"],
            test_samples=settings["test_samples"],
        )
        for device, age in settings["cells"]
    ]
    return {
        **audits[0],
        "trial_seconds": sum(audit["trial_seconds"] for audit in audits),
        "cells": [cell for audit in audits for cell in audit["cells"]],
    }


def _hardened(desk: Desk, settings: Facts) -> Facts:
    plain = trained(desk, "batch", settings["epochs"])
    network, minutes = hardened_network(desk, plain, settings["on"], settings["harden_epochs"])
    return {
        "minutes_to_harden": minutes,
        "plain": _sweep_each(desk, settings, plain),
        "hardened": _sweep_each(desk, settings, network),
    }


def _streams(desk: Desk, settings: Facts) -> Facts:
    items = [
        {
            **_where(desk, settings),
            "device": device,
            "age": age,
            "seed": seed,
            "batch": batch,
            "stream": settings["stream"],
        }
        for device, age, batch, chips in settings["runs"]
        for seed in range(chips)
    ]
    return {"chips": desk.each(served, items, "streams")}


def _ageing(desk: Desk, settings: Facts) -> Facts:
    sizes = {key: settings[key] for key in ("warm_up", "steps", "samples")}
    items = [{**_where(desk, settings), "seed": k, **sizes} for k in range(settings["chips"])]
    return {"chips": desk.each(aged, items, "ageing")}


def _where(desk: Desk, settings: Facts) -> Facts:
    network = trained(desk, "batch", settings["epochs"])
    return {"network": network, "data": desk.data_name, "root": desk.data_root}


STUDY = Study(
    name="noise_aware",
    data={"smoke": "digits", "small": "cifar10", "full": "cifar10"},
    parts=parts,
    draw=draw,
)
