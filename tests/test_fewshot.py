"""Learning from a few examples: labelled images, objectives, training, tests and the commands."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import evenkeel as ek
from evenkeel.analog import PCM, Spread
from evenkeel.analog.device import as_device
from evenkeel.cli import fewshot_measure, main
from evenkeel.data import LabelledImages, labelled_folder
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
from evenkeel.train import drawn_anew, fit_episodes, launched

DOUBLE = torch.float64
QUIET = pytest.mark.filterwarnings("ignore::UserWarning")  # fabric's own, of number of workers


def broken(reason):
    return pytest.mark.xfail(strict=True, reason=reason)


# ---- labelled images


def draw(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


@pytest.fixture
def letters(tmp_path):
    """Three classes in two alphabets; each drawing has one grey value, by which it is known."""
    root = tmp_path / "letters"
    for value, name in enumerate(("b/y/2", "a/x/1", "a/x/2", "b/x/1", "b/y/1")):
        draw(root / f"{name}.png", np.full((6, 8), 51 * value))
    (root / "b" / "about.txt").write_text("no image")
    return root


def test_each_folder_with_images_is_a_class(letters):
    seen = []
    data = labelled_folder(letters, progress=lambda done, total: seen.append((done, total)))
    assert data.classes == ("a/x", "b/x", "b/y")
    assert data.labels.tolist() == [0, 0, 1, 2, 2]
    assert data.images.shape == (5, 1, 6, 8)
    values = data.images.mean((1, 2, 3))
    torch.testing.assert_close(values, torch.tensor([0.2, 0.4, 0.6, 0.8, 0.0]))
    assert seen == [(k, 5) for k in range(1, 6)]
    assert (len(data), data.channels) == (5, 1)
    torch.testing.assert_close(labelled_folder(letters, invert=True).images, 1 - data.images)
    draw(letters / "c" / "3.png", np.full((9, 5), 51))
    resized = labelled_folder(letters, size=4)
    assert resized.images.shape == (6, 1, 4, 4)
    torch.testing.assert_close(resized.images[:5], data.images[..., :4, :4])


def test_resizing_averages(tmp_path):
    fine = np.indices((32, 32)).sum(0) % 2 * 255  # a chess board of single pixels
    draw(tmp_path / "a" / "1.png", fine)
    image = labelled_folder(tmp_path, size=8).images[0, 0, 1:-1, 1:-1]
    torch.testing.assert_close(image, torch.full((6, 6), 0.5), rtol=0, atol=0.02)


@broken("antialiased weights sum to a little more than 1: 1 - x is below 0 (-3.6e-7)")
def test_resized_pixels_stay_between_0_and_1(tmp_path):
    draw(tmp_path / "a" / "1.png", np.full((40, 40), 255))
    for invert in (False, True):
        images = labelled_folder(tmp_path, size=17, invert=invert).images
        assert 0 <= images.min() <= images.max() <= 1


def test_colour_has_three_channels(tmp_path):
    pixels = np.zeros((4, 4, 3))
    pixels[..., 2] = 255
    draw(tmp_path / "a" / "1.png", pixels)
    data = labelled_folder(tmp_path)
    assert data.channels == 3
    assert data.images.mean((0, 2, 3)).tolist() == [0, 0, 1]


def test_what_a_folder_of_images_lacks_is_said(letters, tmp_path):
    with pytest.raises(ConfigError, match=r"No folder .*none"):
        labelled_folder(tmp_path / "none")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"No images .*empty/CLASS/\*\.png"):
        labelled_folder(tmp_path / "empty")
    draw(letters / "c" / "odd.png", np.zeros((6, 6)))
    with pytest.raises(ConfigError, match="must have one shape"):
        labelled_folder(letters)
    draw(letters / "c" / "odd.png", np.zeros((6, 8, 3)))
    with pytest.raises(ConfigError, match="must have one shape"):
        labelled_folder(letters, size=4)
    (letters / "c" / "odd.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"odd\.png cannot be read as an image"):
        labelled_folder(letters, size=4)


@broken("a hidden folder is taken for a class, as image_folder does not")
def test_a_hidden_folder_is_no_class(letters):
    draw(letters / ".thumbnails" / "1.png", np.zeros((6, 8)))
    draw(letters / "a" / ".cache" / "1.png", np.zeros((6, 8)))
    assert labelled_folder(letters).classes == ("a/x", "b/x", "b/y")


def test_only_chosen_classes_stay(letters):
    data = labelled_folder(letters)
    chosen = data.only(lambda name: name.endswith("x"))
    assert chosen.classes == ("a/x", "b/x")
    assert chosen.labels.tolist() == [0, 0, 1]
    last = data.only(lambda name: name == "b/y")
    assert last.labels.tolist() == [0, 0]
    assert torch.equal(last.images, data.images[3:])
    with pytest.raises(ConfigError, match=r"None of 3 classes is chosen; .* a/x, b/x, b/y"):
        data.only(lambda name: False)


def test_turned_classes_are_further_ones():
    images = torch.rand(5, 1, 3, 3)
    data = LabelledImages(images, torch.tensor([0, 0, 1, 2, 2]), ("a", "b", "c"))
    turned = data.turned()
    assert len(turned) == 20
    assert len(set(turned.classes)) == 12
    for row in range(20):
        quarter, original = divmod(row, 5)
        name = turned.classes[turned.labels[row]]
        assert name == f"{data.classes[data.labels[original]]}/rot{90 * quarter:03d}"
        expected = np.rot90(images[original, 0].numpy(), quarter)
        assert (turned.images[row, 0].numpy() == expected).all()


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
    assert by_prototypes(0, keys, OWNERS, queries).tolist() == squared.argmin(1).tolist()


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
    assert np.isnan(alone.half_width)


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
            found = by_prototypes(0, x[episode.support], episode.support_labels, x[episode.queries])
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
    assert seen == [(k, 15) for k in range(1, 16)]  # five chunks of each
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
@broken("NaN compares false with everything: no network is kept, and loading an empty state fails")
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
@broken("unlike fit, it takes nothing of its own into the identity; longer ones break in the midst")
@pytest.mark.parametrize("other", [{"episodes": 12}, {"seed": 1}, {"learning_rate": 1e-3}])
def test_the_checkpoint_of_a_run_with_other_settings_is_refused(train, tmp_path, other):
    train(6, checkpoint=tmp_path / "c")
    with pytest.raises(ConfigError, match="checkpoint of another run"):
        train(**{"episodes": 6, **other}, checkpoint=tmp_path / "c")


# ---- drawings as another hand draws them


def drawings(n=64, size=32):
    x = torch.zeros(n, 1, size, size)
    x[:, :, 11:21, 14:18] = 1  # an upright bar in the middle
    return x


def test_drawings_drawn_anew_keep_shape_range_and_about_their_ink():
    x = drawings()
    out = drawn_anew(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6
    moved = (out - x).abs().mean((1, 2, 3)) / x.mean((1, 2, 3))
    assert moved.min() > 0.02  # all of them,
    assert 0.1 < moved.mean() < 1.5  # and not out of sight
    share = out.sum((1, 2, 3)) / x.sum((1, 2, 3))
    assert share.mean() == pytest.approx(1, abs=0.1)
    assert share.min() > 0.6
    assert share.max() < 1.6
    assert len({tuple(image.flatten().tolist()) for image in out}) == len(x)  # each its own way
    assert not drawn_anew(torch.zeros(3, 1, 16, 16)).any()
    colour = torch.rand(4, 3, 16, 16)[:, :1].expand(-1, 3, -1, -1)
    turned = drawn_anew(colour)
    assert torch.equal(turned[:, 0], turned[:, 2])  # all channels alike


def test_drawings_are_moved_by_no_more_than_said():
    size = 64
    place = torch.arange(size) - (size - 1) / 2
    dot = torch.zeros(2000, 1, size, size)
    dot[:, :, 31:33, 31:33] = 1
    out = drawn_anew(dot)[:, 0]
    ink = out.sum((1, 2))
    for axis in (1, 2):
        moved = (out.sum(3 - axis) * place).sum(1) / ink / size
        assert moved.abs().max() < 0.06 * 1.4  # the slant and stretch act on the shift as well
        assert moved.std() == pytest.approx(0.06 / 3**0.5, rel=0.2)
    bar = torch.zeros(2000, 1, size, size)
    bar[:, :, 12:52, 31:33] = 1
    out = drawn_anew(bar)[:, 0]
    rows = (out * place).sum(2) / out.sum(2).clamp_min(1e-6)  # where the bar is in each row
    tilt = torch.atan((rows[:, 40] - rows[:, 24]) / 16).rad2deg()
    assert tilt.abs().max() < 35
    assert 5 < tilt.std() < 15


def test_drawings_follow_the_global_seed():
    x = drawings(8)
    torch.manual_seed(5)
    first = drawn_anew(x)
    assert not torch.equal(first, drawn_anew(x))
    torch.manual_seed(5)
    assert torch.equal(first, drawn_anew(x))


@broken("the grid is float32 on the CPU whatever the drawings are; crop_and_flip takes any")
def test_drawings_of_another_dtype_are_drawn_anew_too():
    assert drawn_anew(drawings(2).double()).dtype == DOUBLE


# ---- the commands

KINDS = ("disc", "ring", "bar", "cross")


def shape(kind, numbers):
    """A drawing on paper, dark on white."""
    image = Image.new("L", (40, 40), 255)
    pen = ImageDraw.Draw(image)
    x, y = (20 + numbers.integers(-3, 4, 2)).tolist()
    if kind == "disc":
        pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill=0)
    elif kind == "ring":
        pen.ellipse((x - 12, y - 12, x + 12, y + 12), outline=0, width=3)
    elif kind == "bar":
        pen.line((x - 14, y, x + 14, y), fill=0, width=4)
    else:
        pen.line((x - 12, y - 12, x + 12, y + 12), fill=0, width=3)
        pen.line((x - 12, y + 12, x + 12, y - 12), fill=0, width=3)
    return image


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """A folder with drawings/, controller.safetensors, and prototypes.safetensors."""
    folder = tmp_path_factory.mktemp("studio")
    numbers = np.random.default_rng(0)
    for part in ("train", "validation", "test"):
        for kind in KINDS:
            (folder / "drawings" / part / kind).mkdir(parents=True)
            for k in range(16):
                shape(kind, numbers).save(folder / "drawings" / part / kind / f"{k:02d}.png")
    program = Path(sys.executable).with_name("evenkeel")
    for objective, name in (("softabs", "controller"), ("prototypes", "prototypes")):
        done = subprocess.run(
            [program, "fewshot", "train", "--out", f"{name}.safetensors", *TINY, "--objective",
             objective],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (folder / f"{name}.out").write_text(done.stdout)
    return folder


TINY = (
    "--data", "drawings", "--ways", "4", "--shots", "2", "--queries", "2", "--episodes", "20",
    "--every", "10", "--channels", "8", "--dim", "64",
)  # fmt: skip


@pytest.fixture
def here(studio, tmp_path, monkeypatch):
    """A working folder with what is in the studio."""
    monkeypatch.chdir(tmp_path)
    for entry in studio.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Exit code and what came on the two streams; work is done in threads, which start at once."""

    def run(*arguments, threads=True):
        monkeypatch.setattr(sys, "argv", ["evenkeel", "fewshot", *map(str, arguments)])
        if threads:
            monkeypatch.setattr(
                fewshot_measure, "local_processes", lambda workers, _: ThreadPoolExecutor(workers)
            )
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return run


