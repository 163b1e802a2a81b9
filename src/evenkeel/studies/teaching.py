"""How the reference networks of each task are taught and measured."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from evenkeel.audit.detect import Detect
from evenkeel.audit.segment import Segment
from evenkeel.audit.tasks import Classify
from evenkeel.models.centre_detector import centre_loss
from evenkeel.protocols import Task
from evenkeel.train import crops, flipped_boxes, foreground_loss


@dataclass(frozen=True)
class Teaching:
    """A task's measure, its loss, and how samples and labels are varied together."""

    task: Task
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    vary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, y: (x, y)


TEACHING = {
    "classify": Teaching(Classify()),
    "segment": Teaching(Segment(), foreground_loss, crops),
    "detect": Teaching(Detect(), centre_loss, flipped_boxes),
}
"""By the task that a recipe names."""
