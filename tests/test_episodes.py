"""Objectives, recall, answers over many episodes, and training by episodes."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from evenkeel.analog import PCM, Spread
from evenkeel.analog.device import as_device
from evenkeel.errors import ConfigError
from evenkeel.memory import (
    CODES,
    OBJECTIVES,
    CrossbarMemory,
    EpisodeSampler,
    KeyValueMemory,
    attention_loss,
    evaluation,
    prototypical_loss,
)
from evenkeel.memory.evaluation import Question, answers
from evenkeel.memory.objectives import to_prototypes
from evenkeel.memory.recall import Accuracy, accuracies, by_prototypes, embed, recall_by
from evenkeel.train import fit_episodes, launched

DOUBLE = torch.float64
QUIET = pytest.mark.filterwarnings("ignore::UserWarning")  # fabric's own, of number of workers


# ---- objectives

OWNERS = torch.tensor([0, 1, 0, 2, 1, 0])  # three, two and one support
LABELS = torch.tensor([2, 0, 1, 1])


def embedded(scale=1.0, dim=32):
    return scale * torch.randn(6, dim), scale * torch.randn(4, dim)


def published(keys, queries, sharp):
    """The loss of Karunaratne et al., written out."""
    alpha = F.cosine_similarity(queries[:, None], keys, dim=-1)
    raised = sharp(alpha)
    weights = raised / raised.sum(1, keepdim=True)
    p = torch.stack([weights[:, c == OWNERS].sum(1) for c in range(3)], 1)
    p = p.clamp(1e-7, 1 - 1e-7)
    y = torch.zeros_like(p)
    y[range(4), LABELS] = 1
    return -(y * p.log() + (1 - y) * (1 - p).log()).sum() / p.numel()


def softabs(alpha):
    return 1 / (1 + (-10 * (alpha - 0.5)).exp()) + 1 / (1 + (-10 * (-alpha - 0.5)).exp())


@pytest.mark.parametrize(
    ("objective", "sharp"), [("softabs", softabs), ("softmax", lambda alpha: (10 * alpha).exp())]
)
def test_the_loss_of_attention_is_the_published_one_with_its_gradient(objective, sharp):
    given = [x.requires_grad_() for x in embedded(3.0)]
    exact = [x.detach().double().requires_grad_() for x in given]
    loss = OBJECTIVES[objective](given[0], OWNERS, given[1], LABELS)
    expected = published(*exact, sharp)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(loss, given)
    wanted = torch.autograd.grad(expected, exact)
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-6)


def test_what_is_perfectly_right_or_wrong_has_a_finite_loss_and_gradient():
    keys = torch.eye(3, 64)
    owners, right = torch.arange(3), torch.tensor([0, 1, 2])
    for objective in OBJECTIVES.values():
        queries = (50 * keys).clone().requires_grad_()
        for labels in (right, right.roll(1)):
            loss = objective(keys, owners, queries, labels)
            (gradient,) = torch.autograd.grad(loss, queries)
            assert loss.isfinite()
            assert gradient.isfinite().all()
    worst = attention_loss(keys, owners, keys, right.roll(1))
    assert attention_loss(keys, owners, keys, right) < 0.1 < worst


def test_scores_are_bounded_away_from_0_and_1():
    keys, owners = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 1])
    loss = attention_loss(keys, owners, keys[:1], owners[1:], sharpening="softmax")
    assert loss.item() == pytest.approx(-np.log(1e-7), abs=0.2)  # not the 60 of exp(-20) and 0


def test_softmax_alone_asks_opposite_classes_to_stay_opposite():
    keys, owners = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 1])
    query = torch.tensor([[1.0, 0.0]])
    losses = {k: OBJECTIVES[k](keys, owners, query, owners[:1]).item() for k in OBJECTIVES}
    assert losses["softabs"] == pytest.approx(0.6931, abs=1e-3)  # it cannot tell them apart
    assert losses["softmax"] < 1e-6
    assert losses["prototypes"] == pytest.approx(np.log1p(np.exp(-4)), rel=1e-4)


def test_prototypes_are_means_of_their_keys():
    keys, queries = (x.double() for x in embedded())
    means = torch.stack([keys[c == OWNERS].mean(0) for c in range(3)])
    squared = torch.cdist(queries, means).square()
    torch.testing.assert_close(to_prototypes(keys, OWNERS, queries), squared)
    expected = F.cross_entropy(-squared, LABELS)
    loss = prototypical_loss(keys, OWNERS, queries, LABELS)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert by_prototypes(keys, OWNERS, queries).tolist() == squared.argmin(1).tolist()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_is_widened(objective):
    keys, queries = (x.bfloat16() for x in embedded())
    loss = OBJECTIVES[objective](keys, OWNERS, queries, LABELS)
    wide = OBJECTIVES[objective](keys.float(), OWNERS, queries.float(), LABELS)
    assert loss.dtype == torch.float32
    assert loss == wide


# ---- recall


def test_accuracy_is_a_mean_over_episodes_with_its_interval():
    accuracy = Accuracy.of(torch.tensor([0.5, 1.0, 0.75]))
    assert accuracy.mean == pytest.approx(75)
    assert accuracy.half_width == pytest.approx(1.96 * 25 / 3**0.5)
    assert accuracy.episodes == 3
    assert str(accuracy) == "75.00 ± 28.29"
    alone = Accuracy.of(torch.tensor([0.5]))
    assert alone.mean == 50
    assert alone.half_width is None


def test_vectors_are_those_of_the_encoder_in_eval_mode():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    images, seen = torch.randn(23, 1, 4, 4), []
    encoder(images)  # moves the running statistics
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder.train()
    random = torch.get_rng_state()
    found = embed(encoder, images, batch=10, progress=lambda done, total: seen.append(done))
    assert seen == [10, 20, 23]
    assert not found.requires_grad
    torch.testing.assert_close(found, encoder.eval()(images).detach())
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert embed(nn.Flatten(), images).shape == (23, 16)  # also without any parameter


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_separable_is_recalled_without_an_error(objective):
    labels = torch.arange(6).repeat_interleave(9)
    vectors = torch.eye(6, 32)[labels] + 0.02 * torch.randn(54, 32)
    sampler = EpisodeSampler(labels, 5, 2, 3, episodes=20)
    shares = accuracies(vectors, sampler, recall_by(objective))
    assert shares.tolist() == [1.0] * 20
    swapped = (labels + (torch.arange(54) % 9 == 0)) % 6  # one of nine of each is wrong
    wrong = EpisodeSampler(swapped, 5, 2, 3, episodes=20)
    assert 0.5 < accuracies(vectors, wrong, recall_by(objective)).mean() < 1


# ---- answers


@pytest.fixture
def vectors(tmp_path):
    """A file of vectors of 12 classes with 8 samples each, told apart but not always."""
    labels = torch.arange(12).repeat_interleave(8)
    x = torch.randn(12, 48)[labels] + 2 * torch.randn(96, 48)
    path = tmp_path / "vectors.safetensors"
    save_file({"vectors": x, "labels": labels}, path)
    return path


def ask(path, questions, episodes=30, seed=0, **options):
    with ThreadPoolExecutor(2) as pool:
        return answers(path, questions, episodes=episodes, seed=seed, pool=pool, **options)


def test_queries_are_as_many_as_samples_and_sums_allow():
    assert Question(5, 1, "real").queries(20) == 15
    assert Question(5, 1, "real").queries(10) == 9
    assert Question(20, 5, "real").queries(20) == 5
    assert Question(100, 5, "real").queries(20) == 1
    assert Question(200, 1, "real").queries(20) == 1
    assert Question(20, 5, "real").task == "20-way 5-shot"


@pytest.mark.parametrize("code", [*CODES, "prototypes"])
def test_answers_are_those_of_a_plain_loop(code, vectors):
    (row,) = ask(vectors, [Question(5, 2, code)], seed=3)
    stored = load_file(vectors)
    x, labels = stored["vectors"], stored["labels"]
    shares = []
    for episode in EpisodeSampler(labels, 5, 2, 6, episodes=30, seed=3):
        if code == "prototypes":
            found = by_prototypes(x[episode.support], episode.support_labels, x[episode.queries])
        else:
            memory = KeyValueMemory(48, code=code)
            memory.write(x[episode.support], episode.support_labels)
            found = memory.read(x[episode.queries]).best
        shares.append((found == episode.query_labels).double().mean())
    shares = 100 * torch.stack(shares)
    assert row["accuracy"] == pytest.approx(shares.mean().item())
    assert row["half_width"] == pytest.approx(1.96 * shares.std().item() / 30**0.5)
    told = {k: row[k] for k in ("task", "code", "device", "age_s", "episodes")}
    assert told == {
        "task": "5-way 2-shot", "code": code, "device": None, "age_s": 0.0, "episodes": 30,
    }  # fmt: skip
    assert 30 < row["accuracy"] < 99  # so that there is something to compare


def test_answers_do_not_depend_on_who_does_which_part(vectors, monkeypatch):
    questions = [
        Question(5, 2, "bipolar"),
        Question(4, 1, "real", as_device(Spread(0.8))),
        Question(4, 1, "binary", as_device(PCM()), ages=(0.0, 3600.0)),
    ]
    seen, whole = [], ask(vectors, questions)
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    parts = ask(vectors, questions, progress=lambda done, total: seen.append((done, total)))
    assert parts == whole
    assert seen == [(k, 10) for k in range(1, 11)]  # five chunks of each task
    assert ask(vectors, questions, seed=1) != whole
    assert ask(vectors, questions[::-1])[-1] == whole[0]  # nor on what else is asked


def test_all_codes_and_devices_meet_the_same_episodes(vectors):
    exact = as_device(Spread(0.0))
    questions = [Question(5, 2, code, device) for code in CODES for device in (None, exact)]
    rows = ask(vectors, questions)
    figures = {}
    for row in rows:
        figures.setdefault(row["code"], []).append(row["accuracy"])
    for code, (software, crossbar) in figures.items():
        # A crossbar without errors; "real" may differ in the last bit of a tie.
        assert crossbar == pytest.approx(software, abs=0 if code == "bipolar" else 0.5), code
    # The same but for ties, of which 48 places have some, and rounding decides them.
    assert figures["complement"][0] == pytest.approx(figures["bipolar"][0], abs=1.5)
    assert [row["device"] for row in rows[:2]] == [None, exact.name]


def test_a_device_that_ages_has_a_row_for_each_age(vectors):
    ages = (0.0, 3600.0, 3e7)
    rows = ask(vectors, [Question(5, 2, "binary", as_device(PCM()), ages)])
    assert [row["age_s"] for row in rows] == list(ages)
    stored, shares = load_file(vectors), []
    x, sampler = stored["vectors"], EpisodeSampler(stored["labels"], 5, 2, 6, episodes=30)
    for number, episode in enumerate(sampler):
        memory = CrossbarMemory(48, PCM(), seed=number, code="binary")
        memory.write(x[episode.support], episode.support_labels)
        shares.append([])
        for age in ages:
            if age:
                memory.age_(age).compensate_()
            found = memory.read(x[episode.queries]).best
            shares[-1].append((found == episode.query_labels).double().mean())
    expected = 100 * torch.tensor(shares, dtype=DOUBLE).mean(0)
    assert [row["accuracy"] for row in rows] == pytest.approx(expected.tolist())
    (alone,) = ask(vectors, [Question(5, 2, "binary", as_device(PCM()))])
    assert alone == rows[0]


def test_a_larger_spread_costs_accuracy_and_options_reach_the_memory(vectors):
    levels = (0.0, 1.0)
    rows = ask(vectors, [Question(5, 2, "real", as_device(Spread(level))) for level in levels])
    assert rows[0]["accuracy"] > rows[1]["accuracy"] + 2
    plain, other = (
        ask(vectors, [Question(5, 3, "real", options=o)])[0]
        for o in ((), (("read_out", "nearest"), ("sharpening", "abs")))
    )
    assert plain["accuracy"] != other["accuracy"]


def test_a_task_that_the_samples_do_not_allow_is_refused(vectors):
    with pytest.raises(ConfigError, match="An episode of 13 ways"):
        ask(vectors, [Question(13, 1, "real")])
    with pytest.raises(ConfigError, match="8 shots and 1 queries"):
        ask(vectors, [Question(5, 8, "real")])


# ---- training by episodes

SIGNAL, PLACES = 5, 20


def toy_images():
    """16 classes told apart by 5 of 20 places; the others are loud and say nothing."""
    labels = torch.arange(16).repeat_interleave(10)
    corners = torch.tensor([[1.0 - 2 * (k >> i & 1) for i in range(4)] + [1.0] for k in range(16)])
    x = torch.cat([corners[labels], 3 * torch.randn(160, PLACES - SIGNAL)], 1)
    x[:, :SIGNAL] += 0.1 * torch.randn(160, SIGNAL)
    return x, labels


def tiny():
    return nn.Sequential(nn.Linear(PLACES, 24), nn.BatchNorm1d(24), nn.Dropout(0.1), nn.ReLU(),
                         nn.Linear(24, 64))  # fmt: skip


def noisy(x):
    return x + 0.05 * torch.randn_like(x)


def state_of(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(one, other):
    one, other = (m.state_dict() if isinstance(m, nn.Module) else m for m in (one, other))
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


class KillError(Exception):
    pass


@pytest.fixture
def toy():
    return toy_images()


@pytest.fixture
def train(toy):
    images, labels = toy

    def run(episodes=24, objective=attention_loss, make=tiny, **options):
        sampler = EpisodeSampler(labels, 5, 2, 2, episodes=episodes)
        given = {"learning_rate": 1e-2, "every": 6, "validate": lambda encoder: 0.0, **options}
        fabric = launched("32-true", who="a test", devices=1, accelerator="cpu")
        return fit_episodes(make, images, sampler, objective, fabric=fabric, **given)

    return run


@QUIET
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_by_episodes_learns(train, objective):
    images, labels = toy_images()  # others of the same classes
    asked = EpisodeSampler(labels, 5, 2, 2, episodes=60, seed=1)

    def validate(encoder):
        assert not encoder.training
        return float(accuracies(embed(encoder, images), asked, recall_by(objective)).mean())

    def make():
        return nn.Sequential(nn.Linear(PLACES, 48), nn.ReLU(), nn.Linear(48, 64))

    notes, steps = [], []
    encoder = train(
        250, OBJECTIVES[objective], make, every=100, validate=validate, on_validation=notes.append,
        on_step=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert not encoder.training
    assert validate(encoder) > validate(make().eval()) + 0.25
    assert [n["episode"] for n in notes] == [100, 200, 250]  # the last is followed by one too
    assert notes[-1]["loss"] < notes[0]["loss"]
    assert validate(encoder) == max(n["validation"] for n in notes)
    assert steps == [(k, 250) for k in range(1, 251)]


def random_figure(encoder):
    return float(torch.rand(()) + sum(p.sum() for p in encoder.parameters()).detach())


@QUIET
@pytest.mark.parametrize("at", [1, 6, 11, 13, 24])
def test_a_run_that_was_killed_ends_as_one_that_was_not(train, tmp_path, at):
    options = {"augment": noisy, "validate": random_figure}
    whole = []
    undisturbed = train(**options, on_validation=whole.append)

    def kill(done, total):
        if done == at:
            raise KillError

    with pytest.raises(KillError):
        train(**options, checkpoint=tmp_path / "c", on_step=kill)
    notes, steps = [], []
    resumed = train(
        **options,
        checkpoint=tmp_path / "c",
        on_step=lambda done, total: steps.append(done),
        on_validation=notes.append,
    )
    assert same(resumed, undisturbed)
    assert steps[0] == 1 + (at - 1) // 6 * 6
    for one, other in zip(notes, whole, strict=True):  # also those behind it
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    told = []
    assert same(train(**options, checkpoint=tmp_path / "c", on_validation=told.append), resumed)
    assert told == notes  # nothing was left to do


@QUIET
@pytest.mark.parametrize("at", [6, 18, 24])
def test_a_run_killed_right_after_a_validation_goes_on_too(train, tmp_path, at):
    options = {"augment": noisy, "validate": random_figure, "make": tiny}

    def kill(facts):
        if facts["episode"] == at:
            raise KillError

    with pytest.raises(KillError):
        train(**options, checkpoint=tmp_path / "c", on_validation=kill)
    assert same(train(**options, checkpoint=tmp_path / "c"), train(**options))


@QUIET
@pytest.mark.parametrize(("figures", "best"), [((1, 3, 2, 0), 1), ((2, 1, 3, 3), 3)])
@pytest.mark.parametrize("killed", [False, True])
def test_the_network_of_the_best_validation_is_returned(train, tmp_path, figures, best, killed):
    states = []

    def validate(encoder):
        states.append(state_of(encoder))
        return float(figures[len(states) - 1])

    def kill(facts):
        if killed and facts["episode"] == 12 and len(states) == 2:
            raise KillError

    options = {"validate": validate, "checkpoint": tmp_path / "c", "on_validation": kill}
    if killed:
        with pytest.raises(KillError):
            train(**options)
        options["on_validation"] = lambda facts: None
    returned = train(**options)
    assert len(states) == 4
    assert same(returned, states[best])


@QUIET
def test_a_validation_that_is_not_a_number_is_no_best(train):
    figures = iter([float("nan"), 1.0, 0.5, float("nan")])
    train(validate=lambda encoder: next(figures))


@QUIET
def test_the_global_generator_is_put_back_and_does_not_matter(train):
    before = torch.get_rng_state()
    first = train(augment=noisy)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert same(first, train(augment=noisy))
    assert not same(first, train(augment=noisy, seed=1))
    assert not same(first, train())


@QUIET
def test_gradients_pass_through_supports_only_where_asked(train):
    modes = []

    class Encoder(nn.Linear):
        def forward(self, x):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    def make():
        return Encoder(PLACES, 8)

    def of_keys(keys, owners, queries, labels):
        return keys.square().mean()

    with pytest.raises(RuntimeError, match="does not require grad"):
        train(3, of_keys, make)
    assert modes == [(False, False), (True, True)]
    modes.clear()
    torch.manual_seed(0)
    start = make()
    trained = train(3, of_keys, make, support_gradients=True)
    assert modes == [(True, True)] * 6
    assert trained.weight.detach().norm() < start.weight.detach().norm()
    assert not same(train(3, make=make), train(3, make=make, support_gradients=True))


@QUIET
def test_the_checkpoint_of_another_run_is_refused(train, tmp_path):
    train(6, checkpoint=tmp_path / "c", identity={"dim": 64})
    with pytest.raises(ConfigError, match=r"checkpoint of another run: .*64.* and this one .*32"):
        train(6, checkpoint=tmp_path / "c", identity={"dim": 32})


@QUIET
@pytest.mark.parametrize("other", [{"episodes": 12}, {"seed": 1}, {"learning_rate": 1e-3}])
def test_the_checkpoint_of_a_run_with_other_settings_is_refused(train, tmp_path, other):
    train(6, checkpoint=tmp_path / "c")
    with pytest.raises(ConfigError, match="checkpoint of another run"):
        train(**{"episodes": 6, **other}, checkpoint=tmp_path / "c")
