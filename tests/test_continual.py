"""Classes learnt one after the other."""

import torch

from evenkeel.analog import PCM, Device, Spread
from evenkeel.memory.continual import learn_one_by_one
from evenkeel.memory.evaluation import Question

CLASSES, EACH, DIM = 8, 6, 256


def samples(noise):
    centres = torch.randn(CLASSES, DIM).repeat_interleave(EACH, 0)
    return centres + noise * torch.randn_like(centres), torch.arange(CLASSES).repeat_interleave(
        EACH
    )


def test_what_is_far_apart_is_never_forgotten():
    rows = learn_one_by_one(*samples(0.1), Question(6, 2, "bipolar"), runs=3)
    assert [row["classes"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "old" not in rows[0]
    assert all(row["new"] == row["all"] == 100 for row in rows)
    assert all(row["old"] == 100 and row["old_half_width"] == 0 for row in rows[1:])


def test_the_more_classes_the_harder_and_all_is_the_mean_of_old_and_new():
    rows = learn_one_by_one(*samples(3.0), Question(8, 1, "real"), runs=12)
    assert rows[0]["all"] == 100
    assert rows[1]["all"] > rows[-1]["all"] > 100 / 8
    for row in rows[1:]:
        n = row["classes"]
        mean = ((n - 1) * row["old"] + row["new"]) / n
        assert abs(mean - row["all"]) < 1e-3


def test_on_a_crossbar_columns_age_from_their_own_write():
    seen = []

    class Watched(PCM):
        def drift(self, g, state, age_s):
            seen.append(age_s)
            return super().drift(g, state, age_s)

    question = Question(3, 2, "bipolar", Device(Watched()))
    rows = learn_one_by_one(*samples(0.3), question, every_s=60.0, runs=1)
    assert {0.0, 60.0, 120.0} == set(seen)
    assert rows[-1]["all_half_width"] is None  # of one run


def test_the_same_seed_is_the_same_run_and_another_crossbar_another_one():
    data = samples(4.0)
    question = Question(8, 1, "bipolar", Device(Spread(1.0)))

    def run(seed):
        return learn_one_by_one(*data, question, runs=2, seed=seed)

    assert run(0) == run(0)
    assert run(0) != run(5)
