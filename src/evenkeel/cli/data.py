"""``evenkeel data check`` and ``evenkeel data fetch``."""

from pathlib import Path

from cyclopts import App
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from evenkeel import data as datasets
from evenkeel.data.sets import standard_set
from evenkeel.errors import ConfigError

data = App(name="data", help="Check and fetch published data sets.")


@data.command
def check(name: str, /, *, data_root: Path | None = None) -> None:
    """Compare a data set's files with their checksums; exit code 2 where one is not right.

    Parameters
    ----------
    name
        cifar10, mnist, omniglot or kodak.
    data_root
        Where data sets lie; default $EVENKEEL_DATA.
    """
    states = datasets.check(name, data_root)
    for file, state in states.items():
        Console().print(f"{state:<8} {file}", highlight=False)
    wrong = [file for file, state in states.items() if state != "ok"]
    if wrong:
        raise ConfigError(
            f"The data set '{name}' is not as published: {', '.join(wrong)}. "
            f"`evenkeel data fetch {name}` fetches what is not right."
        )


@data.command
def fetch(name: str, /, *, data_root: Path | None = None, mirror: str | None = None) -> None:
    """Download what is missing of a data set; a download that was cut off goes on.

    Parameters
    ----------
    name
        cifar10, mnist, omniglot or kodak.
    data_root
        Where data sets lie; default $EVENKEEL_DATA.
    mirror
        A URL below which the archives lie, instead of their own.
    """
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        jobs = {}

        def show(archive: str, done: int, total: int) -> None:
            if archive not in jobs:
                jobs[archive] = bar.add_task(archive)
            bar.update(jobs[archive], completed=done, total=total)

        folder = datasets.fetch(name, data_root, mirror=mirror, progress=show)
    console.print(f"{folder}: complete. {standard_set(name).notice}", highlight=False)
