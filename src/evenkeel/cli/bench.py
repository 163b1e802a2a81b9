"""``evenkeel bench``."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from evenkeel.cli.progress import progress_bar
from evenkeel.errors import ConfigError
from evenkeel.files import require_writable_folder, write_atomically
from evenkeel.provenance import environment

What = Literal["analog", "norm", "memory", "quaternion"]
Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]

TIMES: Columns = {
    "ms": lambda row: f"{row['median_ms']:.3f}",
    "ratio": lambda row: f"{row['ratio']:.2f}",
}
COLUMNS: dict[What, Columns] = {
    "analog": {
        "batch": lambda row: str(row["batch"] or ""),
        "way": lambda row: row["way"],
        **TIMES,
    },
    "norm": {
        "shape": lambda row: "x".join(map(str, row["shape"])),
        "layout": lambda row: row["layout"],
        "way": lambda row: row["way"],
        "layer": lambda row: row["layer"],
        **TIMES,
        "kept": lambda row: str(row["activations_kept"] or ""),
    },
    "memory": {
        "keys": lambda row: f"{row['keys']:,}",
        "way": lambda row: row["way"],
        **TIMES,
        "MB": lambda row: f"{row['bytes'] / 1e6:.2f}",
    },
    "quaternion": {
        "kernel": lambda row: f"{row['kernel']}x{row['kernel']}",
        "channels": lambda row: str(row["channels"]),
        "way": lambda row: row["way"],
        "layer": lambda row: row["layer"],
        **TIMES,
        "parameters": lambda row: f"{row['parameters']:,}",
    },
}
NOTES: dict[What, str] = {
    "analog": "New chip: program, age 1 h, forward; ratio: to the first of its batch in the same "
    "round.",
    "norm": "ratio: to batch norm in the same round; kept: activations kept for backward.",
    "memory": "Top 5 of 100 queries, 512 bits a vector; ratio: to faiss in the same round.",
    "quaternion": "Batch 8, 32 x 32; ratio: to the kernel that is assembled at each forward.",
}


def bench(
    what: What,
    /,
    *,
    device: str = "cpu",
    compiled: bool = True,
    rounds: int = 9,
    threads: int | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Time what evenkeel has against what it is compared with, in alternating blocks.

    Parameters
    ----------
    what
        analog: a new chip, against plain torch, and aihwkit where it is installed.
        norm: normalizers, forward and backward, against torch's batch norm; eager and compiled.
        memory: search among binary vectors, against faiss, and torchhd where it is installed.
        quaternion: convolutions by both forms of their products, against real ones.
    device
        cpu or cuda; analog and memory are timed on the CPU.
    compiled
        norm: whether to time compiled layers too.
    rounds
        Blocks of each; the ratio is the median over them.
    threads
        Of torch; default: as many as it takes by itself.
    json_file
        Write all figures, with the environment.
    """
    if json_file is not None:
        require_writable_folder(json_file.parent)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # of no such kind, or none here
        raise ConfigError(
            f"--device must be one that is here, cpu or cuda; got {device!r}."
        ) from error
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    with progress_bar(console) as bar:
        job = bar.add_task(what)

        def show(done: int, total: int) -> None:
            bar.update(job, completed=done, total=total)

        rows = _rows(what, device, compiled, rounds, show)
    console.print(_table(rows, COLUMNS[what]))
    console.print(NOTES[what], highlight=False)
    if json_file is not None:
        facts = {
            "command": shlex.join(["evenkeel", *sys.argv[1:]]),
            "environment": environment() | {"threads": torch.get_num_threads()},
            "rounds": rounds,
            "rows": rows,
        }
        write_atomically(json_file, (json.dumps(facts, indent=1) + "\n").encode())


def _rows(
    what: What, device: str, compiled: bool, rounds: int, progress: Callable[[int, int], None]
) -> list[Row]:
    if what == "analog":
        from evenkeel.bench import analog

        return analog.bench(rounds=rounds, progress=progress)
    if what == "norm":
        from evenkeel.bench import norm

        return norm.bench(device, compiled=compiled, rounds=rounds, progress=progress)
    if what == "quaternion":
        from evenkeel.bench import quaternion

        return quaternion.bench(device, rounds=rounds, progress=progress)
    from evenkeel.bench import memory

    return memory.bench(rounds=rounds, progress=progress)


def _table(rows: list[Row], columns: Columns) -> Table:
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(text(row) for text in columns.values()))
    return table
