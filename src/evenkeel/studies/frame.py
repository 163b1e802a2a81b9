"""What every study stands on: parts that are kept as they finish, and a desk to work at."""

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import evenkeel as ek
from evenkeel import data as datasets
from evenkeel.audit.run import local_processes, num_workers
from evenkeel.audit.store import Store
from evenkeel.audit.summary import Cell
from evenkeel.data.dataset import Data, fingerprint
from evenkeel.data.sets import sha256
from evenkeel.errors import ConfigError
from evenkeel.files import write_atomically
from evenkeel.provenance import environment

SCALES = ("smoke", "small", "full")
"""Minutes on digits; a sketch on the study's own data; the figures that are published."""

Facts = dict[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Part:
    """A question of a study, answered by one file of figures.

    Attributes:
        name: of the file.
        about: the question.
        work: from desk and settings to the figures, ready for JSON.
        settings: all that the figures depend on besides networks and data, ready for JSON.
        networks: files of trained networks that it uses, below the desk's folder.
    """

    name: str
    about: str
    work: Callable[["Desk", Facts], Facts]
    settings: Facts
    networks: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """Parts by scale, and the pictures made of their figures.

    Attributes:
        name: of the study.
        data: name of the data set by scale.
        parts: from a scale to its parts, in the order of work.
        draw: from the figures by part and a folder to the pictures in it.
        version: raised when the same settings come to mean something else.
    """

    name: str
    data: dict[str, str]
    parts: Callable[[str], Sequence[Part]]
    draw: Callable[[dict[str, Facts], Path], Sequence[Path]]
    version: int = 1


@dataclass
class Desk:
    """What the parts of a study work with. What is finished is kept in ``cache``.

    Attributes:
        data_name: "digits" or a published set.
        data_root: where published sets lie.
        networks: folder of the trained networks.
        cache: folder for finished trials and what is trained on the way.
        workers: processes; None for one on each core.
        progress: called with what is being done, how much is done and how much there is.
        version: of the study, which :func:`run` tells.
    """

    data_name: str
    data_root: Path | None
    networks: Path
    cache: Path
    workers: int | None = None
    progress: Progress = field(default=lambda what, done, total: None, repr=False)
    version: int = 1

    def data(self, test_samples: int | None = None) -> Data:
        """The data, or so many test samples of it."""
        return load_data(self.data_name, self.data_root).limited(test=test_samples)

    def training_data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels to train on."""
        return load_training_data(self.data_name, self.data_root)

    def audit(
        self, network: Path, what: str, *, test_samples: int | None = None, **options: Any
    ) -> Facts:
        """An audit's digital figure and cells; every finished trial is kept."""
        result = ek.audit(
            load_network(network),
            self.data(test_samples),
            store=self.cache / "trials.db",
            workers=self.workers,
            progress=lambda done, total: self.progress(what, done, total),
            **options,
        )
        return {
            "metric": result.metric,
            "digital": result.digital,
            "digital_figures": result.figures,
            "notes": result.notes,
            "test_samples": result.provenance["test_samples"],
            "calibration_samples": result.provenance["calibration_samples"],
            "seeds": result.provenance["seeds"],
            "trial_seconds": result.provenance["trial_seconds"],
            "cells": [cell.to_dict() for cell in result.cells],
        }

    def each(self, work: Callable[..., Facts], items: Sequence[Facts], what: str) -> list[Facts]:
        """``work(**item)`` for every item, in processes of one thread; finished ones are kept."""
        label = f"{work.__module__}.{work.__qualname__}"
        keys = [
            fingerprint([label, self.version, json.dumps(item, sort_keys=True, default=_of)])
            for item in items
        ]
        with Store(self.cache / "each.db") as store:
            results = store.results(keys)
            todo = {key: item for key, item in zip(keys, items, strict=True) if key not in results}
            self.progress(what, len(results), len(items))
            pool = local_processes(max(1, num_workers(self.workers)), label)
            futures: dict[Future[Facts], str] = {
                pool.submit(work, **item): key for key, item in todo.items()
            }
            try:
                for future in as_completed(futures):
                    key = futures[future]
                    results[key] = future.result()
                    store.add(key, label, results[key])
                    self.progress(what, len(results), len(items))
            finally:
                for future in futures:
                    future.cancel()
        return [results[key] for key in keys]


def run(
    study: Study, scale: str, desk: Desk, out: Path, *, command: str, only: Sequence[str] = ()
) -> list[Path]:
    """Do the parts that are not done, and draw the pictures; returns the files.

    A part's file that was made with the same settings stands, so an interrupted study goes on with
    the part it was in; within it, with the trial.
    """
    parts = study.parts(scale)
    if unknown := sorted(set(only) - {part.name for part in parts}):
        raise ConfigError(
            f"The study has no part {unknown[0]!r}; it has {', '.join(p.name for p in parts)}."
        )
    desk.version = study.version
    folder = out / study.name / scale
    folder.mkdir(parents=True, exist_ok=True)
    desk.cache.mkdir(parents=True, exist_ok=True)
    done: dict[str, Facts] = {}
    for part in parts:
        path = folder / f"{part.name}.json"
        known = _read(path)
        if only and part.name not in only and not known:
            continue
        made_of = json.loads(
            json.dumps(
                {
                    "settings": part.settings,
                    "data": desk.data_name,
                    "networks": {n: sha256(_required(desk.networks / n)) for n in part.networks},
                    "study_version": study.version,
                }
            )
        )
        if {key: known.get(key) for key in made_of} != made_of:
            if only and part.name not in only:
                continue
            started = time.perf_counter()
            figures = part.work(desk, part.settings)
            known = {
                "study": study.name,
                "part": part.name,
                "about": part.about,
                "scale": scale,
                "command": command,
                "environment": environment(),
                "seconds": round(time.perf_counter() - started, 1),
                **made_of,
                "figures": _rounded(figures),
            }
            write_atomically(path, (as_lines(known) + "\n").encode())
        done[part.name] = json.loads(path.read_text())["figures"]
    return [
        *(folder / f"{name}.json" for name in done),
        *(study.draw(done, folder) if done else ()),
    ]


def _read(path: Path) -> Facts:
    """A part's file; nothing where there is none, or one that is damaged."""
    try:
        known: Facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known


def as_lines(value: Any, indent: int = 0) -> str:
    """JSON with a line for each entry of a list of objects, for people and for diffs.

    Examples:
        >>> print(as_lines({"a": [{"b": 1}, {"b": {"c": [2, 0.3]}}]}))
        {
         "a": [
          {"b": 1},
          {"b": {"c": [2, 0.3]}}
         ]
        }
    """
    if indent and not _has_records(value):
        return json.dumps(value)
    is_object = isinstance(value, dict)
    named = [(f"{json.dumps(str(k))}: ", v) for k, v in value.items()] if is_object else []
    entries = named or [("", v) for v in value]
    pad = "\n" + " " * (indent + 1)
    lines = ",".join(pad + name + as_lines(v, indent + 1) for name, v in entries)
    start, end = "{}" if is_object else "[]"
    return start + lines + "\n" + " " * indent + end


def _has_records(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_records(v) for v in value.values())
    return isinstance(value, list) and any(isinstance(v, dict) for v in value)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def cells_of(figures: Facts) -> list[Cell]:
    """An audit's cells again, from its figures as they were kept."""
    return [
        Cell(**{**cell, "chips": {int(seed): value for seed, value in cell["chips"].items()}})
        for cell in figures["cells"]
    ]


@functools.lru_cache(maxsize=8)
def load_network(path: Path) -> nn.Module:
    """A trained network, read once in each process."""
    network: nn.Module = ek.load(_required(path))
    return network


def _required(path: Path) -> Path:
    path = Path(os.path.normpath(path))  # as people would write it
    if not path.exists():
        raise ConfigError(
            f"The study needs the trained network {path}. Look for it in the project's repository "
            f"under results/; or train it: evenkeel train RECIPE, or evenkeel fewshot train, --out "
            f"{path}."
        )
    return path


@functools.lru_cache(maxsize=2)
def load_data(name: str, root: Path | None) -> Data:
    """A data set, read once in each process."""
    if name == "digits":
        return datasets.digits()
    return datasets.read_set(name, root)


@functools.lru_cache(maxsize=2)
def load_training_data(name: str, root: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels to train on, read once in each process."""
    if name == "digits":
        samples = datasets.digits().train
        assert samples is not None
        return samples
    return datasets.read_training_set(name, root)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def svg(chart: Any) -> str:
    """An altair chart as a picture for a page."""
    import vl_convert

    drawn = chart.configure(background="white", font="sans-serif", padding=12)
    text: str = vl_convert.vegalite_to_svg(drawn.to_json())
    return text


def _of(path: Path) -> str:
    """What identifies a file or folder named in an item."""
    return sha256(path) if path.is_file() else str(path)
