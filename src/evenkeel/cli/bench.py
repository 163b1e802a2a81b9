"""``evenkeel bench``."""

import json
import shlex
import sys
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


def bench(
    what: Literal["norm", "memory"],
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
        norm: normalizers, forward and backward, against torch's batch norm; eager and compiled.
        memory: search among binary vectors, against faiss, and torchhd where it is installed.
    device
        cpu or cuda; memory is timed on the CPU.
    compiled
        Whether to time compiled layers too.
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

        if what == "norm":
            from evenkeel.bench import norm

            rows = norm.bench(device, compiled=compiled, rounds=rounds, progress=show)
        else:
            from evenkeel.bench import memory

            rows = memory.bench(rounds=rounds, progress=show)
    console.print(_norm_table(rows) if what == "norm" else _memory_table(rows))
    console.print(
        "ratio: to batch norm in the same round; kept: activations kept for backward."
        if what == "norm"
        else "Top 5 of 100 queries, 512 bits a vector; ratio: to faiss in the same round.",
        highlight=False,
    )
    if json_file is not None:
        facts = {
            "command": shlex.join(["evenkeel", *sys.argv[1:]]),
            "environment": environment() | {"threads": torch.get_num_threads()},
            "rounds": rounds,
            "rows": rows,
        }
        write_atomically(json_file, (json.dumps(facts, indent=1) + "\n").encode())


def _norm_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("shape", "layout", "way", "layer", "ms", "ratio", "kept", box=None)
    for row in rows:
        table.add_row(
            "x".join(map(str, row["shape"])),
            row["layout"],
            row["way"],
            row["layer"],
            f"{row['median_ms']:.3f}",
            f"{row['ratio']:.2f}",
            "" if row["activations_kept"] is None else str(row["activations_kept"]),
        )
    return table


def _memory_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("keys", "way", "ms", "ratio", "MB", box=None)
    for row in rows:
        table.add_row(
            f"{row['keys']:,}",
            row["way"],
            f"{row['median_ms']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['bytes'] / 1e6:.2f}",
        )
    return table
