"""``evenkeel fewshot train`` and ``evenkeel fewshot test``."""

from cyclopts import App

from evenkeel.cli.fewshot_measure import measure
from evenkeel.cli.fewshot_train import train

fewshot = App(name="fewshot", help="Train and test memories that learn from a few examples.")
fewshot.command(train)
fewshot.command(measure, name="test")
