"""``evenkeel bench analog``."""

from evenkeel.bench import analog as bench
from evenkeel.bench import timing


def test_every_way_is_timed(monkeypatch):
    monkeypatch.setattr(timing, "BLOCK_S", 1e-3)
    monkeypatch.setattr(bench, "BATCHES", (1,))
    monkeypatch.setattr(bench, "LARGE", (20, 30))
    seen = []
    rows = bench.bench(rounds=1, progress=lambda done, total: seen.append((done, total)))
    names = [row["way"] for row in rows]
    assert names[0] == "plain torch"
    assert rows[0]["ratio"] == 1
    for device in bench.DEVICES:
        assert {f"new chip, {device}", f"forward, {device}"} <= set(names)
    assert {"8 new chips one by one", "8 new chips at once"} <= set(names)
    assert all(row["median_ms"] > 0 for row in rows)
    assert names[-2:] == ["randn of 600", "program and age 600"]
    assert rows[-2]["ratio"] == 1
    assert seen == [(0, 2), (1, 2), (2, 2)]