ASK = ("test", "controller.safetensors", "--data", "drawings", "--out", "o", "--task", "3x1",
       "--episodes", "10", "--workers", "1")  # fmt: skip


def test_a_controller_is_trained_and_kept_in_half_precision(studio):
    file = studio / "controller.safetensors"
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    encoder = ek.load(file)
    assert not encoder.training
    assert encoder(torch.rand(2, 1, 32, 32)).shape == (2, 64)
    log = json.loads((studio / "controller.json").read_text())
    assert log["command"].startswith("evenkeel fewshot train --out controller.safetensors")
    assert log["settings"]["channels"] == 8
    assert log["settings"]["turned"] is True
    assert [v["episode"] for v in log["validations"]] == [10, 20]
    assert log["parameters"] == sum(p.numel() for p in encoder.parameters())
    about = ek.saving.describe(file)["about"]
    best = max(v["validation"] for v in log["validations"])
    assert about["validation"] == best > 60  # of four classes
    assert about["objective"] == "softabs"
    said = (studio / "controller.out").read_text()
    assert f"{best:.2f} %" in said
    assert "episode 10: loss" in said
    assert not list(studio.glob("*.checkpoint"))


@QUIET
def test_the_command_killed_goes_on(here, command, monkeypatch):
    from evenkeel.train import episodes

    step = episodes._loss
    calls = []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 15:
            raise KillError
        return step(*arguments)

    monkeypatch.setattr(episodes, "_loss", dying)
    with pytest.raises(KillError):
        command("train", "--out", "again.safetensors", *TINY)
    assert Path("again.checkpoint").exists()
    assert not Path("again.safetensors").exists()
    code, _, err = command("train", "--out", "again.safetensors", *TINY, "--seed", 1)
    assert code == 2
    assert "checkpoint of another run" in err
    code, _, _ = command("train", "--out", "again.safetensors", *TINY)
    assert code == 0
    assert len(calls) == 25  # of the 15 the first 10 were kept
    again, first = (load_file(f"{name}.safetensors") for name in ("again", "controller"))
    assert same(again, first)
    validations = [
        [v["loss"] for v in json.loads(Path(f"{name}.json").read_text())["validations"]]
        for name in ("again", "controller")
    ]
    assert validations[0] == validations[1]
    assert not Path("again.checkpoint").exists()


