"""Colour that was never seen: an auto-encoder trained on one grey picture (Parcollet et al. 2019).

The published recipe: kodim05 in grey, mean squared error over all channels, Adam at 5e-4, 3,000
steps of the whole picture. The authors' table was made with errors of unsigned bytes, squared
modulo 256, so it is not beside ours.
"""

from typing import Any

from evenkeel import data as datasets
from evenkeel.studies.frame import Desk, Facts, Part, Study
from evenkeel.studies.quaternion.colour import side_by_side, trained
from evenkeel.studies.quaternion.figures import draw

KINDS = ("quaternion", "real", "shared")
SHOWN = ("kodim04", "kodim14", "kodim23")
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"steps": 20, "crop": 32, "seeds": 1, "kinds": KINDS[:2]},
    "small": {"steps": 600, "crop": 96, "seeds": 3, "kinds": KINDS},
    "full": {"steps": 3000, "crop": None, "seeds": 3, "kinds": KINDS},
}


def parts(scale: str) -> list[Part]:
    """A part for each seed."""
    size = SIZES[scale]
    return [
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


def _colour(desk: Desk, settings: Facts) -> Facts:
    folder = datasets.folder_of(desk.data_name, desk.data_root)
    seed = settings["seed"]
    kept = {kind: desk.cache / f"{kind}_{seed}.safetensors" for kind in settings["kinds"]}
    common = {key: settings[key] for key in ("seed", "steps", "crop", "learning_rate", "picture")}
    items = [{"folder": folder, "kind": kind, "kept": kept[kind], **common} for kind in kept]
    runs = desk.each(trained, items, "training")
    if settings["crop"] is None and seed == 0:
        side_by_side(folder, kept, list(SHOWN), desk.cache / "pictures.webp")
    return {"runs": runs}


STUDY = Study(
    name="quaternion",
    data={"smoke": "kodak", "small": "kodak", "full": "kodak"},
    parts=parts,
    draw=draw,
)
"""``evenkeel study quaternion``."""
