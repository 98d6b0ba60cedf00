"""The detector of spikes against numpy, and spikes that are reported in real training runs."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.paths import TESTS
from support.runs import read_scalars
from support.training import Run, TrainingOutcome
from support.training_runs import DISTRIBUTED, EXPERT_2, PIPELINE_2

from maskmoe.checkpoint.reading import read_common_state
from maskmoe.checkpoint.series import checkpoint_path
from maskmoe.training.watch.spikes import SpikeDetector

VALUES = st.floats(-1e6, 1e6)
POSITIVE = st.floats(1e-3, 1e3)


def robust_deviations(before: list[float], value: float) -> float:
    """Compute the distance of a value from earlier values as the help of --spike-deviations defines it."""
    middle = np.median(before)
    spread = 1.4826 * np.median(np.abs(np.array(before) - middle))
    return float((value - middle) / max(spread, 0.005 * abs(middle), 1e-6))


@given(st.lists(st.tuples(VALUES, POSITIVE), min_size=1, max_size=60), st.floats(1, 20), st.integers(2, 30))
def test_detector_agrees_with_numpy(steps, limit, size):
    detector, columns = SpikeDetector(size, limit), ([], [])
    for step in steps:
        found = {deviation.name: deviation.deviations for deviation in detector.judge(*step)}
        for name, value, column in zip(SpikeDetector.NAMES, step, columns, strict=True):
            before = column[-size:]
            expected = robust_deviations(before, value) if len(before) >= max(2, size // 2) else 0.0
            if abs(abs(expected) - limit) > 1e-9 * limit:
                assert (name in found) == (abs(expected) > limit)
            assert found.get(name, expected) == pytest.approx(expected, rel=1e-9, abs=1e-9)
            column.append(value)


@given(st.floats(-1e3, 1e3), st.integers(2, 200))
def test_flat_curve_is_not_off(level, size):
    detector = SpikeDetector(size, 1.0)
    assert not any(detector.judge(level, abs(level)) for _ in range(2 * size))
    noise = 0.004 * abs(level)
    assert not detector.judge(level + noise, abs(level) + noise)


def test_normal_noise_on_a_falling_curve_is_not_off():
    generator = np.random.default_rng(0)
    detector = SpikeDetector(128, 15)
    for step in range(5000):
        loss = 2 + 9 * math.exp(-step / 300) + 0.03 * generator.standard_normal()
        assert not detector.judge(loss, 0.3 * math.exp(0.2 * generator.standard_normal()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_off_and_not_kept(value):
    detector = SpikeDetector(4, 15)
    (found,) = detector.judge(value, 1.0)
    assert found.name == "loss"
    assert found.deviations == math.inf
    assert str(found) == f"loss {value}"
    assert detector.history == {"loss": [], "gradient norm": [1.0]}


@given(st.lists(st.tuples(POSITIVE, POSITIVE), max_size=40), st.integers(0, 40))
def test_detector_continues_from_its_history(steps, cut):
    uninterrupted = SpikeDetector(8, 3)
    judged = [uninterrupted.judge(*step) for step in steps]
    first = SpikeDetector(8, 3)
    for step in steps[:cut]:
        first.judge(*step)
    second = SpikeDetector(8, 3)
    second.load(first.history)
    assert [second.judge(*step) for step in steps[cut:]] == judged[cut:]


def test_missing_gradient_norm_is_not_judged():
    detector = SpikeDetector(4, 15)
    for _ in range(4):
        assert not detector.judge(1, None)
    assert detector.history["gradient norm"] == []


# In training

SPIKE = (str(TESTS / "training" / "pretrain_with_spike.py"),)
WINDOW = "--spike-window 8"
TAGS = ("spike/loss", "spike/grad-norm")

StartSpiky = Callable[..., TrainingOutcome]


@pytest.fixture
def run_spiky(workplace, tmp_path) -> StartSpiky:
    """Run with spikes to the end. All starts of one test use one folder of checkpoints."""

    def run_spiky(flags: str, spikes: str, name: str = "run", ranks: int = 2) -> TrainingOutcome:
        folders = f"--save {tmp_path}/save --load {tmp_path}/save"
        run = Run(f"{WINDOW} {folders} {flags}", program=SPIKE, ranks=ranks)
        with workplace.start(run, tmp_path / name, environment={"SPIKES": spikes}) as processes:
            return processes.wait(all_end=True)

    return run_spiky


def warnings_of(outcome: TrainingOutcome) -> list[str]:
    """Return the lines on the console that begin with a warning of a step."""
    return re.findall(r"^(?:\[rank\d\]: ?)?warning: (iteration .* is off.*)$", outcome.output, re.MULTILINE)


def test_report(run_spiky, tmp_path):
    """One step is off. The last rank reports the step, once, and the checkpoint holds the steps that it has seen."""
    outcome = run_spiky(f"{EXPERT_2} {DISTRIBUTED} --exit-interval 14", "12")
    assert outcome.exit_codes == (0, 0), outcome.report()
    (line,) = warnings_of(outcome)
    assert re.fullmatch(
        r"iteration 12 is off: loss [\d.]+, [\d.]+ robust deviations above the median [\d.]+; "
        r"gradient norm [\d.]+, [\d.]+ robust deviations above the median [\d.]+",
        line,
    ), line
    scalars = read_scalars(outcome.folder)
    assert {tag: [event.step for event in scalars[tag]] for tag in TAGS} == {tag: [12] for tag in TAGS}
    history = read_common_state(checkpoint_path(tmp_path / "save", 14))["callbacks"]["SpikeWatch"]["history"]
    for name, scalar in (("loss", "lm loss"), ("gradient norm", "grad-norm")):
        assert history[name] == pytest.approx([*outcome.curves[scalar].values()][-8:], rel=1e-6)


@pytest.mark.slow
def test_watch_does_not_change_the_training(run_spiky, tmp_path):
    unwatched = run_spiky(f"{EXPERT_2} --spike-action none --save-interval 99", "12")
    assert warnings_of(unwatched) == []
    watched = run_spiky(
        f"{EXPERT_2} --save {tmp_path}/other --load {tmp_path}/other --save-interval 99", "12", "watched"
    )
    assert len(warnings_of(watched)) == 1
    assert watched.difference(unwatched) == 0


@pytest.mark.slow
def test_resumed_run_knows_the_steps_before(run_spiky):
    """Two steps after the checkpoint are too few for a judgement."""
    first = run_spiky(f"{PIPELINE_2} --exit-interval 10", "12", name="first")
    assert first.exit_codes == (0, 0), first.report()
    assert warnings_of(first) == []
    resumed = run_spiky(EXPERT_2, "12", name="resumed")
    assert resumed.iterations == list(range(11, 22))
    assert len(warnings_of(resumed)) == 1