def test_a_test_answers_for_codes_devices_and_ages(here, command):
    code, out, err = command(*ASK, "--json", "f.json")
    assert (code, err) == (0, "")
    facts = json.loads(Path("f.json").read_text())
    assert facts["classes"] == 4
    assert facts["controller"]["objective"] == "softabs"
    assert facts["command"].startswith("evenkeel fewshot test controller.safetensors")
    met = [(r["code"], r["device"], r["age_s"]) for r in facts["rows"]]
    devices = [(None, 0.0), *((f"Spread({s})", 0.0) for s in (0.2, 0.4, 0.6, 0.8, 1.0)),
               *(("PCM", age) for age in (0.0, 3600.0, 86400.0))]  # fmt: skip
    assert len(met) == len(set(met))
    assert set(met) == {(c, *device) for c in CODES for device in devices}
    assert {r["task"] for r in facts["rows"]} == {"3-way 1-shot"}
    software = next(r for r in facts["rows"] if r["code"] == "real" and r["device"] is None)
    assert software["accuracy"] > 60  # of three classes
    told = f"{software['accuracy']:.2f} ± {software['half_width']:.2f}"
    assert told in " ".join(out.split())
    for picture in ("spread.svg", "episode.svg"):
        text = Path("o", picture).read_text()
        assert text.startswith("<svg")
        assert f"o/{picture}" in out
    assert Path("o/episode.svg").read_text().count("<image") == 3 + 3
    for word in ("bipolar", "complement", "3-way 1-shot"):
        assert word in Path("o/spread.svg").read_text()


