"""``ek.calibrate_`` on networks that IBM's aihwkit simulates, with no line of code about aihwkit.

aihwkit is no dependency of evenkeel: ``make test-aihwkit`` builds an environment of its own for
these tests. They use its pure-torch tile, the one part of the 1.1.0 wheel that runs on today's
torch. The table of accuracies is printed after the run.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from aihwkit.inference import GlobalDriftCompensation, PCMLikeNoiseModel
from aihwkit.inference.calibration import InputRangeCalibrationType, calibrate_input_ranges
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import evenkeel as ek
from evenkeel import data, models, train

DAY_S, YEAR_S = 86_400.0, 365 * 86_400.0


@dataclass(frozen=True)
class Case:
    """A chip: its converters, whether aihwkit compensates its drift, and its age."""

    fixed_ranges: bool
    compensated: bool
    age_s: float

    def __str__(self) -> str:
        ranges = "fixed ranges" if self.fixed_ranges else "aihwkit's defaults"
        drift = "compensated" if self.compensated else "uncompensated"
        return f"{ranges}, {drift}, {'1 day' if self.age_s == DAY_S else '1 year'}"


CASES = [Case(f, c, age) for f in (True, False) for c in (False, True) for age in (DAY_S, YEAR_S)]


@dataclass(frozen=True)
class Outcome:
    """All that is measured of one case; accuracies in percent."""

    case: Case
    digital: float
    raw: float
    calibrated: float
    updated: float  # by torch's update_bn instead
    certificate: ek.Calibration
    changed: set[str]
    changed_after_undo: set[str]
    same_after_undo: bool
    modes_seen: set[bool]
    stem_gain: float  # what update_bn misses in the first normalizer's input
    stem_alpha: float


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The order of sums, and with it the trained network, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> data.Data:
    """Real digits of scikit-learn."""
    return data.digits()


@pytest.fixture(scope="module")
def digital(digits: data.Data) -> nn.Module:
    """The trained network, before any conversion."""
    assert digits.train is not None
    return train.fit(lambda: models.build("resnet8_digits"), *digits.train)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[Outcome]]:
    """Collects outcomes and prints them when all tests have run: figures are the point here."""
    rows: list[Outcome] = []
    yield rows
    plugin = request.config.pluginmanager.get_plugin
    with plugin("capturemanager").global_and_fixture_disabled():
        write = plugin("terminalreporter").write_line
        write(f"\n\n{'accuracy in %':<46}digital    raw  calibrated  update_bn")
        for r in rows:
            write(
                f"{r.case!s:<46}{r.digital:7.1f}{r.raw:7.1f}{r.calibrated:12.1f}{r.updated:11.1f}"
            )


@pytest.fixture(scope="module", params=CASES, ids=str)
def outcome(
    request: pytest.FixtureRequest, digits: data.Data, digital: nn.Module, table: list[Outcome]
) -> Outcome:
    """One chip, drifted, calibrated, put back, and given to update_bn."""
    table.append(measure(request.param, digits, digital))
    return table[-1]


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """For aihwkit's torch tile draws from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_chip(case: Case, digits: data.Data, digital: nn.Module, seed: int = 0) -> nn.Module:
    """Converted, programmed and drifted as aihwkit's users do it."""
    with seeded(seed):
        chip = convert_to_analog(digital, make_config(case)).eval()
        if case.fixed_ranges:
            inputs = iter([(batch, {}) for batch in digits.calibration])
            calibrate_input_ranges(chip, InputRangeCalibrationType.CACHE_QUANTILE, inputs)
        chip.program_analog_weights()
        chip.drift_analog_weights(case.age_s)
    return chip


def make_config(case: Case) -> TorchInferenceRPUConfig:
    """Defaults, or as much of aihwkit's hardware-aware training preset as this tile supports."""
    config = TorchInferenceRPUConfig()
    config.noise_model = PCMLikeNoiseModel(g_max=25.0)
    config.drift_compensation = GlobalDriftCompensation() if case.compensated else None
    if case.fixed_ranges:
        config.mapping.weight_scaling_omega = 1.0  # weights use all of the conductances' range
        config.pre_post.input_range.enable = True
        forward = config.forward
        forward.inp_res = forward.out_res = 1 / 254
        forward.out_bound, forward.out_noise = 10.0, 0.04
        forward.noise_management = NoiseManagementType.NONE
        forward.bound_management = BoundManagementType.NONE
    return config


