"""What the parts of an audit must offer each other. Nothing here has code; anyone may satisfy it.

The audit knows these and no method. A device, a remedy or a task of your own is one class in one
file; pass it to :func:`evenkeel.audit` as an object, or name it on the command line as
``module:Class``.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


class Chip(Protocol):
    """A network on one piece of hardware. It is called like the network."""

    digital: dict[str, str]
    """Layers that stayed digital, and why."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output on this hardware."""

    def age_(self, seconds: float) -> Any:
        """Set the time since programming."""

    def rewind_(self, stream: str) -> Any:
        """Start what is random at each read anew, at the beginning of a named stream."""


class Device(Protocol):
    """Hardware that networks can be programmed onto.

    One that has a ``level``, a number for its strength, is drawn against it. One whose fate is
    known up to some age only has that as ``oldest_s``, in seconds.
    """

    @property
    def name(self) -> str:
        """For tables and charts."""

    @property
    def family(self) -> str:
        """The part of the name that all levels of one kind share."""

    @property
    def ages(self) -> bool:
        """Whether time changes anything."""

    def program(self, model: nn.Module, *, seed: int) -> Any:
        """A :class:`Chip` that holds a copy of the model; the seed is the chip."""

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""


class Bench(Protocol):
    """What a remedy may use."""

    @property
    def batches(self) -> Sequence[Any]:
        """Batches to calibrate with, never those that are tested on."""

    @property
    def forward(self) -> Callable[[nn.Module, Any], Any]:
        """How to run a model on a batch."""

    def chips(self, model: nn.Module) -> Iterator[Any]:
        """Chips to fit shared changes to, at all audited ages; never those that are tested on."""


@runtime_checkable
class SharedRemedy(Protocol):
    """A remedy that changes the network once, before it is programmed, for every chip.

    Either kind may have ``why_not(model)``, which tells why it is of no use to a network,
    ``enables``, names of remedies that become of use behind it, and a ``title``, which sentences
    use instead of the name. One that trains has ``trains = True``, and counts as the dearest.
    """

    name: str
    advice: str
    """How to do it on real hardware, in a sentence or two of Markdown."""

    def prepare_(self, model: nn.Module, bench: Bench) -> None:
        """Change the network in place."""

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""


@runtime_checkable
class ChipRemedy(Protocol):
    """A remedy that is done on each chip, after it was programmed and has aged."""

    name: str
    advice: str
    """How to do it on real hardware, in a sentence or two of Markdown."""
    needs_data: bool
    """Whether each chip needs inputs to be run on it."""

    def mend_(self, chip: Any, bench: Bench) -> dict[str, Any]:
        """Change the chip in place; returns facts for the record, ready for JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""


Remedy = SharedRemedy | ChipRemedy


class Task(Protocol):
    """What a batch, a prediction and the metric are.

    A metric that is not in points of 100 has a ``unit``, such as "dB", of which one is as much as a
    point; higher is better there too. One whose metric is not made of sums, as a ranking of all
    detections is not, has ``gathered(scores)``: from what :meth:`score` gives of each batch,
    whatever that is, to the numbers that :meth:`value` takes. One that has more to tell than the
    metric has ``figures(sums, classes)``. ``legend`` is a sentence below its drawings.
    """

    @property
    def metric(self) -> str:
        """What is measured, such as "accuracy"; in points of 100, higher is better."""

    def check(self, model: nn.Module, batches: Sequence[Any], classes: Sequence[str]) -> None:
        """Raise ConfigError where the network does not fit the data."""

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for a batch."""

    def score(self, output: Any, batch: Any) -> Any:
        """Sums over the batch from which the metric can be made; sums of batches are added."""

    def value(self, sums: Tensor) -> float:
        """The metric of the sums."""

    def interval(self, sums: Tensor) -> tuple[float, float] | None:
        """95 % interval of the metric for the finite number of test samples, where there is one."""

    def errors(self, output: Any, batch: Any) -> Tensor:
        """How wrong each sample is, (N,), 0 for right; the report shows the worst."""

    def draw(self, batch: Any, index: int, outputs: dict[str, Any], classes: Sequence[str]) -> str:
        """HTML of one sample and of what each named output makes of it."""

    def to_dict(self) -> dict[str, Any]:
        """Settings and version."""
