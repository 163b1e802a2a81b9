"""The memory on a crossbar, the moments of its reads, its converter, and devices that scatter."""

import copy
import io
import math

import pytest
import torch

from evenkeel.analog import PCM, Converter, Device, DeviceModel, Spread, StuckAt
from evenkeel.analog.reads import read_moments
from evenkeel.audit.names import resolve
from evenkeel.draws import Draws
from evenkeel.errors import ConfigError, ShapeError
from evenkeel.memory import CODES, CrossbarMemory, KeyValueMemory

DOUBLE = torch.float64
HOUR, DAY = 3600.0, 86_400.0
D = 64
EXACT, STILL = Spread(0.0), PCM(reading=0.0)


def vectors(*shape):
    return torch.randn(*shape, D)


def crossbar(device=EXACT, n=0, *, dim=D, seed=0, **options):
    memory = CrossbarMemory(dim, device, seed=seed, **{"code": "bipolar"} | options)
    if n:
        memory.write(torch.randn(n, dim), [f"class {i % 3}" for i in range(n)])
    return memory


def alike(one, other):
    mine, theirs = (dict(m.named_buffers()) for m in (one, other))
    same = all(torch.equal(value, theirs[name]) for name, value in mine.items())
    return same and mine.keys() == theirs.keys() and one.classes == other.classes


def near(one, other, size=2e-6):
    torch.testing.assert_close(one, other, atol=size, rtol=size)


# ---- what a read gives


def test_read_moments_are_those_of_draws():
    ratio = torch.tensor([-2.0, -1, -0.3, 0, 0.3, 1, 2, 5], dtype=DOUBLE)[:, None]
    g, std, n = 3 * ratio, torch.full_like(ratio, 3.0), 400_000
    draws = (g + std * torch.randn(8, n, dtype=DOUBLE)).clamp_min(0)
    mean, variance = (m.flatten() for m in read_moments(g, std))
    away = draws - draws.mean(1, keepdim=True)
    second, fourth = away.square().mean(1), away.pow(4).mean(1)
    assert ((mean - draws.mean(1)).abs() < 5 * (second / n).sqrt()).all()
    assert ((variance - second).abs() < 5 * ((fourth - second.square()) / n).sqrt()).all()


def test_read_moments_at_their_limits():
    g = torch.tensor([2.0, 0.0, -1.0, 50.0, -50.0, 0.0, math.inf])
    mean, variance = read_moments(g, torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 1.0]))
    half = 2 / math.sqrt(2 * math.pi)
    torch.testing.assert_close(mean, torch.tensor([2.0, 0, 0, 50, 0, half, math.inf]))
    torch.testing.assert_close(variance, torch.tensor([0.0, 0, 0, 1, 0, 2 - half**2, 1]))
    ends = torch.tensor([-1e18, -1e-30, 0.0, 1e-40, 1e-30, 1.0, 1e18])
    for dtype in (torch.float32, DOUBLE):
        grid = torch.meshgrid(ends.to(dtype), ends[2:].to(dtype), indexing="ij")
        assert all(m.isfinite().all() for m in read_moments(*grid))
    assert [t.shape for t in read_moments(torch.zeros(0, 3), torch.zeros(0, 3))] == [(0, 3)] * 2


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_read_moments_in_float32_are_those_in_float64(size):
    ratio = torch.cat([torch.linspace(-45, 45, 3001), torch.logspace(-6, 6, 500)]).to(DOUBLE)
    g, std = (ratio * size).float(), torch.full((3501,), size)
    kept = g.clone(), std.clone()
    mean, variance = read_moments(g, std)
    assert torch.equal(g, kept[0])
    assert torch.equal(std, kept[1])
    one = read_moments(g.to(DOUBLE) / size, torch.ones(3501, dtype=DOUBLE))
    exact = one[0] * size, one[1] * size**2
    torch.testing.assert_close(mean.to(DOUBLE), exact[0], rtol=1e-6, atol=1e-6 * size)
    torch.testing.assert_close(variance.to(DOUBLE), exact[1], rtol=2e-6, atol=1e-6 * size**2)
    assert (variance >= 0).all()


