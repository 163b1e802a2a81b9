"""Running trials: in worker processes, in this one, or on any executor."""

import functools
import math
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenkeel.audit.plan import Plan, Trial
from evenkeel.audit.remedy import FitBench
from evenkeel.audit.store import Store
from evenkeel.batches import owned
from evenkeel.data import Data
from evenkeel.errors import ConfigError, WorkerError
from evenkeel.layers import register_weight_layer, registered_kinds
from evenkeel.protocols import Task

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Workload:
    """All that a worker needs besides the trial."""

    model: nn.Module
    data: Data
    plan: Plan

    def bench(self, device: int) -> FitBench:
        """What remedies may use on a device."""
        hardware = self.plan.devices[device]
        return FitBench(
            batches=self.data.calibration,
            forward=self.plan.task.run,
            device=hardware,
            ages_s=self.plan.ages_of(hardware),
            seed=self.plan.seed,
        )

    def prepared(self, device: int, row: int) -> nn.Module:
        """The network that is programmed: with the row's shared changes for this device."""
        return self.plan.rows[row].prepared(self.model, self.bench(device))


@torch.no_grad()
def evaluate(model: Any, data: Data, task: Task) -> torch.Tensor:
    """The task's sums over all test batches."""
    scores: list[Any] = [task.score(task.run(model, batch), batch) for batch in data.test]
    if (gathered := getattr(task, "gathered", None)) is not None:
        sums: torch.Tensor = gathered(scores)
        return sums
    return torch.stack(scores).sum(0)


def mended_chip(work: Workload, prepared: nn.Module, trial: Trial) -> tuple[Any, dict[str, Any]]:
    """The trial's chip, aged and mended, about to be evaluated; and the remedies' facts."""
    chip = work.plan.devices[trial.device].program(prepared, seed=trial.chip)
    chip.age_(trial.age_s)
    chip.rewind_("mend")
    facts = work.plan.rows[trial.row].mend_(chip, work.bench(trial.device))
    chip.rewind_("evaluate")  # every remedy meets the same read noise
    return chip, facts


def run_trial(work: Workload, prepared: nn.Module, trial: Trial) -> dict[str, Any]:
    """One trial's result: the metric, its sums, and the remedies' facts."""
    started = time.perf_counter()
    chip, facts = mended_chip(work, prepared, trial)
    sums = evaluate(chip, work.data, work.plan.task)
    value = work.plan.task.value(sums)
    if not math.isfinite(value):
        plan = work.plan
        raise ConfigError(
            f"The {plan.task.metric} of chip {trial.chip} on {plan.devices[trial.device].name} "
            f"with {plan.rows[trial.row].name} is {value}: the network's outputs on it are not "
            f"finite. Leave this device or remedy out."
        )
    return {
        "value": value,
        "sums": sums.tolist(),
        "facts": facts,
        "digital": chip.digital,
        "seconds": time.perf_counter() - started,
    }


def run(
    work: Workload,
    trials: Sequence[Trial],
    store: Store,
    *,
    executor: Executor | None,
    workers: int | None,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Results of all trials by key: those in the store are read, the others run and kept.

    Only this process writes to the store, one transaction for each trial as it comes back.
    """
    results = store.results(trial.key for trial in trials)
    pending = list({t.key: t for t in trials if t.key not in results}.values())
    progress(len(trials) - len(pending), len(trials))
    if not pending:
        return results

    def keep(trial: Trial, result: dict[str, Any]) -> None:
        store.add(trial.key, trial.identity, result)
        results[trial.key] = result
        progress(len(results), len(trials))

    workers = min(num_workers(workers), len(pending))
    if executor is None and workers <= 1:
        prepared = functools.cache(work.prepared)
        for trial in pending:
            keep(trial, run_trial(work, prepared(trial.device, trial.row), trial))
        return results
    with tempfile.TemporaryDirectory(prefix="evenkeel-") as folder:
        path = Path(folder) / "workload.pickle"
        import cloudpickle  # only an audit on several processes needs it

        path.write_bytes(cloudpickle.dumps((_compact(work), registered_kinds())))
        pool = executor or local_processes(workers, work.plan.model)
        _gather(pool, str(path), pending, keep)
    return results


def _compact(work: Workload) -> Workload:
    """The work with batches that can be sent: not each with all the samples it was cut from."""
    test, calibration = ([owned(b) for b in bs] for bs in (work.data.test, work.data.calibration))
    return replace(work, data=replace(work.data, test=test, calibration=calibration))


def num_workers(asked: int | None) -> int:
    """Worker processes: as asked, or one for each core this process may use."""
    if asked is None:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    if asked < 0:
        raise ConfigError(f"workers must be 0 (run in this process) or more; got {asked}.")
    return asked


KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}
"""For glibc: memory of tensors up to 32 MiB is used again, not given back and asked for anew."""


def local_processes(workers: int, fingerprint: str) -> Executor:
    """Processes of one thread each; they are kept for the next work of the same fingerprint."""
    from loky import get_reusable_executor

    # The fingerprint is there to be compared: for another network, or one whose code was edited,
    # processes that still hold the old code are not used again.
    pool: Executor = get_reusable_executor(
        max_workers=workers,
        timeout=30,
        initializer=_start_worker,
        initargs=(fingerprint,),
        env=KEEP_MEMORY,
    )
    return pool


def _start_worker(fingerprint: str) -> None:
    # One thread each: the cores are taken by the workers, and sums come out the same everywhere.
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Leave when the process that asked is gone: nobody will keep what is being worked on."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _gather(
    pool: Executor,
    path: str,
    pending: Sequence[Trial],
    keep: Callable[[Trial, dict[str, Any]], None],
) -> None:
    futures: dict[Future[dict[str, Any]], Trial] = {}
    waiting = iter(pending)
    ahead = 4 * (multiprocessing.cpu_count() or 1)  # enough to keep any pool busy, few to call off
    try:
        while True:
            for trial in waiting:
                futures[pool.submit(_in_worker, path, trial)] = trial
                if len(futures) >= ahead:
                    break
            if not futures:
                return
            done, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in done:
                keep(futures.pop(future), future.result())
    except BrokenExecutor as error:
        raise WorkerError(
            "A worker process died, most often for want of memory. Finished trials are kept; the "
            "same audit with fewer workers, or workers=0, goes on from there."
        ) from error
    finally:
        for future in futures:
            future.cancel()


def _in_worker(path: str, trial: Trial) -> dict[str, Any]:
    work = _load(path)
    return run_trial(work, _prepared(path, trial.device, trial.row), trial)


@functools.lru_cache(maxsize=1)
def _load(path: str) -> Workload:
    import cloudpickle

    work: Workload
    work, kinds = cloudpickle.loads(Path(path).read_bytes())  # written by run() for this audit
    for kind, weights in kinds.items():  # the user's own kinds of layers
        register_weight_layer(kind, weights)
    return work


@functools.lru_cache(maxsize=64)
def _prepared(path: str, device: int, row: int) -> nn.Module:
    return _load(path).prepared(device, row)
