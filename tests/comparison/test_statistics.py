"""Intervals and tests against formulas in plain numpy."""

import math

import numpy as np
import pytest

from maskmoe.comparison.statistics import mean, paired_difference, unpaired_difference

T_975 = {2: 4.30265273, 3: 3.18244631}  # quantiles from a printed table


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
