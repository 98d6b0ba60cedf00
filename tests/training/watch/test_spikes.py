"""The detector of spikes against numpy, and spikes that are reported or skipped in real training runs."""

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
from support.training_runs import DISTRIBUTED, EXPERT_2, INTERLEAVED, PIPELINE_2, TENSOR_2

from maskmoe.files.run_folder import Kind, read_journal
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
    second = SpikeDetector(8, 3, first.history)
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
    """Run with spikes to the end. All starts of one test that save use one folder, from which they also load."""

    def run_spiky(
        flags: str = "",
        spikes: str = "",
        factor: float = 50,
        name: str = "run",
        saves: bool = False,
        ranks: int = 1,
        without_update: int = 0,
    ) -> TrainingOutcome:
        folders = f"--save {tmp_path}/save --load {tmp_path}/save" if saves else ""
        run = Run(f"{WINDOW} {flags} {folders}", program=SPIKE, ranks=ranks)
        environment = {"SPIKES": spikes, "SPIKE_FACTOR": str(factor), "WITHOUT_UPDATE": str(without_update)}
        with workplace.start(run, tmp_path / name, environment=environment) as processes:
            return processes.wait(all_end=True)

    return run_spiky


def warnings_of(outcome: TrainingOutcome) -> list[str]:
    """Return the lines on the console that begin with a warning of a step."""
    return re.findall(r"^(?:\[rank\d\]: ?)?warning: (iteration .* is off.*)$", outcome.output, re.MULTILINE)


def differences(outcome: TrainingOutcome, reference: TrainingOutcome) -> set[int]:
    """Return the iterations in which the logged loss or gradient norm of two runs differ in any bit."""
    found = set()
    for name in ("lm loss", "grad-norm"):
        ours, theirs = outcome.curves[name], reference.curves[name]
        found |= {step for step in ours.keys() | theirs.keys() if ours.get(step) != theirs.get(step)}
    return found


def test_report(run_spiky, tmp_path):
    """One step is off. The last rank reports the step, once."""
    outcome = run_spiky(f"{EXPERT_2} {DISTRIBUTED} --save {tmp_path}/save --exit-interval 14", "12", ranks=2)
    assert outcome.exit_codes == (0, 0), outcome.report()
    (line,) = warnings_of(outcome)
    assert re.fullmatch(
        r"iteration 12 is off: loss [\d.]+, [\d.]+ robust deviations above the median [\d.]+; "
        r"gradient norm [\d.]+, [\d.]+ robust deviations above the median [\d.]+",
        line,
    ), line
    (entry,) = [entry for entry in read_journal(tmp_path / "save") if entry.kind == Kind.WARNED]
    assert (entry.text, entry.iteration) == (line, 12)
    assert entry.facts["loss"] == pytest.approx(outcome.curves["lm loss"][12])
    assert entry.facts["gradient_norm"] == pytest.approx(outcome.curves["grad-norm"][12], rel=1e-5)
    scalars = read_scalars(outcome.folder)
    assert {tag: [event.step for event in scalars[tag]] for tag in TAGS} == {tag: [12] for tag in TAGS}


@pytest.mark.slow
def test_watch_does_not_change_the_training(run_spiky):
    unwatched = run_spiky(f"{EXPERT_2} --spike-action none", "12", ranks=2, name="unwatched")
    assert warnings_of(unwatched) == []
    assert differences(run_spiky(EXPERT_2, "12", ranks=2), unwatched) == set()


@pytest.mark.slow
@pytest.mark.parametrize("action", ["report", "skip"])
def test_fall_is_reported_only(run_spiky, action):
    """A loss that is far too low is off, too, but is no reason to skip an update."""
    outcome = run_spiky(f"--spike-action {action}", "12", factor=0.01, saves=True)
    assert outcome.exit_codes == (0,), outcome.report()
    (line,) = warnings_of(outcome)
    assert re.fullmatch(
        r"iteration 12 is off: loss 0\.058\d+, .* below the median 6\.03(; .* below the median .*)?", line
    )
    assert outcome.iterations == list(range(1, 22))


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        (f"{EXPERT_2} {DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather", 2),
        (f"--bf16 {EXPERT_2} {DISTRIBUTED}", 2),
        ("--fp16 --initial-loss-scale 1024", 1),
        (PIPELINE_2, 2),
        (f"{INTERLEAVED} {DISTRIBUTED}", 2),
        (TENSOR_2, 2),
        ("--clip-grad 0", 1),
    ],
)
@pytest.mark.slow
def test_skip(run_spiky, flags, ranks):
    """All later steps are those of a run whose optimizer does nothing in this step, bit for bit."""
    flags = f"{flags} --exit-interval 16"
    outcome = run_spiky(f"{flags} --spike-action skip", "12", ranks=ranks)
    assert outcome.exit_codes == (0,) * ranks, outcome.report()
    (line,) = warnings_of(outcome)
    assert line.startswith("iteration 12 is off: loss ")
    assert line.endswith("; the update is skipped")
    reference = run_spiky(flags, ranks=ranks, name="reference", without_update=12)
    assert differences(outcome, reference) == {12}  # the reference has no spike


@pytest.mark.slow
def test_resumed_run_knows_the_steps_before(run_spiky):
    """Two steps after the checkpoint are too few for a judgement. The checkpoint holds the steps before."""
    flags = "--spike-action skip --save-interval 10"
    uninterrupted = run_spiky(flags, "12", name="uninterrupted")
    first = run_spiky(f"{flags} --exit-interval 10", saves=True, name="first")
    assert first.exit_codes == (0,), first.report()
    resumed = run_spiky(f"{flags} {EXPERT_2}", "12", saves=True, name="resumed", ranks=2)
    assert resumed.iterations == list(range(11, 22))
    assert len(warnings_of(resumed)) == 1
    resumed = run_spiky(f"{flags} --ckpt-step 10", "12", saves=True, name="resumed in the same layout")
    assert resumed.difference(uninterrupted) == 0


@pytest.mark.slow
@pytest.mark.runs("start")
@pytest.mark.parametrize("flags", [TENSOR_2, PIPELINE_2, "--context-parallel-size 2"])
def test_iterations_are_skipped_in_every_layout(runs, run_spiky, flags):
    (source,) = runs
    passed = f"--iterations-to-skip 4 5 9 --exit-interval 12 --load {source.checkpoints}"
    reference = run_spiky(passed, name="reference")
    outcome = run_spiky(f"{passed} {flags}", ranks=2)
    assert outcome.exit_codes == (0, 0), outcome.report()
    assert outcome.iterations == [2, 3, 6, 7, 8, 10, 11, 12]
    assert outcome.difference(reference) < 1e-4
