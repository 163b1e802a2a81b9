"""``evenkeel study``."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import TaskID

from evenkeel.cli.progress import progress_bar
from evenkeel.errors import ConfigError, nearest
from evenkeel.files import require_writable_folder


def study(
    name: str,
    /,
    *,
    scale: Literal["smoke", "small", "full"] = "small",
    part: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    data_root: Path | None = None,
    networks: Path = Path("results/cifar10"),
    cache: Path = Path(".studies"),
    out: Path = Path("results"),
    workers: int | None = None,
) -> None:
    """Measure a method's claims anew; interrupted, the same command goes on where it was.

    Each part of the study is a JSON file under OUT/NAME/SCALE, with its figures, seeds, settings,
    command, commit and versions; a file made with the same settings stands. Beside them lie the
    pictures of the method card.

    Parameters
    ----------
    name
        Of the study: noise_aware, batch_channel, equi_norm, kalman, hd_memory, quaternion, dense
        (segmentation and detection on chips) or micro_batch (their training).
    scale
        smoke: minutes, on scikit-learn's digits. small: a sketch on the study's data. full: the
        figures that are published; hours.
    part
        Only these parts of it.
    data_root
        Where published sets lie; default $EVENKEEL_DATA.
    networks
        Folder of the trained networks, as in the project's repository.
    cache
        Folder for finished trials.
    out
        Folder for the results.
    workers
        Processes; default one for each core.
    """
    from evenkeel.audit.names import import_from
    from evenkeel.studies import STUDIES, Desk, run

    if name not in STUDIES:
        raise ConfigError(f"Unknown study {name!r}. {nearest(name, STUDIES)}")
    chosen = import_from(STUDIES[name])
    console = Console()
    cache = cache / name / scale
    for folder in (out, cache):
        require_writable_folder(folder)
    with progress_bar(console) as bar:
        jobs: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in jobs:
                jobs[what] = bar.add_task(what)
            bar.update(jobs[what], completed=done, total=total, visible=done < total)

        desk = Desk(chosen.data[scale], data_root, networks, cache, workers, show)
        command = shlex.join(["evenkeel", *sys.argv[1:]])
        written = run(chosen, scale, desk, out, command=command, only=part or ())
    for path in written:
        console.print(str(path), highlight=False)
