"""Intervals and tests against formulas in plain numpy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.comparison.statistics import mean, paired_difference, unpaired_difference

T_975 = {1: 12.7062047, 2: 4.30265273, 3: 3.18244631, 4: 2.77644511, 9: 2.26215716}  # quantiles from a printed table
losses = st.floats(1, 9).map(lambda value: round(value, 4))


@given(st.lists(losses, min_size=2, max_size=5, unique=True))
def test_mean_has_the_interval_of_student(values):
    estimate = mean(values)
    half = T_975[len(values) - 1] * np.std(values, ddof=1) / math.sqrt(len(values))
    assert estimate.mean == pytest.approx(np.mean(values))
    assert estimate.half_width == pytest.approx(half, rel=1e-6)


@given(st.lists(st.tuples(losses, losses), min_size=2, max_size=6))
def test_sign_flips_are_counted_exactly(pairs):
    own, baseline = (dict(enumerate(column)) for column in zip(*pairs, strict=True))
    differences = np.array([a - b for a, b in pairs])
    flips = itertools.product((1, -1), repeat=len(pairs))
    sums = np.array([(np.array(signs) * differences).sum() for signs in flips])
    share = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-9)
    assert paired_difference(own, baseline).p == pytest.approx(min(1, share), abs=1e-6)


def test_only_common_seeds_are_paired():
    estimate = paired_difference({1: 3.0, 2: 3.5, 3: 9.0}, {1: 3.1, 2: 3.4, 4: 0.0})
    assert (estimate.n, estimate.mean) == (2, pytest.approx(0.0))


def test_unpaired_difference_is_that_of_welch():
    own, baseline = [3.1, 3.2, 3.6], [3.0, 3.05, 3.1, 2.9]
    variances = [np.var(of, ddof=1) / len(of) for of in (own, baseline)]
    freedom = sum(variances) ** 2 / sum(v**2 / (len(of) - 1) for v, of in zip(variances, (own, baseline), strict=True))
    assert 2 < freedom < 3
    estimate = unpaired_difference(own, baseline)
    assert estimate.mean == pytest.approx(np.mean(own) - np.mean(baseline))
    error = math.sqrt(sum(variances))
    assert T_975[3] * error < estimate.half_width < T_975[2] * error


def test_few_values_have_no_interval():
    assert f"{mean([3.0]):.2f}" == "3.00"
    assert f"{mean([]):.2f}" == "–"
    assert f"{paired_difference({1: 3.0}, {1: 3.5}):+.2f}" == "−0.50"
    assert math.isnan(paired_difference({1: 3.0}, {1: 3.5}).p)