def test_vectors_are_computed_once_and_are_those_of_the_controller(here, command):
    quick = (*ASK, "--device", "spread:0.2", "--code", "bipolar", "--json", "f.json")
    assert command(*quick)[0] == 0
    (file,) = Path("o").glob("vectors-*.safetensors")
    os.utime(file, (1, 1))
    first = json.loads(Path("f.json").read_text())["rows"]
    assert command(*quick)[0] == 0
    assert file.stat().st_mtime == 1
    assert json.loads(Path("f.json").read_text())["rows"] == first
    stored = load_file(file)
    images = labelled_folder("drawings/test", size=32, invert=True)
    encoder = ek.load("controller.safetensors")
    torch.testing.assert_close(stored["vectors"], embed(encoder, images.images))
    assert torch.equal(stored["labels"], images.labels)
    assert not Path("o/spread.svg").exists()  # of one level there is no curve
    code, _, _ = command("test", "prototypes.safetensors", *quick[2:])
    assert code == 0
    assert len(list(Path("o").glob("vectors-*.safetensors"))) == 2  # another's are others


def test_a_controller_of_prototypes_adds_a_column(here, command):
    code, out, _ = command(
        *ASK[:6], "--task", "3x1", "4x2", *ASK[8:], "--code", "real", "--device", "pcm", "--age",
        "0", "--prototypes", "prototypes.safetensors", "--json", "f.json",
    )  # fmt: skip
    assert code == 0
    rows = json.loads(Path("f.json").read_text())["rows"]
    assert [(r["task"], r["code"], r["device"]) for r in rows if r["code"] != "real"] == [
        ("3-way 1-shot", "prototypes", None),
        ("4-way 2-shot", "prototypes", None),
    ]
    assert out.count("prototypes") == 2
    images = labelled_folder("drawings/test", size=32, invert=True)
    x = embed(ek.load("prototypes.safetensors"), images.images)
    sampler = EpisodeSampler(images.labels, 3, 1, 15, episodes=10)
    expected = 100 * accuracies(x, sampler, by_prototypes).mean()
    assert next(r for r in rows if r["code"] == "prototypes")["accuracy"] == pytest.approx(
        expected.item()
    )


