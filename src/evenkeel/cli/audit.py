"""``evenkeel audit``."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress

import evenkeel as ek
from evenkeel.audit.audit import AGES
from evenkeel.cli.hardware import IDEAL, Around
from evenkeel.cli.network import network_from
from evenkeel.cli.progress import progress_bar
from evenkeel.cli.samples import samples_from
from evenkeel.errors import ConfigError
from evenkeel.files import require_writable_folder, write_atomically
from evenkeel.models import build
from evenkeel.saving import load, save
from evenkeel.train import fit

Names = Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")]

DEMO = "resnet8_digits"
DEMO_DEVICES = ("pcm", "gaussian:0.1", "gaussian:0.15", "gaussian:0.2")


def audit(
    model: str | None = None,
    /,
    *,
    weights: str | None = None,
    data: str = "digits",
    data_root: Path | None = None,
    mean: str = "0",
    std: str = "1",
    test_samples: int | None = None,
    task: str = "classify",
    device: Names = None,
    around: Around = IDEAL,
    age: Names = None,
    remedy: Names = None,
    chips: int = 16,
    until: float | None = None,
    floor: float | None = None,
    sensitivity: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 0,
    workers: int | None = None,
    out: Path = Path("audit"),
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Audit a trained network: how accurate it is on analog chips, over their life, and the remedy.

    Without MODEL a small residual network is trained on scikit-learn's handwritten digits first.

    Parameters
    ----------
    model
        module:factory (with --weights), a named architecture (with --weights), or a file that
        evenkeel.save wrote.
    weights
        Safetensors file of the network's weights; "own" where the factory loads them itself.
    data
        "digits", "cifar10", "mnist", "kodak", "nuclei", "bccd"; a folder of images by class
        (test/CLASS/IMAGE.png and train/CLASS/IMAGE.png), of images with masks (test/images/NAME.png
        and test/masks/NAME.png, and train), or with boxes as COCO has them (instances_test.json,
        instances_train.json and images/); or module:function that returns evenkeel.data.Data.
    data_root
        Where published sets lie, in their own layouts; default $EVENKEEL_DATA.
    mean
        Taken off the pixels of a folder of images, which are in 0..1; one number or one per
        channel.
    std
        What the pixels are divided by then.
    test_samples
        Test on the first so many only; a sweep need not see them all.
    task
        classify, regress, reconstruct (pictures), segment (segment:ap is another measure of it),
        detect, or module:Class.
    device
        Names, with levels: pcm gaussian:0.05 stuck_at:0.01, or module:Class. The verdict is on the
        first. `evenkeel devices` lists them. Default: pcm; without MODEL also some levels of
        gaussian.
    age
        Times since programming. Default: 0,1h,1d,1mo,1y.
    remedy
        Rows of remedies; the first is what the others are compared with. Default, as far as the
        network has a use for them: none,drift,pooled,online,calibrate,match+calibrate,
        match+clip+calibrate,balance:arrays+calibrate.
    chips
        How many chips of each device.
    until
        Go on adding chips until the 95 % interval of every mean is at most this many points to
        each side.
    floor
        What a chip must reach to count as good, in percent or the task's unit; gives the yield.
    sensitivity
        Find out, too, which layers cost it, and which few to keep digital for the floor.
    seed
        Of the first chip.
    workers
        Processes; default one for each core, 0 for none besides this one.
    out
        Folder for report.html, audit.json, mended.safetensors, recipe.md and audit.db.
    json_file
        Write the machine-readable result here as well.
    """
    console = Console()
    require_writable_folder(out)
    if json_file is not None:
        require_writable_folder(json_file.parent)
    if model is None and weights is not None:
        raise ConfigError("--weights needs the MODEL that they belong to.")
    named = _listed(device) or (DEMO_DEVICES if model is None else ("pcm",))
    samples = samples_from(data, data_root, mean, std).limited(test=test_samples)
    with progress_bar(console) as bar:
        network = _demo(out, samples, bar) if model is None else network_from(model, weights)
        job = bar.add_task("trials", total=None)
        result = ek.audit(
            network,
            samples,
            task=task,
            devices=around.devices(named),
            ages=_listed(age) or AGES,
            remedies=_listed(remedy) or None,
            chips=chips,
            until=until,
            floor=floor,
            seed=seed,
            store=out / "audit.db",
            workers=workers,
            progress=lambda done, total: bar.update(job, completed=done, total=total),
            command=shlex.join(["evenkeel", *sys.argv[1:]]),
        )
        if sensitivity:
            part = bar.add_task("layers", total=None)
            try:
                result.find_sensitivity(
                    chips=min(chips, 4),
                    progress=lambda done, total: bar.update(part, completed=done, total=total),
                )
            except ConfigError as error:  # what has been measured is not lost for it
                result.notes.append(str(error))
    _write(result, out, json_file)
    console.print(result.rich_table())
    if result.figures:
        told = ", ".join(f"{name} {figure:.1f}" for name, figure in result.figures.items())
        console.print(f"The digital network in all: {told}.", highlight=False, markup=False)
    of_layers = [result.sensitivity.said] if result.sensitivity else []
    for sentence in [*result.verdict, *of_layers, *result.notes]:
        console.print(sentence, highlight=False, markup=False)
    console.print(
        f"Report: {(out / 'report.html').resolve().as_uri()}", highlight=False, soft_wrap=True
    )


def _write(result: ek.Audit, out: Path, json_file: Path | None) -> None:
    facts = json.dumps(result.to_dict(), indent=1).encode()
    for path in (out / "audit.json", json_file):
        if path is not None:
            write_atomically(path, facts)
    save(result.best, out / "mended.safetensors", remedy=result.best_remedy, recipe=result.recipe)
    steps = "\n".join(f"{k}. {step}" for k, step in enumerate(result.recipe, 1))
    recipe = f"# {result.best_remedy}\n\n{' '.join(result.verdict)}\n\n{steps}\n"
    write_atomically(out / "recipe.md", recipe.encode())
    result.report(out / "report.html")


def _demo(out: Path, samples: Any, bar: Progress) -> Any:
    """The default network; trained once, then read from the output folder."""
    path = out / f"{DEMO}.safetensors"
    if not path.exists():
        if samples.train is None:
            raise ConfigError(
                f"Without MODEL a network is trained, and '{samples.name}' has nothing to train "
                "on. Name a MODEL, or leave --data out."
            )
        job = bar.add_task("training", total=None)
        threads = torch.get_num_threads()
        torch.set_num_threads(
            1
        )  # batches this small gain nothing by more, and lose on a busy machine
        try:
            trained = fit(
                lambda: build(DEMO),
                *samples.train,
                on_step=lambda done, total: bar.update(job, completed=done, total=total),
            )
        finally:
            torch.set_num_threads(threads)
        save(trained, path)
    return load(path)


def _listed(entries: list[str] | None) -> list[str]:
    return [part for entry in entries or [] for part in entry.split(",") if part]
