"""``evenkeel fewshot test``."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from evenkeel.analog import Device, Spread
from evenkeel.analog.device import as_device
from evenkeel.audit.names import resolve
from evenkeel.audit.plan import age_label, parse_age
from evenkeel.audit.run import local_processes, num_workers
from evenkeel.cli.labelled import labelled_from
from evenkeel.cli.network import network_from
from evenkeel.cli.progress import progress_bar
from evenkeel.data import LabelledImages
from evenkeel.data.dataset import fingerprint
from evenkeel.errors import ConfigError, WorkerError
from evenkeel.files import require_writable_folder, write_atomically
from evenkeel.memory import CODES, EpisodeSampler
from evenkeel.memory.codes import require_code
from evenkeel.memory.evaluation import Question, answers
from evenkeel.memory.pictures import episode_picture
from evenkeel.memory.recall import embed
from evenkeel.provenance import environment
from evenkeel.saving import describe, load
from evenkeel.studies.frame import svg

Facts = dict[str, Any]
DEVICES = ("spread:0.2", "spread:0.4", "spread:0.6", "spread:0.8", "spread:1", "pcm")
CODE_ORDER = ("real", "bipolar", "complement", "binary")
TASKS = ("5x1", "20x5", "100x5")
Several = Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")]


def measure(
    controller: str,
    /,
    *,
    out: Path,
    weights: str | None = None,
    data: str = "omniglot",
    data_root: Path | None = None,
    split: Literal["official", "vinyals"] = "official",
    size: int = 32,
    ink: bool = False,
    task: Several = None,
    code: Several = None,
    device: Several = None,
    age: Several = None,
    prototypes: Path | None = None,
    episodes: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Accuracy of a memory on classes that its controller has not seen: tasks, codes, devices.

    Each episode is written to a crossbar of its own. Above age 0, fading that is common to a column
    is compensated.

    Parameters
    ----------
    controller
        Safetensors file that ``evenkeel fewshot train`` or ``ek.save`` wrote; or module:factory
        of your own network, which gives a vector for each image, with --weights.
    out
        Folder for pictures, figures and the images' vectors, which are computed once.
    weights
        Of a network of your own: a safetensors file, or "own" where the factory loads them.
    data
        omniglot, or a folder with test/, of images in one folder for each class.
    data_root
        Where published sets lie; default $EVENKEEL_DATA.
    split
        Of Omniglot: official (background and evaluation) or vinyals.
    size
        Images are resized to this.
    ink
        Your images are dark ink on white paper: make ink 1 and paper 0, as for Omniglot.
    task
        Ways x shots; default 5x1 20x5 100x5.
    code
        real, bipolar, binary or complement; default all.
    device
        As of ``evenkeel audit``; default conductance spreads of 20 to 100 %, and pcm.
    age
        Since programming, for devices that age; default 0 1h 1d.
    prototypes
        A controller trained with --objective prototypes, as a column to compare with.
    episodes
        Of each task.
    seed
        Of episodes and crossbars.
    workers
        Processes; default one for each core.
    json_file
        Write all figures, with the environment.
    """
    require_writable_folder(out)
    chosen = [as_device(resolve("devices", text)) for text in device or DEVICES]
    ages = tuple(sorted({parse_age(text) for text in age or ("0", "1h", "1d")}))
    encoder, about = network_from(controller, weights), _about(controller)
    console = Console()
    with progress_bar(console) as bar:
        images = labelled_from(
            data, "test", root=data_root, split=split, size=size, ink=ink, bar=bar
        )
        tasks = _tasks(task, images, episodes)
        questions = _questions(tasks, code, chosen, ages, about.get("objective"))
        vectors = embedded(encoder, images, out, bar)
        job = bar.add_task("episodes", total=None)

        def ask(file: Path, asked: Sequence[Question]) -> list[Facts]:
            return _answers(
                file,
                asked,
                episodes,
                seed,
                workers,
                lambda done, total: bar.update(job, completed=done, total=total),
            )

        rows = ask(vectors, questions)
        if prototypes is not None:
            rows += ask(
                embedded(load(prototypes), images, out, bar),
                [Question(*one, "prototypes") for one in tasks],
            )
    if json_file is not None:
        facts = {
            "command": shlex.join(["evenkeel", *sys.argv[1:]]),
            "environment": environment(),
            "controller": about,
            "classes": len(images.classes),
            "rows": rows,
        }
        write_atomically(json_file, (json.dumps(facts, indent=1) + "\n").encode())
    for name in dict.fromkeys(row["task"] for row in rows):
        console.print(_table(name, [row for row in rows if row["task"] == name]))
    console.print(f"Percent, mean of {episodes} episodes and its 95 % interval.", highlight=False)
    for picture in _pictures(rows, questions, vectors, images, out, seed):
        console.print(str(picture), highlight=False)


