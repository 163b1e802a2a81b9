"""Colour that was never seen, what a chip makes of it, and quaternions where colour is seen.

An auto-encoder is trained on one grey picture (Parcollet et al. 2019). The published recipe:
kodim05 in grey, mean squared error over all channels, Adam at 5e-4, 3,000 steps of the whole
picture. The authors' table was made with errors of unsigned bytes, squared modulo 256, so it is not
beside ours. The residual networks are ours.
"""

from pathlib import Path
from typing import Any

from evenkeel import data as datasets
from evenkeel.studies.frame import Desk, Facts, Part, Study
from evenkeel.studies.quaternion.colour import side_by_side, trained
from evenkeel.studies.quaternion.figures import draw
from evenkeel.studies.quaternion.residual import NETWORKS, trained_on_cifar10

KINDS = ("quaternion", "real", "shared")
AUDITED = KINDS[:2]
SHOWN = ("kodim04", "kodim14", "kodim23")
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"steps": 20, "crop": 32, "seeds": 1, "kinds": KINDS[:2], "chips": 1,
              "samples": 256, "epochs": 1},
    "small": {"steps": 600, "crop": 96, "seeds": 3, "kinds": KINDS, "chips": 4,
              "samples": 5000, "epochs": 2},
    "full": {"steps": 3000, "crop": None, "seeds": 3, "kinds": KINDS, "chips": 8,
             "samples": 50000, "epochs": 6},
}  # fmt: skip
DEVICES = ("pcm", "gaussian:0.02", "gaussian:0.05", "gaussian:0.1")
AGES = ("0", "1d", "1y")


def parts(scale: str) -> list[Part]:
    """A part for each seed of the auto-encoders; their chips; the residual networks."""
    size = SIZES[scale]
    colour = [
        Part(
            f"colour_{seed}",
            "What auto-encoders that were trained on one grey picture make of colour pictures",
            _colour,
            {
                "seed": seed,
                "steps": size["steps"],
                "crop": size["crop"],
                "kinds": list(size["kinds"]),
                "learning_rate": 5e-4,
                "picture": "kodim05",
            },
        )
        for seed in range(size["seeds"])
    ]
    audits = Part(
        "audits",
        "What chips make of the auto-encoders, and what mends them",
        _audits,
        {"of": colour[0].settings, "devices": DEVICES, "ages": AGES, "chips": size["chips"]},
    )
    residual = Part(
        "residual",
        "A residual network of quaternions on CIFAR-10, beside real ones",
        _residual,
        {
            "seeds": size["seeds"],
            "data": "cifar10",
            "epochs": size["epochs"],
            "samples": size["samples"],
            "batch_size": 64,
            "learning_rate": 0.2,
            "precision": "32-true",
        },
    )
    return [*colour, audits, residual]


def _colour(desk: Desk, settings: Facts) -> Facts:
    folder = datasets.folder_of(desk.data_name, desk.data_root)
    seed = settings["seed"]
    kept = {kind: _kept(desk, kind, seed) for kind in settings["kinds"]}
    common = {key: settings[key] for key in ("seed", "steps", "crop", "learning_rate", "picture")}
    items = [{"folder": folder, "kind": kind, "kept": kept[kind], **common} for kind in kept]
    runs = desk.each(trained, items, "training")
    if settings["crop"] is None and seed == 0:
        side_by_side(folder, kept, list(SHOWN), desk.cache / "pictures.webp")
    return {"runs": runs}


def _kept(desk: Desk, kind: str, seed: int) -> Path:
    return desk.cache / f"{kind}_{seed}.safetensors"


def _audits(desk: Desk, settings: Facts) -> Facts:
    of = settings["of"]
    missing = [kind for kind in AUDITED if not _kept(desk, kind, of["seed"]).exists()]
    if missing:  # the cache of trained networks is gone, or was never here
        _colour(desk, of)
    return {
        kind: desk.audit(
            _kept(desk, kind, of["seed"]),
            f"audit of {kind}",
            task="reconstruct",
            devices=settings["devices"],
            ages=settings["ages"],
            chips=settings["chips"],
        )
        for kind in AUDITED
    }


def _residual(desk: Desk, settings: Facts) -> Facts:
    common = {k: v for k, v in settings.items() if k != "seeds"}
    items = [
        {"network": name, "seed": seed, "root": desk.data_root, "cache": desk.cache, **common}
        for name in NETWORKS
        for seed in range(settings["seeds"])
    ]
    return {"runs": desk.each(trained_on_cifar10, items, "training on CIFAR-10")}


STUDY = Study(
    name="quaternion",
    data={"smoke": "kodak", "small": "kodak", "full": "kodak"},
    parts=parts,
    draw=draw,
)
"""``evenkeel study quaternion``."""
