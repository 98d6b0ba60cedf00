"""The detector of spikes against numpy; nothing here trains."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.training.watch.spikes import RobustWindow, SpikeDetector

VALUES = st.floats(-1e6, 1e6)
POSITIVE = st.floats(1e-3, 1e3)


def robust_deviations(before: list[float], value: float) -> float:
    """Compute the distance of a value from earlier values as the help of --spike-deviations defines it."""
    middle = np.median(before)
    spread = 1.4826 * np.median(np.abs(np.array(before) - middle))
    return float((value - middle) / max(spread, 0.005 * abs(middle), 1e-6))


@given(st.lists(VALUES, min_size=2, max_size=40), VALUES, st.integers(2, 30))
def test_window_agrees_with_numpy(before, value, size):
    middle, deviations = RobustWindow(size, before).judge(value)
    kept = before[-size:]
    assert middle == np.median(kept)
    if len(kept) < max(2, size // 2):
        assert deviations == 0
    else:
        assert deviations == pytest.approx(robust_deviations(kept, value), rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=60), st.floats(1, 20))
def test_detector_agrees_with_numpy(steps, limit):
    detector, columns = SpikeDetector(10, limit), ([], [])
    for step in steps:
        found = {deviation.name: deviation for deviation in detector.judge(*step)}
        for name, value, column in zip(SpikeDetector.NAMES, step, columns, strict=True):
            before = column[-10:]
            expected = robust_deviations(before, value) if len(before) >= 5 else 0.0
            if abs(abs(expected) - limit) > 1e-9 * limit:
                assert (name in found) == (abs(expected) > limit)
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


@pytest.mark.parametrize(
    ("loss", "grad_norm", "names"), [(4, 0.3, {"loss"}), (2, 9, {"gradient norm"}), (1, 0.3, {"loss"})]
)
def test_spike_is_off(loss, grad_norm, names):
    generator = np.random.default_rng(0)
    detector = SpikeDetector(128, 15)
    for _ in range(64):
        assert not detector.judge(2 + 0.02 * generator.standard_normal(), 0.3 + 0.03 * generator.standard_normal())
    found = detector.judge(loss, grad_norm)
    assert {deviation.name for deviation in found} == names
    assert (found[0].deviations > 0) == (loss != 1)
    assert not detector.judge(2, 0.3)


def test_first_half_of_the_window_is_not_judged():
    detector = SpikeDetector(10, 15)
    for _ in range(4):
        assert not detector.judge(1, 1)
    assert not detector.judge(100, 1)
    assert detector.judge(100, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_off_and_not_kept(value):
    detector = SpikeDetector(4, 15)
    (found,) = detector.judge(value, 1.0)
    assert found.name == "loss"
    assert found.deviations == math.inf
    assert str(found) == f"loss {value}"
    assert detector.history == {"loss": [], "gradient norm": [1.0]}


def test_lasting_change_is_normal_after_half_a_window():
    detector = SpikeDetector(20, 15)
    for _ in range(20):
        detector.judge(2, 1)
    assert [bool(detector.judge(8, 1)) for _ in range(20)] == [True] * 10 + [False] * 10


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


def test_texts():
    detector = SpikeDetector(4, 15)
    for value in (2.0, 2.1, 2.2, 2.1):
        detector.judge(value, value)
    texts = [str(deviation) for deviation in (*detector.judge(9.25, 2.1), *detector.judge(2.1, 0.001))]
    assert texts == [
        "loss 9.25, 96.5 robust deviations above the median 2.1",
        "gradient norm 0.001, 199.9 robust deviations below the median 2.1",
    ]
