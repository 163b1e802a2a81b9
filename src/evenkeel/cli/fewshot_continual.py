"""``evenkeel fewshot continual``."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from evenkeel.analog.device import as_device
from evenkeel.audit.names import resolve
from evenkeel.audit.plan import parse_age
from evenkeel.cli.fewshot_measure import embedded, mean_and_interval
from evenkeel.cli.labelled import labelled_from
from evenkeel.cli.network import network_from
from evenkeel.cli.progress import progress_bar
from evenkeel.files import require_writable_folder, write_atomically
from evenkeel.memory.codes import require_code
from evenkeel.memory.continual import learn_one_by_one
from evenkeel.memory.evaluation import Question
from evenkeel.provenance import environment
from evenkeel.studies.frame import svg

SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 500)


def continual(
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
    classes: int = 100,
    shots: int = 5,
    code: str = "bipolar",
    device: str | None = None,
    every: str = "0",
    runs: int = 10,
    seed: int = 0,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Learn classes one after the other; accuracy on the old ones and on the new one.

    Parameters
    ----------
    controller
        Safetensors file that ``evenkeel fewshot train`` or ``ek.save`` wrote; or module:factory
        of your own network, which gives a vector for each image, with --weights.
    out
        Folder for the picture, and for the images' vectors, which are computed once.
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
    classes
        How many are learnt.
    shots
        Written examples of each.
    code
        real, bipolar, binary or complement.
    device
        Of a crossbar, as of ``evenkeel audit``; default: software.
    every
        Time from one class to the next, such as 1h, for devices that age.
    runs
        Other classes, in another order, on another crossbar.
    seed
        Of the runs.
    json_file
        Write all figures, with the environment.
    """
    require_code(code)
    chosen = None if device is None else as_device(resolve("devices", device))
    question = Question(classes, shots, code, chosen)
    require_writable_folder(out)
    console = Console()
    with progress_bar(console) as bar:
        images = labelled_from(
            data, "test", root=data_root, split=split, size=size, ink=ink, bar=bar
        )
        vectors = load_file(embedded(network_from(controller, weights), images, out, bar))[
            "vectors"
        ]
        job = bar.add_task("runs")
        rows = learn_one_by_one(
            vectors,
            images.labels,
            question,
            every_s=parse_age(every),
            runs=runs,
            seed=seed,
            progress=lambda done, total: bar.update(job, completed=done, total=total),
        )
    if json_file is not None:
        facts = {
            "command": shlex.join(["evenkeel", *sys.argv[1:]]),
            "environment": environment(),
            "rows": rows,
        }
        write_atomically(json_file, (json.dumps(facts, indent=1) + "\n").encode())
    console.print(_table(rows))
    console.print(f"Percent, mean of {runs} runs and its 95 % interval.", highlight=False)
    write_atomically(out / "continual.svg", _chart(rows).encode())
    console.print(str(out / "continual.svg"), highlight=False)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("classes", "old", "new", "all", box=None)
    for row in rows:
        if row["classes"] in SHOWN or row is rows[-1]:
            table.add_row(
                str(row["classes"]),
                *(
                    mean_and_interval(row, part, f"{part}_half_width") if part in row else ""
                    for part in ("old", "new", "all")
                ),
            )
    return table


def _chart(rows: Sequence[dict[str, Any]]) -> str:
    import altair as alt

    points = [
        {"classes": row["classes"], "part": part, "accuracy": row[part]}
        for row in rows
        for part in ("old", "new")
        if part in row
    ]
    chart = (
        alt.Chart(alt.Data(values=points))
        .mark_line()
        .encode(
            x=alt.X("classes:Q", title="classes learnt"),
            y=alt.Y("accuracy:Q", title="accuracy, %", scale=alt.Scale(zero=False)),
            color=alt.Color("part:N", title="classes", sort=["old", "new"]),
        )
    )
    return svg(chart.properties(width=420, height=240))
