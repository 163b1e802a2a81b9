"""One chip that serves a stream: with the online layer, and beside it calibrated beforehand."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.audit.names import resolve
from evenkeel.audit.plan import parse_age
from evenkeel.calibrate import calibrate_
from evenkeel.data import Data
from evenkeel.norm import NoiseAwareBatchNorm, convert_
from evenkeel.studies.frame import load_data, load_network


def served(
    network: Path,
    data: str,
    root: Path | None,
    device: str,
    age: str,
    seed: int,
    batch: int,
    stream: int,
) -> dict[str, Any]:
    """Accuracies of one chip over a stream of so many test samples, in their own (shuffled) order.

    The second half is scored for the network as it is, calibrated offline, and with the online
    layer. Then, from where the online layer has got to, streams of one class are served, each
    from the same state: what tracking costs on the stream itself, against the same chip with
    tracking off, and what it costs on the mixed samples served next. And the same from a chip
    that has served nothing yet, against the network as it is.
    """
    samples = load_data(data, root)
    x, y = _first(samples, stream)
    half = len(x) // 2
    hardware = resolve("devices", device)

    def chip_of(model: nn.Module) -> nn.Module:
        chip: nn.Module = hardware.program(model, seed=seed).age_(parse_age(age))
        return chip

    plain = chip_of(load_network(network))
    raw = _right(plain, x, y, batch)
    calibrated = copy.deepcopy(plain)
    calibrate_(calibrated, samples.calibration)
    model = copy.deepcopy(load_network(network))
    convert_(model, NoiseAwareBatchNorm)
    online = chip_of(model)
    fresh = copy.deepcopy(online)
    tracked = _right(online, x, y, batch)
    still = _frozen(online)
    frozen = _right(still, x, y, batch)
    mixed = slice(0, min(500, half))
    rows = []
    for c in sorted(set(y.tolist())):
        mine = y == c
        settled, cold = copy.deepcopy(online), copy.deepcopy(fresh)
        on_it = _share(_right(settled, x[mine], y[mine], batch))
        after = _share(_right(settled, x[mixed], y[mixed], batch))
        at_once = _share(_right(cold, x[mine], y[mine], batch))
        rows.append(
            {
                "class": c,
                "samples": int(mine.sum()),
                "cost": _share(frozen[mine]) - on_it,
                "cost_after": _share(frozen[mixed]) - after,
                "cost_from_the_start": _share(raw[mine]) - at_once,
            }
        )
    return {
        "device": hardware.name,
        "age": age,
        "seed": seed,
        "batch": batch,
        "raw": _share(raw[half:]),
        "calibrated": _share(_right(calibrated, x[half:], y[half:], batch)),
        "online": _share(tracked[half:]),
        "online_first_500": _share(tracked[:500]),
        "one_class": rows,
    }


def aged(
    network: Path,
    data: str,
    root: Path | None,
    seed: int,
    warm_up: int,
    steps: int,
    samples: int,
    batch: int = 50,
) -> dict[str, Any]:
    """A PCM chip that ages in even steps of log time, from a minute to a month, while it serves.

    Accuracy of each step for the online layer; for the same layer frozen after its warm-up; and for
    the online layer when all of the ageing happens at once.
    """
    x, y = _first(load_data(data, root), warm_up + steps * samples)
    model = copy.deepcopy(load_network(network))
    convert_(model, NoiseAwareBatchNorm)
    chip: Any = resolve("devices", "pcm").program(model, seed=seed).age_(MINUTE)
    _right(chip, x[:warm_up], y[:warm_up], batch)
    still, jumped = _frozen(chip), copy.deepcopy(chip).age_(MONTH)
    ages = [MINUTE * (MONTH / MINUTE) ** (k / (steps - 1)) for k in range(steps)]
    found: dict[str, Any] = {"seed": seed, "ages_s": ages}
    for name, one in (("online", chip), ("frozen", still), ("online_after_a_jump", jumped)):
        found[name] = []
        for k, age_s in enumerate(ages):
            if one is not jumped:
                one.age_(age_s)
            part = slice(warm_up + k * samples, warm_up + (k + 1) * samples)
            found[name].append(_share(_right(one, x[part], y[part], batch)))
    return found


MINUTE, MONTH = 60.0, 2629746.0


def _first(samples: Data, count: int) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat([batch[k] for batch in samples.test])[:count] for k in (0, 1))
    return x, y


def _frozen(chip: Any) -> Any:
    """The chip as it stands, with no layer tracking what it serves."""
    still = copy.deepcopy(chip)
    for module in still.modules():
        if isinstance(module, NoiseAwareBatchNorm):
            module.tracking = False
    return still


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> Tensor:
    """Which samples the model gets right, served in batches."""
    outputs = [model(part).argmax(1) for part in x.split(batch)]
    return (torch.cat(outputs) == y).float()


def _share(right: Tensor) -> float:
    return float(100 * right.mean())
