"""The audit: how accurate a network is on its chips, and what mends it."""

from evenkeel.audit.audit import audit as audit
from evenkeel.audit.reconstruct import Reconstruct as Reconstruct
from evenkeel.audit.result import Audit as Audit
from evenkeel.audit.tasks import Classify as Classify
from evenkeel.audit.tasks import Regress as Regress
