"""One chip that serves a stream: with the online layer, and beside it calibrated beforehand."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.audit.names import resolve
from evenkeel.audit.plan import parse_age
from evenkeel.calibrate import calibrate_
from evenkeel.norm import NoiseAwareBatchNorm, convert_
from evenkeel.studies.frame import load_data, load_network

BATCH = 50


def served(
    network: Path, data: str, root: Path | None, device: str, age: str, seed: int, stream: int
) -> dict[str, Any]:
    """Accuracies of one chip over a stream of so many test samples, in their own (shuffled) order.

    The second half is scored for the network as it is, calibrated offline, and with the online
    layer. Then, from where the online layer has got to, streams of one class are served, each
    from the same state: what tracking costs on the stream itself, against the same chip with
    tracking off, and what it costs on the mixed samples served next. And the same from a chip
    that has served nothing yet, against the network as it is.
    """
    samples = load_data(data, root)
    x, y = (torch.cat([batch[k] for batch in samples.test])[:stream] for k in (0, 1))
    half = len(x) // 2
    hardware = resolve("devices", device)

    def chip_of(model: nn.Module) -> nn.Module:
        chip: nn.Module = hardware.program(model, seed=seed).age_(parse_age(age))
        return chip

    plain = chip_of(load_network(network))
    raw = _right(plain, x, y)
    calibrated = copy.deepcopy(plain)
    calibrate_(calibrated, samples.calibration)
    model = copy.deepcopy(load_network(network))
    convert_(model, NoiseAwareBatchNorm)
    online = chip_of(model)
    fresh = copy.deepcopy(online)
    tracked = _right(online, x, y)
    still = copy.deepcopy(online)
    for module in still.modules():
        if isinstance(module, NoiseAwareBatchNorm):
            module.tracking = False
    frozen = _right(still, x, y)
    classes = sorted(set(y.tolist()))
    mixed = slice(0, min(500, half))
    rows = []
    for c in classes:
        mine = y == c
        settled, cold = copy.deepcopy(online), copy.deepcopy(fresh)
        rows.append(
            {
                "class": c,
                "samples": int(mine.sum()),
                "cost": _share(frozen[mine]) - _share(_right(settled, x[mine], y[mine])),
                "cost_after": _share(frozen[mixed]) - _share(_right(settled, x[mixed], y[mixed])),
                "cost_from_the_start": _share(raw[mine]) - _share(_right(cold, x[mine], y[mine])),
            }
        )
    return {
        "device": hardware.name,
        "age": age,
        "seed": seed,
        "raw": _share(raw[half:]),
        "calibrated": _share(_right(calibrated, x[half:], y[half:])),
        "online": _share(tracked[half:]),
        "online_first_500": _share(tracked[:500]),
        "one_class": rows,
    }


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which samples the model gets right, served in batches."""
    outputs = [model(batch).argmax(1) for batch in x.split(BATCH)]
    return (torch.cat(outputs) == y).float()


def _share(right: Tensor) -> float:
    return float(100 * right.mean())
