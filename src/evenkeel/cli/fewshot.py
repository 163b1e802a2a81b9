"""``evenkeel fewshot train``, ``test`` and ``continual``."""

from cyclopts import App

from evenkeel.cli.fewshot_continual import continual
from evenkeel.cli.fewshot_measure import measure
from evenkeel.cli.fewshot_train import train

fewshot = App(name="fewshot", help="Train and test memories that learn from a few examples.")
fewshot.command(train)
fewshot.command(measure, name="test")
fewshot.command(continual)