# ---- converters


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_converter_gives_the_nearest_of_its_levels(bits, signed):
    def convert(x):
        return Converter(bits, 0.5)(x, 8.0, signed=signed)

    x, levels = torch.linspace(-9, 9, 4001, dtype=DOUBLE), 2 ** (bits - signed) - 1
    grid = torch.arange(-levels if signed else 0, levels + 1, dtype=DOUBLE) * (4 / levels)
    torch.testing.assert_close((x - convert(x)).abs(), (x[:, None] - grid).abs().amin(1))
    torch.testing.assert_close(convert(x).unique(), grid)
    torch.testing.assert_close(convert(convert(x)), convert(x))
    inside = x.clamp(0 if not signed else -4, 4)
    near(Converter(24, 0.5)(x, 8.0, signed=signed), inside, 1e-6)


def test_converters_that_cannot_be():
    for bits in (1, 0, -3, 2.0, True, "8", None):
        with pytest.raises(ConfigError, match="2 to 32 bits"):
            Converter(bits)
    for limit in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="limit must be above 0"):
            Converter(8, limit)


# ---- devices that scatter


def test_spread_scatters_in_proportion():
    n, targets = 200_000, torch.tensor([0.0, 0.1, 1.0])[:, None].expand(3, 200_000)
    written, state = Spread(0.1).write(targets, Draws(0, "a"), 1.0)
    assert state == {}
    assert (written[0] == 0).all()
    for row, target in zip(written[1:], (0.1, 1.0), strict=True):
        assert row.mean().item() == pytest.approx(target, abs=0.5 * target / math.sqrt(n))
        assert row.std().item() == pytest.approx(0.1 * target, rel=0.01)
    wide = Spread(1.5).write(targets, Draws(0, "a"), 1.0)[0]
    assert wide.min() == 0
    lifted = read_moments(torch.tensor(1.0), torch.tensor(1.5))[0].item()
    assert wide[2].mean().item() == pytest.approx(lifted, rel=0.01)


def test_spread_is_its_seeds_and_none_at_level_zero():
    targets = torch.rand(2, 5, 7)
    one, same, other = (Spread(0.3).write(targets, Draws(s, "a"), 1.0)[0] for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(Spread(0.0).write(targets, Draws(0, "a"), 1.0)[0], targets)
    assert resolve("devices", "spread:0.3") == Spread(0.3)
    for level in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="Spread level must be finite and not negative"):
            Spread(level)


# ---- exact devices: the memory that is known


