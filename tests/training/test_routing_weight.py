"""Training with other weights of selected experts than their probabilities."""

from dataclasses import replace

import pytest

pytestmark = pytest.mark.slow

# See test_composition.py.
FP32_ORDER_OF_SUMS = 2e-6


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, marks=pytest.mark.runs(*pair), id=pair[1])
        for pair in (
            ("routing weight one", "routing weight one, full recompute, expert parallel 2"),
            ("scaled routing weight", "scaled routing weight, expert parallel 2"),
        )
    ],
)
def test_layout_agrees_with_single_process(runs, pair):
    reference, run = runs
    assert run.iterations == list(range(5, 9))
    assert run.difference(reference) < FP32_ORDER_OF_SUMS


@pytest.mark.runs("routing weight one", "routing weight one, resumed")
def test_resume_is_bit_equal(runs):
    reference, run = runs
    assert run.iterations == list(range(5, 9))
    assert run.difference(reference) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--routing-weight scaled", "--routing-weight scaled or one without --moe-router-pre-softmax"),
        (
            "--routing-weight one --moe-router-pre-softmax --moe-router-topk-scaling-factor 2",
            "--routing-weight one with --moe-router-topk-scaling-factor",
        ),
    ],
)
def test_settings_without_probabilities_are_refused(start, refusal, flags, message):
    assert message in refusal(start(message, replace(refusal.run, flags=flags)))