def _about(controller: str) -> Facts:
    """What its file tells of the training; nothing of a network by module:factory."""
    if not controller.endswith(".safetensors"):
        return {}
    about: Facts = describe(controller).get("about", {})
    return about


def _tasks(
    asked: Sequence[str] | None, images: LabelledImages, episodes: int
) -> list[tuple[int, int]]:
    """The tasks that are asked for; of the usual ones those for which there are images."""
    tasks = [task_from(text) for text in asked or TASKS]
    if asked is None:
        samples = int(torch.bincount(images.labels).min())
        tasks = [(m, n) for m, n in tasks if m <= len(images.classes) and n < samples]
        if not tasks:
            raise ConfigError(
                f"None of the usual tasks fits {len(images.classes)} classes with {samples} images "
                f"in the smallest; name one, such as --task 3x1."
            )
    for ways, shots in tasks:  # what cannot be is refused before anything is embedded
        EpisodeSampler(images.labels, ways, shots, 1, episodes=episodes)
    return tasks


def _answers(
    vectors: Path,
    questions: Sequence[Question],
    episodes: int,
    seed: int,
    workers: int | None,
    progress: Callable[[int, int], None],
) -> list[Facts]:
    number = num_workers(workers)
    pool = local_processes(number, "fewshot") if number else ThreadPoolExecutor(1)
    try:
        return answers(
            vectors, questions, episodes=episodes, seed=seed, pool=pool, progress=progress
        )
    except BrokenExecutor as error:
        raise WorkerError(
            f"A worker process died ({error}); often memory ran out. Use fewer: --workers 1."
        ) from error


def _questions(
    tasks: Sequence[tuple[int, int]],
    codes: Sequence[str] | None,
    devices: Sequence[Device],
    ages: tuple[float, ...],
    objective: str | None,
) -> list[Question]:
    for name in codes or ():
        require_code(name)
    # One that was trained for softmax attention is read by it; for the other codes it stands for no
    # simpler function.
    own = {"real": (("sharpening", "softmax"),)} if objective == "softmax" else {}
    return [
        Question(
            ways,
            shots,
            code,
            device,
            ages if device is not None and device.ages else (0.0,),
            options=own.get(code, ()),
        )
        for ways, shots in tasks
        for device in (None, *devices)
        for code in codes or CODES
    ]


def task_from(text: str) -> tuple[int, int]:
    """Ways and shots of a text such as 20x5."""
    ways, _, shots = text.partition("x")
    if not (ways.isdigit() and shots.isdigit()):
        raise ConfigError(f"A task is ways x shots, such as 20x5; got {text!r}.")
    return int(ways), int(shots)


def embedded(network: nn.Module, images: LabelledImages, out: Path, bar: Progress) -> Path:
    """The file of vectors of all images by a network; computed where it is not there."""
    key = fingerprint([network.state_dict(), _seen(network, images), images.images, images.labels])
    path = out / f"vectors-{key[:16]}.safetensors"
    if not path.exists():
        job = bar.add_task("embedding")

        def show(done: int, total: int) -> None:
            bar.update(job, completed=done, total=total, visible=done < total)

        vectors = embed(network, images.images, progress=show)
        write_atomically(path, to_bytes({"vectors": vectors, "labels": images.labels}))
    return path


