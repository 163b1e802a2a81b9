"""The tasks that come with evenkeel: classification and regression."""

import html
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evenkeel.audit.picture import inline_png
from evenkeel.batches import size
from evenkeel.errors import ConfigError


class Classify:
    """Batches are (inputs, labels), outputs are (N, classes) scores; the metric is accuracy."""

    metric: ClassVar[str] = "accuracy"
    version: ClassVar[int] = 1

    def check(self, model: nn.Module, batches: Sequence[Any], classes: Sequence[str]) -> None:
        """The network must have an output for every label."""
        _require_pairs(batches)
        with torch.no_grad():
            outputs = self.run(model, batches[0])
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ConfigError(
                f"Classification needs outputs of shape (N, classes); the network gives {shape}."
            )
        if any(batch[1].shape != (size(batch),) for batch in batches):
            raise ConfigError(
                f"Classification needs labels of shape (N,), a number for each sample; got "
                f"{tuple(batches[0][1].shape)}. Use labels.squeeze(1), or argmax(1) if one-hot."
            )
        labels = torch.cat([batch[1] for batch in batches])
        needed = max(int(labels.max()) + 1, len(classes))
        if outputs.shape[1] != needed:
            known = f"{needed} classes" if classes else f"labels up to {needed - 1}"
            if classes or outputs.shape[1] < needed:
                raise ConfigError(
                    f"The network has {outputs.shape[1]} outputs and the data has {known}. Use the "
                    f"data it was trained on, or a network with that many outputs."
                )
        if int(labels.min()) < 0:
            raise ConfigError(f"Labels must be 0 or more; the data holds {int(labels.min())}.")

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The first item of a batch is the input."""
        return model(batch[0])

    def score(self, output: Tensor, batch: Any) -> Tensor:
        """Right answers, and samples."""
        right = (output.argmax(1) == batch[1]).sum()
        return torch.tensor([float(right), float(len(batch[1]))], dtype=torch.float64)

    def value(self, sums: Tensor) -> float:
        """Percent right."""
        return float(100 * sums[0] / sums[1])

    def interval(self, sums: Tensor) -> tuple[float, float] | None:
        """Wilson's interval of a share."""
        n, share, z = float(sums[1]), float(sums[0] / sums[1]), 1.959964
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
        return 100 * (middle - half), 100 * (middle + half)

    def errors(self, output: Tensor, batch: Any) -> Tensor:
        """1 for a wrong answer, 0 for a right one."""
        wrong: Tensor = output.argmax(1) != batch[1]
        return wrong.float()

    def draw(self, batch: Any, index: int, outputs: dict[str, Any], classes: Sequence[str]) -> str:
        """The image, its class, and what each network takes it for."""

        def named(k: int) -> str:
            return html.escape(classes[k]) if k < len(classes) else str(k)

        truth = int(batch[1][index])
        rows = "".join(
            f"<li class={'right' if (said := int(o[index].argmax())) == truth else 'wrong'}>"
            f"{html.escape(who)}: <b>{named(said)}</b></li>"
            for who, o in outputs.items()
        )
        return (
            f"{inline_png(batch[0][index])}<figcaption>{named(truth)}<ul>{rows}</ul></figcaption>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Type and version."""
        return {"type": "Classify", "version": self.version}


class Regress:
    r"""Batches are (inputs, targets); the metric is $100\,R^2$, the share of variance explained.

    $$ R^2 = 1 - \sum (y - \hat y)^2 / \sum (y - \bar y)^2 $$

    It falls below zero where the network is worse than the mean of the targets.
    """

    metric: ClassVar[str] = "variance explained"
    version: ClassVar[int] = 1

    def check(self, model: nn.Module, batches: Sequence[Any], classes: Sequence[str]) -> None:
        """Outputs and targets must have one shape, and the targets some variance to explain."""
        _require_pairs(batches)
        with torch.no_grad():
            output = self.run(model, batches[0])
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape != tuple(batches[0][1].shape):
            raise ConfigError(
                f"Regression needs outputs of the targets' shape; the network gives {shape}, the "
                f"targets are {tuple(batches[0][1].shape)}."
            )
        if not float(torch.cat([batch[1].flatten() for batch in batches]).double().var()) > 0:
            raise ConfigError("Regression needs targets that differ; all of these are alike.")

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The first item of a batch is the input."""
        return model(batch[0])

    def score(self, output: Tensor, batch: Any) -> Tensor:
        """Count, sum and squares of the targets, squares of the errors."""
        y = batch[1].double()
        error = output.double() - y
        count = torch.tensor(float(y.numel()), dtype=torch.float64)
        return torch.stack([count, y.sum(), y.square().sum(), error.square().sum()])

    def value(self, sums: Tensor) -> float:
        """Percent of the variance explained."""
        count, total, squares, errors = sums.tolist()
        return float(100 * (1 - errors / (squares - total * total / count)))

    def interval(self, sums: Tensor) -> tuple[float, float] | None:
        """Not known from the sums."""
        return None

    def errors(self, output: Tensor, batch: Any) -> Tensor:
        """The squared error of each sample."""
        squares: Tensor = (output - batch[1]).square()
        return squares.flatten(1).sum(1)

    def draw(self, batch: Any, index: int, outputs: dict[str, Any], classes: Sequence[str]) -> str:
        """Target and predictions."""
        rows = "".join(
            f"<li>{html.escape(who)}: <b>{float(o[index].flatten()[0]):.3g}</b></li>"
            for who, o in outputs.items()
        )
        return f"<figcaption>{float(batch[1][index].flatten()[0]):.3g}<ul>{rows}</ul></figcaption>"

    def to_dict(self) -> dict[str, Any]:
        """Type and version."""
        return {"type": "Regress", "version": self.version}


def _require_pairs(batches: Sequence[Any]) -> None:
    first = batches[0]
    if not (isinstance(first, tuple | list) and len(first) > 1 and isinstance(first[1], Tensor)):
        raise ConfigError(
            f"This task needs batches of (inputs, labels); got {type(first).__name__}. For batches "
            f"of another form write a task of your own: see the guide."
        )
