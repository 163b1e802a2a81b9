"""audit: run the plan, keep what is finished, and sum it up."""

import contextlib
import copy
import dataclasses
import inspect
import math
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenkeel.audit.names import resolve
from evenkeel.audit.plan import Plan, age_label, parse_age
from evenkeel.audit.remedy import Row, as_row
from evenkeel.audit.result import Audit, mean_shifts, summarize_all
from evenkeel.audit.run import Progress, Workload, evaluate, run
from evenkeel.audit.store import Store
from evenkeel.data import as_data
from evenkeel.data.dataset import fingerprint
from evenkeel.errors import ConfigError
from evenkeel.models import config_of
from evenkeel.protocols import Device, Remedy, Task
from evenkeel.provenance import environment

AGES = (0, "1h", "1d", "1mo", "1y")
REMEDIES = (
    "none", "drift", "pooled", "online", "calibrate", "match+calibrate", "match+clip+calibrate",
    "balance:arrays+calibrate",
)  # fmt: skip
LEAST_CHIPS = 8
"""What ``until`` starts from: fewer can look alike by chance."""
MAX_CHIPS = 512
"""Where adding chips for ``until`` ends."""


def audit(
    model: nn.Module,
    data: Any,
    *,
    task: str | Task = "classify",
    devices: Sequence[str | Device] = ("pcm",),
    ages: Sequence[str | float] = AGES,
    remedies: Sequence[str | Remedy | Sequence[Remedy] | Row] | None = None,
    chips: int = 16,
    until: float | None = None,
    floor: float | None = None,
    seed: int = 0,
    store: str | Path = "audit.db",
    calibration: Iterable[Any] | None = None,
    executor: Executor | None = None,
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
    command: str | None = None,
) -> Audit:
    """How accurate a network is on analog chips, over their life, and what mends it.

    Every remedy meets the same chips. Finished trials are kept in ``store``: an audit that was
    interrupted goes on where it was, and one that asks for more runs only what is new.

    Args:
        model: a trained network; it is not changed.
        data: a :class:`evenkeel.data.Data`, a pair of tensors (inputs, labels), or labelled
            batches.
        task: "classify", "regress", or your own (:class:`evenkeel.protocols.Task`).
        devices: names such as "pcm" or "gaussian:0.05", or objects; the verdict is on the first.
        ages: since programming: seconds, or text such as "1h", "1d", "1mo", "1y". Devices that do
            not age are visited once.
        remedies: rows of remedies, such as "drift+calibrate". The first is what the others are
            compared with. Default: those of :data:`REMEDIES` that the network has a use for.
        chips: how many chips of each device; chip k has the seed ``seed + k``.
        until: go on adding chips until the 95 % interval of every mean is at most this many points
            to each side.
        floor: what a chip must reach to count as good, in points; gives the yield.
        seed: of the first chip.
        store: SQLite file of finished trials; ":memory:" keeps nothing.
        calibration: batches to calibrate with; default: those of ``data``, or a quarter of it.
        executor: any ``concurrent.futures.Executor`` whose workers see this machine's files.
        workers: local processes; default: one for each core; 0: run in this process.
        progress: called with finished and planned trials.
        command: the command that repeats this, for the report.

    Raises:
        ConfigError: an argument does not fit, the network has no layer to program, its weights are
            not finite, or it does not fit the data.
        StoreError: the store cannot be opened or written.

    Examples:
        >>> import torch, evenkeel as ek
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> net = torch.nn.Linear(4, 2).eval()
        >>> result = ek.audit(net, (x, net(x).argmax(1)), devices=["gaussian:0.1"], chips=2,
        ...                   remedies=["none", "clip"], store=":memory:", workers=0)
        >>> [cell.remedy for cell in result.cells]
        ['none', 'clip']
    """
    started = time.perf_counter()
    shuffled = isinstance(getattr(data, "sampler", None), torch.utils.data.RandomSampler)
    data = as_data(data, calibration)
    rows, notes = _rows(model, remedies)
    if shuffled:
        notes.append(
            "The loader shuffles, so the batches are other ones at every run and no finished trial "
            "is found again: use shuffle=False."
        )
    plan, model = _checked_plan(model, data, task, devices, ages, rows, seed)
    if chips < 1:
        raise ConfigError(f"chips must be 1 or more; got {chips}.")
    if until is not None and not until > 0:
        raise ConfigError(f"until must be a number of points above 0; got {until}.")
    if until is not None:
        chips = max(chips, LEAST_CHIPS)
    work = Workload(model, dataclasses.replace(data, train=None), plan)
    digital_layers = _first_chip(plan, model).digital
    options: dict[str, Any] = {"executor": executor, "workers": workers, "progress": progress}
    with Store(store) as kept:
        sums = _digital_sums(work, kept)
        digital = plan.task.value(sums)
        counts = dict.fromkeys(plan.cells(), chips)
        results = run(work, plan.trials(range(chips), plan.cells()), kept, **options)
        cells = summarize_all(work, results, counts, digital, floor)
        while wide := _too_wide(plan, cells, counts, until):
            first = min(counts[cell] for cell in wide)
            more = range(first, min(first + max(8, first // 2), MAX_CHIPS))
            wide = [cell for cell in wide if counts[cell] == first]
            results |= run(work, plan.trials(more, wide), kept, **options)
            counts |= dict.fromkeys(wide, more.stop)
            cells = summarize_all(work, results, counts, digital, floor)
    if until is not None and any(c.half_width > until for c in cells):
        notes.append(
            f"Some intervals are wider than ±{until:g} points after {MAX_CHIPS} chips each."
        )
    if data.note:
        notes.append(data.note)
    return Audit(
        network=(config_of(model) or {}).get("name", type(model).__name__),
        digital=digital,
        digital_interval=plan.task.interval(sums),
        figures=plan.task.figures(sums, data.classes) if hasattr(plan.task, "figures") else {},
        cells=cells,
        floor=floor,
        digital_layers=digital_layers,
        shifts=mean_shifts(work, results, counts),
        provenance=_provenance(work, counts, results, time.perf_counter() - started, command),
        notes=notes,
        _work=work,
    )


def _rows(model: nn.Module, remedies: Sequence[Any] | None) -> tuple[list[Row], list[str]]:
    """The rows asked for; or of the default ones those that apply, and a note on the others."""
    if isinstance(remedies, str) or (remedies is not None and not remedies):
        raise ConfigError(f"remedies must be a list with at least one entry; got {remedies!r}.")
    rows = [as_row(remedy) for remedy in (REMEDIES if remedies is None else remedies)]
    reasons = {row.name: reason for row in rows if (reason := row.why_not(model))}
    if reasons and remedies is not None:
        name, reason = next(iter(reasons.items()))
        raise ConfigError(f"The remedy {name!r} cannot be used on this network. {reason}")
    notes = []
    for reason in dict.fromkeys(reasons.values()):
        names = ", ".join(name for name, why in reasons.items() if why == reason)
        notes.append(f"Left out, as this network has no use for them: {names}. {reason}")
    return [row for row in rows if row.name not in reasons], notes


def _checked_plan(
    model: nn.Module,
    data: Any,
    task: str | Task,
    devices: Sequence[str | Device],
    ages: Sequence[str | float],
    rows: Sequence[Row],
    seed: int,
) -> tuple[Plan, nn.Module]:
    for name, value in (("devices", devices), ("ages", ages)):
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise ConfigError(f"{name} must be a list with at least one entry; got {value!r}.")
    chosen: Task = resolve("tasks", task) if isinstance(task, str) else task
    model = getattr(model, "_orig_mod", model)  # a compiled wrapper's own network
    if any(module.training for module in model.modules()):
        model = copy.deepcopy(model).eval()
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise ConfigError(f"The network has no weights yet: '{name}' is on the meta device.")
        if isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all()):
            raise ConfigError(
                f"The network's weights must be finite; '{name}' holds NaN or infinity. Check the "
                "file they were loaded from, or the training."
            )
    chosen.check(copy.deepcopy(model), data.test, data.classes)  # layers may track what they see
    plan = Plan(
        devices=[resolve("devices", d) if isinstance(d, str) else d for d in devices],
        ages_s=sorted({parse_age(age) for age in ages}),
        rows=rows,
        task=chosen,
        seed=seed,
        model=_model_fingerprint(model),
        data=data.fingerprint(),
    )
    for kind, named in (("devices", plan.devices), ("remedies", plan.rows)):
        names = [item.name for item in named]
        if len(set(names)) < len(names):
            raise ConfigError(f"Each of the {kind} must be named once; got {', '.join(names)}.")
    for device in plan.devices:
        last, oldest = plan.ages_of(device)[-1], getattr(device, "oldest_s", math.inf)
        if last > oldest:
            raise ConfigError(
                f"{device.name} was measured up to {age_label(oldest)} after programming; the "
                f"audit visits {age_label(last)}. Ask for other ages (--age 0,{age_label(oldest)})."
            )
    return plan, model


def _model_fingerprint(model: nn.Module) -> str:
    """A hash of weights, structure, and the code of the classes that are not torch's own.

    Without the code, results of a network whose forward was edited since would count as its own.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    code = []
    for kind in sorted(kinds, key=lambda k: (k.__module__, k.__qualname__)):
        if not kind.__module__.startswith("torch."):
            with contextlib.suppress(OSError, TypeError):  # typed into a shell, or compiled
                code.append(inspect.getsource(kind))
    structure = re.sub(r"0x[0-9a-f]+", "", repr(model))
    settings = [
        (path, name, repr(value))
        for path, module in model.named_modules()
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name != "training" and _is_plain(value)
    ]
    tensors = dict(model.state_dict()) | dict(model.named_buffers())  # those not saved, too
    return fingerprint([type(model).__qualname__, structure, settings, code, tensors])


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, bool | int | float | str)


def _first_chip(plan: Plan, model: nn.Module) -> Any:
    """One chip, so that a network that cannot be programmed fails at once, and here."""
    return plan.devices[0].program(model, seed=plan.seed)


def _digital_sums(work: Workload, store: Store) -> torch.Tensor:
    plan = work.plan
    identity = fingerprint(["digital", plan.model, plan.data, str(plan.task.to_dict())])
    known = store.results([identity])
    if not known:
        sums = evaluate(copy.deepcopy(work.model), work.data, plan.task).tolist()
        store.add(identity, "digital", {"sums": sums})
        known = {identity: {"sums": sums}}
    return torch.tensor(known[identity]["sums"], dtype=torch.float64)


def _too_wide(
    plan: Plan, cells: Sequence[Any], counts: dict[tuple[int, float, int], int], until: float | None
) -> list[tuple[int, float, int]]:
    """Cells that need more chips; all rows of one place get them, so that they stay paired."""
    if until is None:
        return []
    by_cell = dict(zip(plan.cells(), cells, strict=True))
    places = {
        cell[:2] for cell, c in by_cell.items() if c.half_width > until and counts[cell] < MAX_CHIPS
    }
    return [cell for cell in by_cell if cell[:2] in places]


def _provenance(
    work: Workload,
    counts: dict[tuple[int, float, int], int],
    results: dict[str, dict[str, Any]],
    seconds: float,
    command: str | None,
) -> dict[str, Any]:
    plan = work.plan
    return {
        "command": command,
        **environment(),
        "data": work.data.name,
        "test_samples": work.data.test_samples,
        "calibration_samples": work.data.calibration_samples,
        "shared_samples": work.data.shared_samples(),
        "rebuilds": config_of(work.model) is not None,
        "model_fingerprint": plan.model,
        "data_fingerprint": plan.data,
        "devices": [device.to_dict() for device in plan.devices],
        "remedies": {row.name: row.to_dict() for row in plan.rows},
        "ages_s": list(plan.ages_s),
        "seeds": [plan.seed, plan.seed + max(counts.values()) - 1],
        "trials": sum(counts.values()),
        "trial_seconds": sum(result["seconds"] for result in results.values()),
        "seconds": seconds,
    }
