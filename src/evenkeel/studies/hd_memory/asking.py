"""A question that is put to the memory, in a process of its own; and the vectors it is put to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from evenkeel import data as datasets
from evenkeel.analog.device import as_device
from evenkeel.audit.names import resolve
from evenkeel.data import LabelledImages
from evenkeel.data.dataset import fingerprint
from evenkeel.files import write_atomically
from evenkeel.memory import OBJECTIVES, EpisodeSampler
from evenkeel.memory.continual import learn_one_by_one
from evenkeel.memory.evaluation import Question, rows_of, shares_of
from evenkeel.memory.recall import embed
from evenkeel.models import build
from evenkeel.studies.frame import Desk, Facts, load_data, load_network
from evenkeel.train import fit_episodes, launched

SIZE = 32


def question_of(
    task: Sequence[int],
    code: str,
    device: str | None = None,
    ages: Sequence[float] = (0.0,),
    compensate: bool = True,
    options: Facts | None = None,
) -> Question:
    """The question that settings name."""
    chosen = None if device is None else as_device(resolve("devices", device))
    return Question(
        ways=task[0],
        shots=task[1],
        code=code,
        device=chosen,
        ages=tuple(ages),
        compensate=compensate,
        options=tuple((options or {}).items()),
    )


def ask(vectors: Path, question: Facts, episodes: int, seed: int) -> Facts:
    """Accuracy at each age, mean of so many episodes."""
    asked = question_of(**question)
    (shares,) = shares_of(str(vectors), [asked], range(episodes), seed)
    return {"rows": rows_of(asked, shares)}


def learn(vectors: Path, question: Facts, every_s: float, runs: int, seed: int) -> Facts:
    """Accuracy on old and new classes, as classes are written one after the other."""
    tensors = load_file(vectors)
    x, labels = tensors["vectors"], tensors["labels"]
    asked = question_of(**question)
    return {"rows": learn_one_by_one(x, labels, asked, every_s=every_s, runs=runs, seed=seed)}


def vectors_of(desk: Desk, objective: str, network: str | None) -> Path:
    """The file of vectors of all test images by a controller; a small one is trained for digits."""
    images = test_images(desk)
    encoder = load_network(desk.networks / network) if network else _trained_on_digits(objective)
    key = fingerprint([encoder.state_dict(), images.images])
    path = desk.cache / f"vectors-{key[:16]}.safetensors"
    if not path.exists():
        vectors = embed(
            encoder,
            images.images,
            progress=lambda done, total: desk.progress(f"embedding by {objective}", done, total),
        )
        write_atomically(path, to_bytes({"vectors": vectors, "labels": images.labels}))
    return path


def test_images(desk: Desk) -> LabelledImages:
    """Those of classes that no controller has seen."""
    if desk.data_name == "digits":
        return _digits(range(5, 10))
    folder = datasets.folder_of(desk.data_name, desk.data_root)
    return datasets.omniglot(folder, "test", size=SIZE)


def _digits(kept: range) -> LabelledImages:
    batches = load_data("digits", None).test
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    large = nn.functional.interpolate(x, (SIZE, SIZE), mode="bilinear")
    images = LabelledImages(large, y, tuple(str(k) for k in range(10)))
    return images.only(lambda name: int(name) in kept)


def _trained_on_digits(objective: str) -> nn.Module:
    seen = _digits(range(5))
    options: dict[str, Any] = {"channels": 8, "dim": 128}
    return fit_episodes(
        lambda: build("hd_controller", **options),
        seen.images,
        EpisodeSampler(seen.labels, 5, 2, 4, episodes=40),
        OBJECTIVES[objective],
        learning_rate=2e-3,
        validate=lambda encoder: 0.0,
        fabric=launched("32-true", who="evenkeel study hd_memory", devices=1),
    )