def test_processes_of_their_own_say_the_same(here, command, tmp_path):
    quick = [*ASK, "--device", "spread:0.5", "--json"]
    assert command(*quick, "threads.json")[0] == 0
    done = subprocess.run(
        [Path(sys.executable).with_name("evenkeel"), "fewshot", *quick, "processes.json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    threads, processes = (
        json.loads(Path(f"{name}.json").read_text())["rows"] for name in ("threads", "processes")
    )
    assert threads == processes


def instead(name, value, arguments):
    """The arguments with another value of one option."""
    arguments = list(arguments)
    if name not in arguments:
        return [*arguments, name, value]
    arguments[arguments.index(name) + 1] = value
    return arguments


TRACEBACK = broken("a traceback instead of a sentence")
BAD_TEST = [
    ("--code", "bipolr", "Did you mean 'bipolar'"),
    ("--task", "20", "A task is ways x shots"),
    ("--task", "3x0", "shots must be 1 or more"),
    ("--task", "9x1", "An episode of 9 ways"),
    ("--task", "3x16", "16 shots and 1 queries"),
    ("--device", "pmc", "Did you mean 'pcm'"),
    ("--device", "spread:-1", "not negative"),
    ("--age", "soon", "An age is"),
    ("--data", "nowhere", "nowhere/test is no folder"),
    ("--data", "omniglot", "--data-root"),
    ("--split", "vinyls", "vinyals"),
    ("--workers", "-1", "workers must be 0"),
    ("--prototypes", "none.safetensors", "No file none.safetensors"),
    ("--out", "/proc/o", "Cannot write into"),
    pytest.param("--task", "0x1", "ways must be 1 or more", marks=TRACEBACK),
    pytest.param("--episodes", "0", "episodes must be 1 or more", marks=TRACEBACK),
    pytest.param("--data", "colour", "channel", marks=TRACEBACK),
]


@pytest.mark.parametrize(("option", "value", "says"), BAD_TEST)
def test_a_test_that_cannot_be_is_refused_in_a_line(
    option, value, says, here, command, monkeypatch
):
    monkeypatch.delenv("EVENKEEL_DATA", raising=False)
    for kind in KINDS:
        for k in range(4):
            draw(Path("colour", "test", kind, f"{k}.png"), np.full((32, 32, 3), [k, 9, 99]))
    code, out, err = command(*instead(option, value, ASK))
    said = " ".join((out + err).split())
    assert code == 2
    assert says in said
    assert "Traceback" not in said


def test_a_controller_that_is_none_is_refused(here, command):
    Path("bomb.safetensors").write_bytes(b"\x80\x04")
    save_file({"x": torch.zeros(3)}, "bare.safetensors")
    for name, says in (("bomb", "is a pickle"), ("bare", "not the code"), ("none", "No file")):
        code, _, err = command("test", f"{name}.safetensors", *ASK[2:])
        assert code == 2
        assert err.startswith("error: ")
        assert len(err.strip().splitlines()) == 1
        assert says in err


@broken("0 is allowed and said to run in this process, and loky refuses it with a traceback")
def test_no_workers_means_in_this_process(here, command):
    assert command(*instead("--workers", "0", ASK), threads=False)[0] == 0


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("spread:0.2 spread:0.4", marks=broken("the chart refuses NaN: a traceback")),
        pytest.param("pcm", marks=broken("the interval of one episode is NaN, which is no JSON")),
    ],
)
def test_one_episode_has_no_interval_and_the_rest_is_written(device, here, command):
    def refuse(text):
        raise AssertionError(text)

    arguments = (*instead("--episodes", "1", ASK), "--json", "f.json", "--code", "real")
    assert command(*arguments, "--device", *device.split())[0] == 0
    json.loads(Path("f.json").read_text(), parse_constant=refuse)


