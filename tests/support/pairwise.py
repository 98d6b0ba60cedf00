"""Few test cases that cover every pair of option values."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Choose combinations of option values such that every two values of different options occur together.

    Each step takes the combination that covers the most new pairs. The result is the same in every run.

    Args:
        options: the values of each option; few enough to try all combinations.

    Returns:
        combinations, one value for each option in the order of `options`.
    """
    combinations = list(itertools.product(*(range(len(values)) for values in options.values())))

    def pairs_of(combination: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(combination), 2))

    missing = set().union(*map(pairs_of, combinations))
    chosen = []
    while missing:
        best = max(combinations, key=lambda combination: len(pairs_of(combination) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    values = list(options.values())
    return [tuple(values[option][index] for option, index in enumerate(combination)) for combination in chosen]
