"""Means over seeds and differences between variants, with intervals and tests from `scipy.stats`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

CONFIDENCE = 0.95
_MAX_FLIPS = 100_000  # all sign flips of up to 16 pairs; a random sample of them for more
_SEED_OF_FLIPS = 0


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        n: Number of values, or of pairs.
        mean: The mean; nan without values.
        low: Lower end of the interval; nan if there are too few values.
        high: Upper end of the interval.
        pairs: The differences of the pairs; empty for means that are no differences of pairs.
    """

    n: int
    mean: float
    low: float
    high: float
    pairs: tuple[float, ...] = ()

    @cached_property
    def p(self) -> float:
        """Two-sided p-value of a sign-flip test that the mean is 0; nan without two pairs.

        With n pairs, the p-value cannot be below 2 / 2^n. Up to 16 pairs the test is exact.
        """
        from scipy import stats

        if len(self.pairs) < 2:
            return math.nan
        test = stats.permutation_test(
            (self.pairs,),
            np.mean,
            permutation_type="samples",
            n_resamples=_MAX_FLIPS,
            rng=_SEED_OF_FLIPS,
            vectorized=True,
        )
        return float(test.pvalue)

    @property
    def half_width(self) -> float:
        """Half of the width of the interval."""
        return (self.high - self.low) / 2

    def __format__(self, form: str) -> str:
        """Format the mean and, after `±`, half of the width of the interval if it is known."""
        error = "" if math.isnan(self.half_width) else f" ± {format(self.half_width, form.removeprefix('+'))}"
        return f"{format(self.mean, form).replace('-', '−')}{error}" if self.n else "–"


def mean(values: Sequence[float]) -> Estimate:
    """Estimate a mean, with the interval of Student's t."""
    from scipy import stats

    if len(values) < 2:
        return Estimate(len(values), float(values[0]) if len(values) else math.nan, math.nan, math.nan)
    interval = stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    return Estimate(len(values), float(np.mean(values)), float(interval.low), float(interval.high))


def paired_difference(own: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Estimate own − baseline over common seeds, with Student's t and a sign-flip test of the pairs.

    Args:
        own: Values by seed.
        baseline: Values by seed.
    """
    pairs = tuple(own[seed] - baseline[seed] for seed in sorted(own.keys() & baseline.keys()))
    return replace(mean(pairs), pairs=pairs)