@pytest.mark.parametrize("device", [EXACT, Device(EXACT, scale_per="column", g_max=25.0)])
@pytest.mark.parametrize("prototypes", [False, True])
@pytest.mark.parametrize(("read_out", "measure"), [("sum", "cosine"), ("nearest", "dot")])
@pytest.mark.parametrize("code", CODES)
def test_exact_devices_are_the_software(code, read_out, measure, prototypes, device):
    options = {"read_out": read_out, "measure": measure, "prototypes": prototypes}
    software = KeyValueMemory(D, code=code, **options)
    software.write(vectors(6), [1, "old", 2] * 2)
    chip = software.program(device, seed=0)
    shapes = [(), (4,), (0,), (2, 3), (1, 2, 3)]
    for i, step in enumerate(2 * ["write", "write", "forget", "replace", "age", "write", "forget"]):
        keys, middle = vectors(3), software.classes[len(software.classes) // 2]
        for memory in (software, chip):
            if step == "write":
                memory.write(keys, [i, "old", (i, "x")])
            elif step == "forget" and middle != "old":
                memory.forget(middle)
            elif step == "replace":
                memory.replace("old", keys[:2])
        if step == "age":
            chip.age_(chip.age_s + HOUR)
        queries, like = vectors(*shapes[i % 5]), software.keys[:, :D] + 0.1 * vectors(len(software))
        ours, theirs = (memory.read(queries) for memory in (chip, software))
        for name in ("similarity", "attention", "scores"):
            near(getattr(ours, name), getattr(theirs, name), 1e-5)
        assert ours.classes == theirs.classes
        assert chip.read(like).labels == software.read(like).labels
        assert len(chip.columns) == ours.similarity.shape[-1]


@pytest.mark.parametrize("code", CODES)
def test_devices_of_a_hundred_classes(code):
    memory = crossbar(dim=512, code=code)
    assert memory.devices == 0
    memory.write(torch.randn(500, 512), [i % 100 for i in range(500)])
    assert memory.devices == (256_000 if code == "binary" else 512_000)


# ---- writing


@pytest.mark.parametrize("code", ["complement", "real"])
def test_columns_that_stay_keep_their_noise(code):
    memory, queries = crossbar(STILL, 6, code=code).age_(HOUR), vectors(4)
    first, conductances = memory.read(queries).similarity, memory.columns.programmed
    memory.write(10 * vectors(3), ["class 1", "new", "new"])
    assert torch.equal(memory.columns.programmed[:, :6], conductances)
    near(memory.read(queries).similarity[:, :6], first)
    memory.forget("class 1")
    stay = torch.tensor([0, 2, 3, 5])
    assert torch.equal(memory.columns.programmed[:, :4], conductances[:, stay])
    near(memory.read(queries).similarity[:, :4], first[:, stay])
    assert memory.columns.written_at.tolist() == [0] * 4 + [HOUR] * 2
    before, own = memory.columns.programmed, memory.keys[memory.owners == 0][:, :D]
    memory.replace("class 0", own)
    assert torch.equal(memory.columns.programmed[:, :4], before[:, [1, 3, 4, 5]])
    assert not torch.equal(memory.columns.programmed[:, 4], before[:, 0])
    assert memory.read(2 * own - 1 if code == "complement" else own).labels == ["class 0"] * 2


@pytest.mark.parametrize("code", CODES)
def test_of_prototypes_only_those_that_changed_are_written_anew(code):
    memory = crossbar(Spread(0.3), 9, code=code, prototypes=True).age_(HOUR)
    before = memory.columns.programmed
    memory.write(5 * vectors(2), ["class 1", "new"])
    now = memory.columns.programmed
    assert torch.equal(now[:, [0, 2]], before[:, [0, 2]])
    assert memory.columns.written_at.tolist() == [0, HOUR, 0, HOUR]
    memory.forget("class 0")
    assert torch.equal(memory.columns.programmed, now[:, 1:])
    memory.replace("class 2", vectors(1))
    assert torch.equal(memory.columns.programmed[:, [0, 2]], now[:, [1, 3]])
    assert int(memory.columns.writes) == 3


def test_the_seed_decides_all_and_the_global_generator_nothing():
    keys, made = vectors(6), []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        memory = crossbar(PCM(), seed=seed)
        memory.write(keys[:5], "abcde")
        memory.age_(HOUR).write(keys[5:], "a")
        made.append((memory, memory.compensate_().read(keys).similarity))
        assert torch.equal(torch.get_rng_state(), before)
    assert alike(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])
    columns = [memory.columns.programmed for memory, _ in made]
    assert not torch.equal(columns[0], columns[2])
    assert not torch.equal(made[0][1], made[2][1])


def test_spread_moves_bipolar_similarity_by_sigma_over_the_root_of_d():
    software, query = KeyValueMemory(512, code="bipolar"), torch.randn(1, 512)
    software.write(torch.randn(2000, 512), range(2000))
    chip = software.program(Spread(0.3), seed=0)
    moved = chip.read(query).similarity - software.read(query).similarity
    assert moved.std().item() == pytest.approx(0.3 / math.sqrt(512), rel=0.06)
    assert abs(moved.mean().item()) < 5 * 0.0133 / math.sqrt(2000)
    again = crossbar(Spread(0.3), dim=512)
    for _ in range(2):
        again.write(query, ["the same"])
    one, other = again.read(query).similarity[0].tolist()
    assert one != other


# ---- reading