def _seen(network: nn.Module, images: LabelledImages) -> Tensor:
    """Vectors of a few images: what tells networks of one state and different code apart."""
    try:
        return embed(network, images.images[:4])
    except RuntimeError as error:
        raise ConfigError(
            f"The network cannot take images of shape {tuple(images.images.shape[1:])}: "
            f"{str(error).splitlines()[0]} Look at the channels of the images, and at --size."
        ) from error


def _table(task: str, rows: Sequence[Facts]) -> Table:
    codes = list(dict.fromkeys(row["code"] for row in rows))
    found = {(_condition(row), row["code"]): row for row in rows}
    table = Table(title=task, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("", *codes):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for condition in dict.fromkeys(name for name, _ in found):
        cells = [found.get((condition, code)) for code in codes]
        table.add_row(
            condition,
            *("" if row is None else mean_and_interval(row) for row in cells),
        )
    return table


def mean_and_interval(row: Facts, of: str = "accuracy", width: str = "half_width") -> str:
    """As it is printed; of a single episode there is no interval."""
    return f"{row[of]:.2f}" + ("" if row[width] is None else f" ± {row[width]:.2f}")


def _condition(row: Facts) -> str:
    if row["device"] is None:
        return "software"
    return f"{row['device']}, {age_label(row['age_s'])}" if row["age_s"] else str(row["device"])


def _pictures(
    rows: Sequence[Facts],
    questions: Sequence[Question],
    vectors: Path,
    images: LabelledImages,
    out: Path,
    seed: int,
) -> list[Path]:
    """Accuracy against the spread, where several were asked; an episode with its attention."""
    files = []
    spreads = {
        q.device.name: q.device.level for q in questions if q.device and _is_spread(q.device)
    }
    if len(spreads) > 1:
        files.append(out / "spread.svg")
        write_atomically(files[-1], spread_chart(rows, spreads).encode())
    small = min(questions, key=lambda q: q.ways * q.shots)
    question = [q for q in questions if (q.ways, q.shots) == (small.ways, small.shots)][-1]
    episode = EpisodeSampler(images.labels, question.ways, question.shots, 1, seed=seed)[0]
    x = load_file(vectors)["vectors"]
    memory = question.memory(x.shape[1], seed)
    memory.write(x[episode.support], episode.support_labels)
    drawn = episode_picture(
        images.images[episode.support],
        episode.support_labels,
        images.images[episode.queries],
        episode.query_labels,
        memory.read(x[episode.queries]),
        ink=images.ink,
    )
    files.append(out / "episode.svg")
    write_atomically(files[-1], drawn.encode())
    return files


def _is_spread(device: Device) -> bool:
    return len(device.models) == 1 and isinstance(device.models[0], Spread)


def spread_chart(rows: Sequence[Facts], spreads: Mapping[str, float | None]) -> str:
    """SVG: accuracy of each code against the conductance spread, task by task."""
    import altair as alt

    points = [
        {
            "task": row["task"],
            "code": row["code"],
            "spread": 100 * (spreads[row["device"]] or 0 if row["device"] else 0),
            "accuracy": row["accuracy"],
            "low": row["accuracy"] - (row["half_width"] or 0),
            "high": row["accuracy"] + (row["half_width"] or 0),
        }
        for row in rows
        if (row["device"] is None or row["device"] in spreads) and row["code"] != "prototypes"
    ]
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("spread:Q", title="conductance spread, % of target"),
        color=alt.Color("code:N", sort=list(CODE_ORDER), title="code"),
    )
    y = alt.Y("accuracy:Q", title="accuracy, %", scale=alt.Scale(zero=False))
    lines = base.mark_line(point=True).encode(y=y)
    bars = base.mark_rule().encode(y=alt.Y("low:Q", title="accuracy, %"), y2="high:Q")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    chart = (lines + bars).properties(width=220, height=220)
    return svg(chart.facet(column=alt.Column("task:N", sort=tasks, title=None)))
