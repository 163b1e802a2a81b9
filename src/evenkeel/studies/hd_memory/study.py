"""The memory on a crossbar: codes, devices, spreads, and classes learnt one after the other.

Published with 512 dimensions in full precision (Karunaratne et al., Nature Communications 12, 2468,
as its reimplementations quote the supplement): 97.44 % for 5-way 1-shot, 97.79 for 20-way 5-shot,
93.97 for 100-way 5-shot; on phase-change hardware 2.7 points less for the last. Theirs is an
unofficial cut of Omniglot; ours is the official one, of which no alphabet is on both sides.
"""

from typing import Any

from evenkeel.memory import CODES
from evenkeel.studies.frame import Desk, Facts, Part, Study
from evenkeel.studies.hd_memory.asking import ask, learn, vectors_of
from evenkeel.studies.hd_memory.figures import draw

NETWORKS = {
    objective: f"../hd_memory/{name}.safetensors"
    for objective, name in (
        ("softabs", "controller"), ("softmax", "softmax"), ("prototypes", "prototypes"),
    )
}  # fmt: skip
"""Beside the folder of the other studies' networks; trained by ``evenkeel fewshot train``."""
HOUR, DAY = 3600.0, 86_400.0
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"tasks": [[3, 1], [5, 2]], "episodes": 20, "levels": [0.5], "classes": 4, "runs": 2,
              "continual_shots": 2},
    "small": {"tasks": [[5, 1], [20, 5]], "episodes": 200, "levels": [0.3, 0.6, 1.0],
              "classes": 50, "runs": 2, "continual_shots": 5},
    "full": {"tasks": [[5, 1], [20, 5], [100, 5]], "episodes": 1000,
             "levels": [0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0], "classes": 400, "runs": 5,
             "continual_shots": 5},
}  # fmt: skip


def parts(scale: str) -> list[Part]:
    """The questions, in the order of work."""
    size, smoke = SIZES[scale], scale == "smoke"
    common = {"episodes": size["episodes"], "seed": 0}
    largest = size["tasks"][-1]

    def files(*objectives: str) -> tuple[str, ...]:
        return () if smoke else tuple(NETWORKS[objective] for objective in objectives)

    return [
        Part(
            "software",
            "Codes by tasks without a device, beside prototypical networks",
            _software,
            {**common, "tasks": size["tasks"]},
            files("softabs", "prototypes"),
        ),
        Part(
            "crossbar",
            "Phase-change memory right after writing, after an hour and a day",
            _crossbar,
            {**common, "task": largest, "device": "pcm", "ages": [0.0, HOUR, DAY]},
            files("softabs"),
        ),
        Part(
            "spread",
            "Conductance spread, with the controller and with one trained with softmax attention",
            _spread,
            {**common, "task": largest, "levels": size["levels"]},
            files("softabs", "softmax"),
        ),
        Part(
            "continual",
            "Classes written one after the other, an hour apart, on phase-change memory",
            _continual,
            {
                "seed": 0,
                "runs": size["runs"],
                "classes": size["classes"],
                "shots": size["continual_shots"],
                "every_s": HOUR,
            },
            files("softabs"),
        ),
    ]


def _vectors(desk: Desk, objective: str) -> Any:
    smoke = desk.data_name == "digits"
    return vectors_of(desk, objective, None if smoke else NETWORKS[objective])


def _asked(desk: Desk, settings: Facts, questions: list[Facts], vectors: Any) -> list[Facts]:
    common = {"episodes": settings["episodes"], "seed": settings["seed"], "vectors": vectors}
    items = [{"question": question, **common} for question in questions]
    return [row for answer in desk.each(ask, items, "asking") for row in answer["rows"]]


def _software(desk: Desk, settings: Facts) -> Facts:
    memory = [{"task": task, "code": code} for task in settings["tasks"] for code in CODES]
    several = [
        {"task": task, "code": code, "options": {"read_out": "nearest"}}
        for task in settings["tasks"]
        for code in CODES
        if task[1] > 1
    ]
    means = [
        {"task": task, "code": code, "options": {"prototypes": True}}
        for task in settings["tasks"]
        for code in CODES
        if task[1] > 1
    ]
    own = _vectors(desk, "softabs")
    plain = [{"task": task, "code": "prototypes"} for task in settings["tasks"]]
    return {
        "sum": _asked(desk, settings, memory, own),
        "nearest": _asked(desk, settings, several, own),
        "one_key_a_class": _asked(desk, settings, means, own),
        "prototypes": _asked(desk, settings, plain, _vectors(desk, "prototypes")),
    }


def _crossbar(desk: Desk, settings: Facts) -> Facts:
    vectors = _vectors(desk, "softabs")
    figures = {}
    for name, compensate in (("compensated", True), ("as_read", False)):
        questions = [
            {
                "task": settings["task"],
                "code": code,
                "device": settings["device"],
                "ages": settings["ages"],
                "compensate": compensate,
            }
            for code in CODES
        ]
        figures[name] = _asked(desk, settings, questions, vectors)
    digital = [{"task": settings["task"], "code": code} for code in CODES]
    return {"software": _asked(desk, settings, digital, vectors), **figures}


def _spread(desk: Desk, settings: Facts) -> Facts:
    devices = [None, *(f"spread:{level:g}" for level in settings["levels"])]
    figures: Facts = {"levels": [0.0, *settings["levels"]]}
    for objective in ("softabs", "softmax"):
        real: Facts = {} if objective == "softabs" else {"sharpening": "softmax"}
        questions = [
            {
                "task": settings["task"],
                "code": code,
                "device": device,
                "options": real if code == "real" else {},
            }
            for code in CODES
            for device in devices
        ]
        figures[objective] = _asked(desk, settings, questions, _vectors(desk, objective))
    # What opposite vectors get by the absolute value, they do not get by these.
    figures["softmax_otherwise"] = {
        sharpening: _asked(
            desk,
            settings,
            [
                {"task": settings["task"], "code": "bipolar", "device": device,
                 "options": {"sharpening": sharpening}}
                for device in devices
            ],
            _vectors(desk, "softmax"),
        )
        for sharpening in ("identity", "softmax")
    }  # fmt: skip
    return figures


def _continual(desk: Desk, settings: Facts) -> Facts:
    vectors = _vectors(desk, "softabs")
    items = [
        {
            "vectors": vectors,
            "question": {
                "task": [settings["classes"], settings["shots"]],
                "code": code,
                "device": device,
            },
            "every_s": 0.0 if device is None else settings["every_s"],
            "runs": settings["runs"],
            "seed": settings["seed"],
        }
        for code in ("real", "bipolar")
        for device in (None, "pcm")
        if code == "bipolar" or device is None
    ]
    done = desk.each(learn, items, "learning")
    return {
        "runs": [
            {"code": item["question"]["code"], "device": item["question"]["device"], **rows}
            for item, rows in zip(items, done, strict=True)
        ]
    }


STUDY = Study(
    name="hd_memory",
    data={"smoke": "digits", "small": "omniglot", "full": "omniglot"},
    parts=parts,
    draw=draw,
)
"""``evenkeel study hd_memory``."""
