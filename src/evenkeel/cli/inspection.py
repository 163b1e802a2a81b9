"""``evenkeel inspect``."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evenkeel.batches import first
from evenkeel.cli.network import network_from
from evenkeel.cli.progress import progress_bar
from evenkeel.cli.samples import samples_from
from evenkeel.files import require_writable_folder, write_atomically
from evenkeel.norm import singularity


def inspect(
    model: str,
    /,
    *,
    weights: str | None = None,
    data: str = "digits",
    data_root: Path | None = None,
    mean: str = "0",
    std: str = "1",
    samples: int = 500,
    plot: Path | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Show how close a network's units are to being off for every input, layer by layer.

    Per layer: the share of dead units (on for less than 1 % of inputs and positions); the distance
    of its channels from mean 0 and deviation 1, where batch norm puts them; the smallest margin.

    Parameters
    ----------
    model
        module:factory (with --weights), a named architecture (with --weights), or a file that
        evenkeel.save wrote.
    weights
        Safetensors file of the network's weights; "own" where the factory loads them itself.
    data
        "digits", "cifar10", "mnist", a folder of images (test/CLASS/IMAGE.png and
        train/CLASS/IMAGE.png), or module:function that returns evenkeel.data.Data.
    data_root
        Where published sets lie, in their own layouts; default $EVENKEEL_DATA.
    mean
        Taken off the pixels of a folder of images, which are in 0..1.
    std
        What the pixels are divided by then.
    samples
        How many of the test samples to look at.
    plot
        Write the picture, as SVG.
    json_file
        Write the same facts, machine-readable.
    """
    for path in (plot, json_file):
        if path is not None:
            require_writable_folder(path.parent)
    network = network_from(model, weights)
    batches = first(samples_from(data, data_root, mean, std).test, samples)
    console = Console()
    if not console.is_terminal:
        console.width = 1000  # nothing is cut for want of a screen
    with progress_bar(console) as bar:
        found = singularity(network, bar.track(batches, description="batches"))
    head, *lines = found.cells()
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for k, title in enumerate(head):
        table.add_column(title, no_wrap=k < 2, justify="left" if k < 3 else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    units = f"{100 * found.dead:.1f} % of the units before a ReLU are dead"
    console.print(f"{units}, on {found.samples} samples.", highlight=False)
    if plot is not None:
        import vl_convert

        write_atomically(plot, vl_convert.vegalite_to_svg(found.plot().to_json()).encode())
    if json_file is not None:
        write_atomically(json_file, json.dumps(found.to_dict(), indent=1).encode())
