"""``evenkeel sensitivity``."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evenkeel.audit.sensitivity import Sensitivity
from evenkeel.audit.sensitivity import sensitivity as measure
from evenkeel.cli.hardware import IDEAL, Around
from evenkeel.cli.network import network_from
from evenkeel.cli.progress import progress_bar
from evenkeel.cli.samples import samples_from
from evenkeel.files import require_writable_folder, write_atomically


def sensitivity(
    model: str,
    /,
    *,
    weights: str | None = None,
    data: str = "digits",
    data_root: Path | None = None,
    mean: str = "0",
    std: str = "1",
    test_samples: int | None = 1000,
    task: str = "classify",
    device: str = "pcm",
    around: Around = IDEAL,
    age: str = "1d",
    chips: int = 4,
    seed: int = 0,
    target: float | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Show which layers cost the accuracy on a chip, and which few to keep digital for a target.

    Each layer is put onto the chips alone, and left out alone; no remedy is at work.

    Parameters
    ----------
    model
        As for evenkeel audit.
    weights
        As for evenkeel audit.
    data
        As for evenkeel audit.
    data_root
        Where published sets lie; default $EVENKEEL_DATA.
    mean
        Taken off the pixels of a folder of images.
    std
        What the pixels are divided by then.
    test_samples
        Test on the first so many only.
    task
        classify, regress, reconstruct, segment, detect, or module:Class.
    device
        One, with its level: gaussian:0.05.
    age
        Time since programming.
    chips
        How many.
    seed
        Of the first chip.
    target
        Metric to reach with as few layers digital as may be.
    json_file
        Write the same facts, machine-readable.
    """
    if json_file is not None:
        require_writable_folder(json_file.parent)
    samples = samples_from(data, data_root, mean, std).limited(test=test_samples)
    network = network_from(model, weights)
    console = Console()
    (hardware,) = around.devices([device])
    with progress_bar(console) as bar:
        job = bar.add_task("evaluations", total=None)
        found = measure(
            network,
            samples,
            device=hardware,
            age=age,
            task=task,
            chips=chips,
            seed=seed,
            target=target,
            progress=lambda done, total: bar.update(job, completed=done, total=total),
        )
    if json_file is not None:
        write_atomically(json_file, json.dumps(found.to_dict(), indent=1).encode())
    console.print(_table(found))
    console.print(found.said, highlight=False)


def _table(found: Sensitivity) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for title in ("layer", "alone on the chip", "all but it", "brings back"):
        table.add_column(title, justify="left" if title == "layer" else "right", no_wrap=True)
    for cost in found.layers:
        table.add_row(
            cost.layer,
            f"{cost.alone:.1f}",
            f"{cost.without:.1f}",
            f"{cost.without - found.analog:+.1f}",
        )
    return table