BAD_TRAIN = [
    ("--objective", "sofabs", "Did you mean 'softabs'"),
    ("--ways", "17", "An episode of 17 ways"),
    ("--shots", "16", "16 shots and 2 queries"),
    ("--queries", "0", "queries must be 1 or more"),
    ("--data", "nowhere", "nowhere/train is no folder"),
    ("--out", "/proc/o/c.safetensors", "Cannot write into"),
    ("--out", "prototypes.out/c.safetensors", "Cannot write into"),
    ("--dim", "many", "many"),
    pytest.param("--every", "0", "every must be 1 or more", marks=TRACEBACK),
    pytest.param("--episodes", "0", "episodes must be 1 or more", marks=TRACEBACK),
    pytest.param("--learning-rate", "-1", "learning", marks=TRACEBACK),
    pytest.param("--dim", "-3", "dim must be 1 or more", marks=TRACEBACK),
    pytest.param("--channels", "0", "channels must be 1 or more", marks=TRACEBACK),
    pytest.param("--precision", "33", "32-true", marks=TRACEBACK),
]


@QUIET
@pytest.mark.parametrize(("option", "value", "says"), BAD_TRAIN)
def test_a_training_that_cannot_be_is_refused_in_a_line(option, value, says, here, command):
    arguments = ("train", "--out", "c.safetensors", *TINY)
    code, out, err = command(*instead(option, value, arguments))
    said = " ".join((out + err).split())
    assert code == 2
    assert says in said
    assert "Traceback" not in said


@QUIET
@broken("the log has the name of the controller with .json, and is written over it")
def test_a_controller_is_not_overwritten_by_its_log(here, command):
    code, _, _ = command("train", "--out", "c.json", *TINY)
    assert code == 2 or ek.load("c.json")


@QUIET
@broken("that the controller cannot be written there is found after all episodes")
def test_a_folder_as_the_controllers_file_is_refused_at_once(here, command):
    Path("folder").mkdir()
    code, _, err = command("train", "--out", "folder", *TINY)
    assert code == 2
    assert not Path("folder.json").exists(), err
