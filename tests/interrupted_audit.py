"""The audit that test_interruption.py kills: python interrupted_audit.py WEIGHTS STORE LOG WORKERS.

Each trial writes its chip and remedy into LOG when it starts.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import evenkeel as ek
from evenkeel.calibrate.remedies import Calibrate
from evenkeel.data import digits


@dataclass(frozen=True)
class Logged:
    """Leave the chip as it is, and a line in a file."""

    name: str
    log: str
    advice = ""
    needs_data = False

    def mend_(self, chip, bench):
        handle = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, f"{self.name} {chip.device.name} {chip.seed}\n".encode())
        os.close(handle)
        return {}

    def to_dict(self):
        return {"type": "Logged", "name": self.name}


def main(weights: str, store: str, log: str, workers: str) -> None:
    network = ek.load(weights)
    result = ek.audit(
        network,
        digits(),
        devices=["gaussian:0.1", "gaussian:0.2"],
        remedies=[Logged("a", log), [Logged("b", log), Calibrate()]],
        chips=120,
        store=store,
        workers=int(workers),
        progress=lambda done, total: (sys.stdout.write(f"{done}\n"), sys.stdout.flush()),
    )
    Path(f"{store}.json").write_text(json.dumps([cell.to_dict() for cell in result.cells]))


if __name__ == "__main__":
    main(*sys.argv[1:])
