"""Intervals and tests against formulas by hand, tables of Student's t, and known distributions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.comparison.statistics import mean, paired_difference

# Quantiles of Student's t for 0.975, by degrees of freedom, as printed in tables.
QUANTILES = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 23: 2.069}


@pytest.mark.parametrize("freedom", QUANTILES)
def test_mean_has_students_interval(freedom):
    values = np.random.default_rng(freedom).normal(3, 0.2, freedom + 1)
    estimate = mean(values.tolist())
    assert (estimate.n, estimate.mean) == (freedom + 1, pytest.approx(values.mean()))
    half = QUANTILES[freedom] * values.std(ddof=1) / math.sqrt(freedom + 1)
    assert estimate.half_width == pytest.approx(half, rel=1e-3)
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-3)


def test_interval_holds_the_truth_in_95_of_100_cases():
    draws = np.random.default_rng(0).normal(1.0, 0.3, (2000, 5))
    covered = [estimate.low <= 1.0 <= estimate.high for estimate in map(mean, draws.tolist())]
    assert 0.93 < np.mean(covered) < 0.97


def test_pairs_are_those_of_common_seeds_and_the_sign_is_own_minus_baseline():
    difference = paired_difference({3: 1.0, 1: 3.0, 2: 3.5, 9: 100.0}, {1: 2.0, 2: 2.6, 7: -100.0, 3: 1.1})
    assert difference.pairs == pytest.approx((1.0, 0.9, -0.1))
    assert (difference.n, difference.mean) == (3, pytest.approx(0.6))
    # The seeds' own spread cancels out.
    seeds = {seed: float(seed) for seed in range(6)}
    equal = paired_difference({seed: value + 0.01 for seed, value in seeds.items()}, seeds)
    assert (equal.mean, equal.half_width) == (pytest.approx(0.01), pytest.approx(0, abs=1e-12))


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=9))
def test_p_is_the_share_of_sign_flips_at_least_as_far_from_zero(pairs):
    difference = paired_difference(dict(enumerate(map(float, pairs))), dict.fromkeys(range(len(pairs)), 0.0))
    flips = [abs(np.dot(signs, pairs)) for signs in itertools.product((-1, 1), repeat=len(pairs))]
    assert difference.p == pytest.approx(np.mean([each >= abs(sum(pairs)) for each in flips]))


def test_p_of_more_pairs_is_a_sample_with_a_fixed_seed():
    own = dict(enumerate(np.random.default_rng(1).normal(0.02, 0.03, 24).tolist()))
    first, second = (paired_difference(own, dict.fromkeys(own, 0.0)).p for _ in range(2))
    assert first == second
    # Compare with a sample of our own.
    signs = np.random.default_rng(2).choice([-1, 1], (100_000, 24))
    expected = np.mean(np.abs(signs @ [*own.values()]) >= abs(sum(own.values())))
    assert first == pytest.approx(expected, abs=0.01)


def test_few_values_have_no_interval_and_no_p():
    assert math.isnan(mean([1.0]).half_width)
    assert math.isnan(paired_difference({1: 1.0}, {1: 2.0}).p)
    empty = paired_difference({1: 1.0}, {2: 2.0})
    assert (empty.n, f"{empty:+.2f}", f"{mean([]):.2f}") == (0, "–", "–")
    assert (f"{mean([-1.0]):.2f}", f"{mean([1.0, 1.2]):.2f}") == ("−1.00", "1.10 ± 1.27")