@pytest.mark.parametrize("code", CODES)
def test_read_noise_is_that_of_reading_every_device(code):
    dim, reads, query = 12, 20_000, torch.randn(12)
    memory = crossbar(PCM(reading=8.0), 3, dim=dim, seed=3, code=code)
    memory.age_(DAY).write(torch.randn(1, dim), "d")
    memory.age_(30 * DAY)
    found = torch.cat([memory.read(query.expand(100, -1)).similarity for _ in range(reads // 100)])

    columns, device = memory.columns, memory.columns.device
    drawn = torch.zeros(reads, *columns.programmed.shape)
    for i, age_s in enumerate([30 * DAY] * 3 + [29 * DAY]):
        programmed, states = columns.programmed[:, i], [{"nu": columns.state_0_nu[:, i]}]
        g = device.drift(programmed, states, age_s)
        std = device.read_std(g, programmed, states, age_s)
        drawn[:, :, i] = (g + std * torch.randn(reads, *g.shape)).clamp_min(0)
    if code == "real":
        expected = (drawn[:, 0] - drawn[:, 1]) @ (query / query.norm()) * columns.unit
    elif code == "bipolar":
        expected = (drawn[:, 0] - drawn[:, 1]) @ query.sign() / (25 * dim)
    else:
        rows = torch.cat([query > 0, query <= 0]) if code == "complement" else query > 0
        expected = 2 * drawn[:, 0] @ rows.float() / (25 * dim) - float(code == "complement")
    bound = 6 * expected.std(0) / math.sqrt(reads)
    assert ((found.mean(0) - expected.mean(0)).abs() < bound).all()
    torch.testing.assert_close(found.var(0), expected.var(0), rtol=0.07, atol=0)
    assert (found.T.corrcoef() - torch.eye(4)).abs().max() < 5 / math.sqrt(reads)


def test_each_read_has_its_noise_and_exact_reads_have_none():
    for device in (PCM(), STILL):
        memory, query = crossbar(device, 6), vectors(1).expand(2, -1)
        first, second = (memory.read(query).similarity for _ in range(2))
        assert torch.equal(first, second) == (device == STILL)
        assert torch.equal(first[0], first[1]) == (device == STILL)
    exact, keys, read = PCM(programming=0.0, drifting=0.0), vectors(2), []
    for seed in (0, 0, 1):
        memory = crossbar(exact, seed=seed)
        memory.write(keys, "ab")
        read.append(memory.read(keys).similarity)
    assert torch.equal(read[0], read[1])
    assert not torch.equal(read[0], read[2])


@pytest.mark.parametrize("code", CODES)
def test_the_converter_digitizes_currents_in_shares_of_the_largest(code):
    keys, read = vectors(60), []
    for converter in (None, Converter(22), Converter(3, 0.47)):
        memory = crossbar(Device(EXACT, g_max=25.0), code=code, converter=converter)
        memory.write(keys[:12], range(12))
        read.append(memory.read(keys).similarity)
    near(read[1], read[0], 2e-5)
    levels, lowest = (3, -3) if code in ("bipolar", "real") else (7, 0)
    largest = {"bipolar": 1, "real": 25 * math.sqrt(D) * memory.columns.unit}.get(code, 2)
    step, constant = 0.47 * largest / levels, float(code == "complement")
    near(read[2], ((read[0] + constant) / step).round().clamp(lowest, levels) * step - constant)


def test_stuck_columns():
    dead = {"bipolar": 0.0, "binary": 0.0, "complement": -1.0, "real": 0.0}
    for code, expected in dead.items():
        memory = crossbar(Device(PCM(), StuckAt(low=1.0)), 6, code=code).age_(DAY)
        reading = memory.compensate_().read(vectors(3))
        assert (reading.similarity == expected).all()
        near(reading.scores, torch.full((3, 3), 1 / 3))
        assert memory.columns.compensation.eq(1).all()
    full = crossbar(Device(STILL, StuckAt(high=1.0)), 6, code="complement").age_(DAY)
    near(full.read(vectors(3)).similarity, torch.ones(3, 6))


# ---- age


def test_the_way_to_an_age_does_not_matter():
    once, queries = crossbar(PCM(), 6), vectors(3)
    twice = copy.deepcopy(once)
    once.age_(DAY)
    twice.age_(HOUR).age_(DAY)
    assert once.age_s == twice.age_s == DAY
    assert torch.equal(once.read(queries).similarity, twice.read(queries).similarity)
    assert alike(once.age_(0).age_(DAY), twice)


def test_a_column_written_later_is_younger():
    keys, queries, read = vectors(2), vectors(3), []
    for when, until in ((0.0, DAY), (HOUR, HOUR + DAY), (HOUR, HOUR), (0.0, HOUR)):
        memory = crossbar(STILL)
        memory.write(keys[:1], ["a"])
        memory.age_(when).write(keys[1:], ["b"])
        read.append(memory.age_(until).read(queries).similarity.T)
    assert torch.equal(read[0][1], read[1][1])
    assert not torch.equal(read[0][0], read[1][0])
    assert torch.equal(read[2][0], read[3][0])
    assert not torch.equal(read[2][1], read[3][1])


def test_ages_that_cannot_be():
    memory = crossbar(STILL, 3).age_(HOUR)
    memory.write(vectors(1), ["late"])
    before = copy.deepcopy(memory)
    for seconds in (HOUR - 1, 0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="finite and not before its last write, at 3600 s"):
            memory.age_(seconds)
    assert alike(memory, before)


def test_compensation_brings_the_complement_code_back():
    memory, keys = crossbar(PCM(), code="complement"), vectors(40)
    memory.write(keys, range(40))
    memory.age_(30 * DAY)
    right = []
    for _ in range(2):
        recalled = memory.read(keys + 0.3 * vectors(40)).labels
        right.append(sum(label == i for i, label in enumerate(recalled)))
        memory.compensate_()
    assert right[0] < 20
    assert right[1] == 40
    memory.write(vectors(1), ["young"])
    assert memory.columns.compensation[:-1].min() > 1.2
    assert memory.columns.compensation[-1] == 1


@pytest.mark.parametrize("code", CODES)
def test_compensation_is_one_where_nothing_has_faded(code):
    memory = crossbar(STILL, 6, code=code)
    assert memory.compensate_().columns.compensation.eq(1).all()
    before = memory.columns.programmed.sum((0, 2))
    memory.age_(DAY).compensate_()
    faded = memory.columns._total[:, 0]
    torch.testing.assert_close(memory.columns.compensation, before / faded)


# ---- a citizen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, DOUBLE])
def test_its_physics_stays_in_float32(dtype):
    memory, queries = crossbar(PCM(), 6).age_(HOUR), vectors(3)
    same = copy.deepcopy(memory).to(dtype)
    assert same.keys.dtype == dtype
    read = []
    for one in (memory, same):
        one.age_(DAY).write(queries[:1].to(one.keys.dtype), ["new"])
        assert one.columns.programmed.dtype == torch.float32
        read.append(one.read(queries.to(one.keys.dtype)).similarity)
    assert torch.equal(*read)
    assert torch.equal(same.columns.programmed, memory.columns.programmed)
    assert same.columns.written_at.tolist() == [0] * 6 + [DAY]


@pytest.mark.parametrize("prototypes", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_what_is_saved_goes_on_as_the_same(code, prototypes):
    options, file = {"code": code, "prototypes": prototypes}, io.BytesIO()
    memory, keys = crossbar(PCM(), 6, **options).age_(HOUR), vectors(3)
    memory.write(keys[:1], ["late"])
    memory.compensate_().read(keys)
    torch.save(memory.state_dict(), file)
    loaded = [crossbar(PCM(), **options), crossbar(PCM(), 9, **options)]
    for one in loaded:
        file.seek(0)
        one.load_state_dict(torch.load(file, weights_only=True))
    read = []
    for one in (memory, copy.deepcopy(memory), *loaded):
        one.read(keys)
        one.write(keys[:2], ["late", "later"])
        read.append(one.age_(DAY).read(keys).scores)
        assert alike(one, memory)
        assert torch.equal(read[-1], read[0])


def test_it_compiles_and_its_noise_is_not_frozen():
    memory, queries = crossbar(PCM(), 6), vectors(3)
    same = copy.deepcopy(memory)
    compiled = torch.compile(lambda q: memory.read(q).scores, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(queries), same.read(queries).scores)


@pytest.mark.parametrize(
    "device",
    [
        EXACT,
        PCM(),
        PCM(programming=0.0),
    ],
)
def test_gradients_reach_queries(device):
    memory, queries = crossbar(device, code="real"), vectors(2)
    memory.write(torch.stack([queries[0], torch.zeros(D)]), "ab")
    queries.requires_grad_()
    memory.read(torch.cat([queries, 0 * queries])).scores[:, 0].sum().backward()
    assert queries.grad.isfinite().all()
    assert queries.grad.abs().max() > 0


def test_it_keeps_no_graph_of_its_keys():
    memory = crossbar(code="real")
    memory.write(2 * vectors(2).requires_grad_(), "ab")
    copy.deepcopy(memory)


@pytest.mark.parametrize(
    "then",
    [
        lambda memory: memory.read(vectors(2)),
        lambda memory: memory.age_(DAY).write(vectors(2), "ad"),
        lambda memory: memory.compensate_(),
        lambda memory: memory.load_state_dict(memory.state_dict()),
        lambda m: m.read(vectors(2).requires_grad_()).scores.sum(),
    ],
)
def test_written_in_inference_mode_it_serves_outside_of_it(then):
    memory = crossbar(code="real")
    with torch.inference_mode():
        memory.write(vectors(3), "abc")
        memory.age_(HOUR).read(vectors(1))
    then(memory)


def test_made_in_inference_mode_it_serves_outside_of_it():
    with torch.inference_mode():
        memory = crossbar(PCM(), 3)
    memory.age_(HOUR).read(vectors(1))


# ---- what fails


class KeepsTotal(DeviceModel):
    name = "KeepsTotal"

    def write(self, g, draws, g_max):
        return g, {"total": g.sum(-1)}


class OneForAll(DeviceModel):
    name = "OneForAll"

    def write(self, g, draws, g_max):
        return g, {"row": g[:, :1]}


@pytest.mark.parametrize("prototypes", [False, True])
@pytest.mark.parametrize("part", ["write", "drift"])
def test_a_device_that_fails_leaves_the_memory_as_it_was(part, prototypes, monkeypatch):
    memory, keys = crossbar(PCM(), 6, prototypes=prototypes).age_(HOUR), vectors(2)
    before = copy.deepcopy(memory)

    def fails(*args):
        raise RuntimeError("no current")

    with monkeypatch.context() as patch:
        patch.setattr(memory.columns.device, part, fails)
        for action in (
            lambda: memory.write(keys, ["class 0", "new"]),
            lambda: memory.replace("class 1", keys),
        ):
            with pytest.raises(RuntimeError, match="no current"):
                action()
            assert alike(memory, before)
    for one in (memory, before):
        one.write(keys, ["new", "newer"])
    assert alike(memory, before)


@pytest.mark.parametrize(
    "model",
    [KeepsTotal(), OneForAll()],
)
def test_a_state_of_another_shape_is_refused(model):
    with pytest.raises(ConfigError, match=rf"{model.name} must keep its state in tensors of the"):
        crossbar(model, 3)


def test_hostile_input_is_refused_and_changes_nothing():
    memory = crossbar(PCM(), 6)
    before = copy.deepcopy(memory)
    for keys in (torch.full((1, D), math.nan), torch.zeros(1, D + 1), torch.zeros(D)):
        for action in (lambda k: memory.write(k, "n"), lambda k: memory.replace("class 1", k)):
            with pytest.raises(ShapeError):
                action(keys)
    for queries in (torch.full((2, D), math.inf), torch.zeros(2, D - 1)):
        with pytest.raises(ShapeError):
            memory.read(queries)
    memory.write(torch.zeros(0, D), [])
    assert alike(memory, before)
    for label in memory.classes[:]:
        memory.forget(label)
    for nothing in (crossbar(PCM()), memory):
        with pytest.raises(ConfigError, match="empty"):
            nothing.read(vectors(1))
        nothing.compensate_().write(vectors(1), ["one"])
        near(nothing.read(vectors(2)).scores, torch.ones(2, 1))


@pytest.mark.parametrize("device", [EXACT, PCM(), Spread(0.3)])
@pytest.mark.parametrize("measure", ["cosine", "dot"])
@pytest.mark.parametrize("code", CODES)
def test_zero_keys_and_zero_queries_are_finite(code, measure, device):
    memory = crossbar(device, code=code, measure=measure)
    memory.write(torch.zeros(2, D), "ab")
    memory.write(torch.cat([vectors(1), torch.zeros(1, D)]), "cd")
    reading = memory.read(torch.cat([vectors(2), torch.zeros(2, D)]))
    assert reading.similarity.isfinite().all()
    near(reading.scores.sum(-1), torch.ones(4))


@pytest.mark.parametrize("memory", [KeyValueMemory(D, prototypes=True), None])
def test_nothing_can_not_take_the_place_of_a_class(memory):
    memory, keys = memory or crossbar(code="real", prototypes=True), vectors(3)
    memory.write(keys, "abc")
    with pytest.raises(ConfigError, match="use forget"):
        memory.replace("a", keys[:0])
    assert memory.read(keys).labels == ["a", "b", "c"]


def half():
    crossbar(code="real", dtype=torch.float16).write(1e6 * vectors(1), "a")


def other_dimensions():
    crossbar().load_state_dict(crossbar(n=3, dim=7).state_dict())


@pytest.mark.parametrize(
    ("action", "error", "says"),
    [
        (half, ShapeError, "finite"),
        (other_dimensions, RuntimeError, "size mismatch"),
        (lambda: Converter(65)(vectors(1), 1.0), ConfigError, "bits"),
    ],
)
def test_what_is_to_be_refused(action, error, says):
    with pytest.raises(error, match=says):
        action()