def measure(case: Case, digits: data.Data, digital: nn.Module, seed: int = 0) -> Outcome:
    """The whole sequence; one chip for all of it, as nothing but statistics may change."""
    chip = make_chip(case, digits, digital, seed)
    clean, raw = outputs(digital, digits), outputs(chip, digits)
    before = snapshot(chip)
    with seeded(seed), modes_of_calls(chip) as modes:
        certificate = ek.calibrate_(chip, digits.calibration)
    after, calibrated = snapshot(chip), outputs(chip, digits)
    norm = chip.stem[1]
    deviation = norm.running_var.sqrt()
    certificate.undo()
    undone, again = snapshot(chip), outputs(chip, digits)
    with seeded(seed):
        update_bn(digits.calibration, chip)
    return Outcome(
        case=case,
        digital=accuracy(clean, digits),
        raw=accuracy(raw, digits),
        calibrated=accuracy(calibrated, digits),
        updated=accuracy(outputs(chip.eval(), digits), digits),
        certificate=certificate,
        changed=differences(before, after),
        changed_after_undo=differences(before, undone),
        same_after_undo=torch.equal(raw, again),
        modes_seen=modes,
        stem_gain=float((deviation / norm.running_var.sqrt()).median()),
        stem_alpha=float(next(chip.analog_tiles()).alpha),
    )


@torch.no_grad()
def outputs(model: nn.Module, digits: data.Data) -> Tensor:
    """Logits of all test images; read noise is the same at every call."""
    with seeded(1):
        return torch.cat([model(images) for images, _ in digits.test])


def accuracy(logits: Tensor, digits: data.Data) -> float:
    """Percent."""
    labels = torch.cat([labels for _, labels in digits.test])
    return 100 * float((logits.argmax(1) == labels).double().mean())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every submodule, to the bit, with the modes and hooks.

    aihwkit keeps the programmed weights, drift exponents and baseline in plain attributes, which
    are not in a ``state_dict``.
    """
    return {
        f"{path}.{name}": frozen(value)
        for path, module in model.named_modules()
        for name, value in (vars(module) | module._parameters | module._buffers).items()
        if name not in ("_parameters", "_buffers", "_modules")
    }


def frozen(value: Any) -> Any:
    """Something that later changes do not reach and that can be compared."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    return repr(value)


def differences(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Names of what is not the same."""
    return {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}


@contextlib.contextmanager
def modes_of_calls(model: nn.Module) -> Iterator[set[bool]]:
    """The training flags that submodules have whenever one of them is called."""
    seen: set[bool] = set()
    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            look = module.register_forward_pre_hook(lambda m, args: seen.add(m.training))
            hooks.callback(look.remove)
        yield seen


def test_all_weight_layers_were_converted(digits: data.Data, digital: nn.Module) -> None:
    """A network that had stayed digital would make everything below trivial."""
    chip = make_chip(CASES[0], digits, digital)
    weights = [m for m in digital.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(list(chip.analog_tiles())) == len(weights) == 10


def test_calibration_recovers_what_drift_has_cost(outcome: Outcome) -> None:
    """Nearly all of a loss of over 20 points; where drift was compensated already, no harm."""
    lost = outcome.digital - outcome.raw
    regained = outcome.calibrated - outcome.raw
    assert outcome.certificate.kept
    if not outcome.case.compensated:
        assert lost > 20
    if lost > 20:
        assert regained > 0.9 * lost
    assert regained > -1.5  # three standard errors of 98.5 % on 600 images


def test_nothing_but_statistics_changes(outcome: Outcome) -> None:
    """Arrays, input ranges, compensation, modes and hooks are as they were, to the bit."""
    normalizers = outcome.certificate.shift_before
    statistics = {f"{path}.running_{name}" for path in normalizers for name in ("mean", "var")}
    assert len(normalizers) == 9
    assert outcome.changed == statistics


def test_the_chip_stays_in_eval_mode(outcome: Outcome) -> None:
    """In train mode aihwkit leaves drift compensation out and may move its input ranges."""
    assert outcome.modes_seen == {False}


def test_undo_restores_every_bit(outcome: Outcome) -> None:
    """Statistics as well as outputs."""
    assert outcome.changed_after_undo == set()
    assert outcome.same_after_undo


def test_update_bn_measures_another_chip(outcome: Outcome) -> None:
    """It runs the network in train mode, so its statistics lack aihwkit's compensation factor.

    Without compensation there is nothing to miss, and it does as well as calibrate_.
    """
    if not outcome.case.compensated:
        assert outcome.updated == pytest.approx(outcome.calibrated, abs=3)
        return
    assert outcome.stem_alpha > 1.2
    assert outcome.stem_gain == pytest.approx(outcome.stem_alpha, rel=0.02)
    assert outcome.updated < outcome.calibrated - 3
    if outcome.case.fixed_ranges:  # compensation had worked: worse than no calibration at all
        assert outcome.updated < outcome.raw - 10


def test_update_bn_moves_input_ranges_that_were_not_calibrated(
    digits: data.Data, digital: nn.Module
) -> None:
    """In train mode aihwkit fits them to what it sees; calibrate_ leaves the converters alone."""
    config = make_config(Case(fixed_ranges=True, compensated=True, age_s=DAY_S))
    chip = convert_to_analog(digital, config).eval()
    chip.program_analog_weights()

    def ranges() -> list[float]:
        return [tile.input_range.item() for tile in chip.analog_tiles()]

    initial = ranges()
    ek.calibrate_(chip, digits.calibration)
    assert ranges() == initial
    update_bn(digits.calibration, chip)
    assert all(now != was for now, was in zip(ranges(), initial, strict=True))
