"""The command line: ``evenkeel audit``, ``inspect``, ``train``, ``study`` and the others."""

import sys

from evenkeel.errors import EvenkeelError


def main() -> None:
    """Run a command. Exit code 2: what was asked for cannot be done, and why is on one line."""
    from cyclopts import App, CycloptsError

    from evenkeel.cli.audit import audit
    from evenkeel.cli.balance import balance
    from evenkeel.cli.bench import bench
    from evenkeel.cli.data import data
    from evenkeel.cli.devices import devices
    from evenkeel.cli.fewshot import fewshot
    from evenkeel.cli.inspection import inspect
    from evenkeel.cli.sensitivity import sensitivity
    from evenkeel.cli.study import study
    from evenkeel.cli.train import train

    app = App(
        name="evenkeel",
        help="Keeps neural networks accurate when the arithmetic under them is not.",
        suppress_keyboard_interrupt=False,
    )
    app.command(audit)
    app.command(devices)
    app.command(data)
    app.command(train)
    app.command(study)
    app.command(fewshot)
    app.command(balance)
    app.command(inspect)
    app.command(sensitivity)
    app.command(bench)
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)
    except EvenkeelError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; finished trials are kept, the same command goes on.", file=sys.stderr)  # noqa: T201
        sys.exit(130)
