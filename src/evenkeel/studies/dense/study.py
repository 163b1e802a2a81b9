"""What chips make of a segmentation network and of a detector, and what mends them.

The networks are those of the recipes ``nuclei`` and ``bccd``.
"""

from dataclasses import replace
from typing import Any

from evenkeel.studies.dense.figures import draw
from evenkeel.studies.frame import Desk, Facts, Part, Study

OF = {
    "segmentation": ("nuclei", "segment", "../dense/unet.safetensors"),
    "detection": ("bccd", "detect", "../dense/centre_detector.safetensors"),
}
"""Data, task, and the network below the folder of trained ones."""
DEVICES = ("gaussian:0.05", "gaussian:0.1", "pcm")
AGES = ("1d", "1y")
REMEDIES = ("none", "drift", "calibrate", "match+calibrate", "balance:arrays+calibrate", "online")
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"chips": 1, "test": 8, "devices": DEVICES[1:2], "remedies": REMEDIES[:3:2]},
    "small": {"chips": 2, "test": 24, "devices": DEVICES, "remedies": REMEDIES},
    "full": {"chips": 8, "test": None, "devices": DEVICES, "remedies": REMEDIES},
}


def parts(scale: str) -> list[Part]:
    """An audit of each."""
    size = SIZES[scale]
    return [
        Part(
            name,
            f"What chips make of a network for {name}, and what mends it",
            _audit,
            {
                "data": data,
                "task": task,
                "network": network,
                "devices": size["devices"],
                "ages": AGES,
                "remedies": size["remedies"],
                "chips": size["chips"],
                "test_samples": size["test"],
            },
            networks=(network,),
        )
        for name, (data, task, network) in OF.items()
    ]


def _audit(desk: Desk, settings: Facts) -> Facts:
    options = {k: v for k, v in settings.items() if k not in ("data", "network")}
    desk = replace(desk, data_name=settings["data"])
    return desk.audit(desk.networks / settings["network"], settings["task"], **options)


STUDY = Study(
    name="dense",
    data=dict.fromkeys(SIZES, "nuclei"),
    parts=parts,
    draw=draw,
    version=2,  # 1: 64 pictures to calibrate with; now 256 of nuclei, 205 of blood
)
"""``evenkeel study dense``."""
