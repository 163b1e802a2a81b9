"""kill -9, twenty times over: no finished trial is lost, and none runs twice."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evenkeel as ek

SCRIPT = Path(__file__).with_name("interrupted_audit.py")
KILLS = 20


def start(weights, store, log, workers):
    return subprocess.Popen(
        [sys.executable, SCRIPT, weights, store, log, str(workers)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finished(store) -> set[str]:
    """What the store holds, in the words of the log."""
    if not store.exists():
        return set()
    # Opened as by the next audit: a write that was cut off has to be rolled back.
    with contextlib.closing(sqlite3.connect(store)) as db:
        rows = db.execute("SELECT identity FROM trial WHERE identity != 'digital'").fetchall()
    trials = [json.loads(identity) for (identity,) in rows]
    return {
        f"{t['remedy'][0]['name']} Gaussian({t['device']['level']}) {t['chip']}" for t in trials
    }


def lines(log) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def kill(process, moment: int, rng: random.Random) -> None:
    """At a random moment: while starting up, or some trials on, in the middle of the next ones."""
    if moment % 4 == 3:
        time.sleep(rng.uniform(0, 3))
    else:
        for _ in range(rng.randint(1, 10)):  # a line for each trial that is done
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.2))
    assert process.poll() is None, "the audit ended before it could be killed; give it more to do"
    os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_killed_twenty_times_an_audit_ends_as_if_undisturbed(network, tmp_path):
    weights = tmp_path / "network.safetensors"
    ek.save(network, weights)
    store, log = tmp_path / "killed.db", tmp_path / "log"
    rng, partial = random.Random(0), 0
    for moment in range(KILLS + 1):
        kept, logged = finished(store), len(lines(log))
        with start(weights, store, log, workers=2 if moment % 4 == 0 else 0) as process:
            if moment < KILLS:
                kill(process, moment, rng)
            else:
                _, errors = process.communicate()
                assert process.returncode == 0, errors
        started = lines(log)[logged:]
        assert len(set(started)) == len(started), "a trial ran twice in one run"
        assert not kept & set(started), "a finished trial ran again"
        assert kept <= finished(store), "a finished trial was lost"
        partial += len(kept) < len(finished(store)) < 480
    assert partial >= 10, partial  # so many kills came in the middle of the work
    undisturbed = tmp_path / "undisturbed.db"
    with start(weights, undisturbed, tmp_path / "log2", workers=2) as process:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    results = [json.loads(Path(f"{path}.json").read_text()) for path in (store, undisturbed)]
    assert results[0] == results[1]
    assert len(finished(store)) == 480


def test_workers_do_not_outlive_the_audit_that_asked_for_them():
    script = (
        "import os, time\n"
        "from evenkeel.audit.run import local_processes\n"
        "if __name__ == '__main__':\n"
        "    pool = local_processes(1, 'x')\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600).result()\n"
    )
    asking = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(asking.stdout.readline())
    os.kill(worker, 0)  # it is there
    asking.kill()
    asking.wait()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and is_running(worker):
        time.sleep(0.2)
    asking.stdout.close()
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    """Neither gone nor waiting for a parent to take note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
