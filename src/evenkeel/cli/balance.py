"""``evenkeel balance``."""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from evenkeel.balance import balance_, balance_arrays_
from evenkeel.batches import example_of, first
from evenkeel.cli.network import network_from
from evenkeel.cli.progress import progress_bar
from evenkeel.cli.samples import samples_from
from evenkeel.files import require_writable_folder, write_atomically
from evenkeel.saving import save


def balance(
    model: str,
    /,
    *,
    out: Path,
    kind: Literal["norm", "arrays"] = "norm",
    weights: str | None = None,
    data: str = "digits",
    data_root: Path | None = None,
    mean: str = "0",
    std: str = "1",
    p: float = 2.0,
    depth_factor: float = 1.0,
    exact: bool = False,
    samples: int = 1000,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Rescale a network without changing what it computes, and say what could be moved and why not.

    Parameters
    ----------
    model
        module:factory (with --weights), a named architecture (with --weights), or a file that
        evenkeel.save wrote.
    out
        Safetensors file for the balanced network.
    kind
        "norm" moves scales from layer to layer, to the least norm of the weights; "arrays" gives
        each layer digital scales around it that make its analog array's noise least.
    weights
        Safetensors file of the network's weights; "own" where the factory loads them itself.
    data
        What the network takes: "digits", "cifar10", "mnist", a folder of images, or
        module:function that returns evenkeel.data.Data.
    data_root
        Where published sets lie, in their own layouts; default $EVENKEEL_DATA.
    mean
        Taken off the pixels of a folder of images, which are in 0..1.
    std
        What the pixels are divided by then.
    p
        Power of the norm; large ones come near the largest weight. For "norm".
    depth_factor
        Above 1 moves weight from early layers to late ones. For "norm".
    exact
        Round scales to powers of two: outputs stay the same bit for bit. For "norm".
    samples
        How many calibration samples to measure inputs on. For "arrays".
    json_file
        Write the certificate, machine-readable.
    """
    for path in (out, json_file):
        if path is not None:
            require_writable_folder(path.parent)
    network = network_from(model, weights)
    batches = samples_from(data, data_root, mean, std).calibration
    console = Console()
    if not console.is_terminal:
        console.width = 1000  # nothing is cut for want of a screen
    with progress_bar(console) as bar:
        bar.add_task("balancing", total=None)
        done = (
            balance_arrays_(network, first(batches, samples))
            if kind == "arrays"
            else balance_(
                network, example_of(batches[0]), p=p, depth_factor=depth_factor, exact=exact
            )
        )
    console.print(done.table(), highlight=False, markup=False)
    save(network, out, balance=done.to_dict())
    console.print(f"{out}: the balanced network.", highlight=False)
    if json_file is not None:
        write_atomically(json_file, json.dumps(done.to_dict(), indent=1).encode())
