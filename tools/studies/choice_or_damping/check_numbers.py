"""Computes a paired difference of the study from the table of results, with numpy and without the package.

`python check_numbers.py ../../../docs/study/results.jsonl confirm maskmoe confirm smoe` prints the number of pairs, the
mean difference in nats, the ends of its 95 % interval (Student's t), and the exact p-value of the two-sided sign-flip
test. Each arm is named by its suite and its variant.
"""

import json
import math
import sys

import numpy as np


def outcomes(table: str, suite: str, variant: str) -> dict[int, float]:
    """Return the loss of prose and code together by seed."""
    by_seed = {}
    with open(table, encoding="utf-8") as lines:
        for run in map(json.loads, lines):
            if (run["suite"], run["variant"]) == (suite, variant):
                held_out = [each for each in run["losses"] if each["band"] == "all" and each["text"] != "held-out"]
                tokens = np.array([each["tokens"] for each in held_out])
                by_seed[run["seed"]] = float(np.average([each["loss"] for each in held_out], weights=tokens))
    return by_seed


def t_quantile(freedom: int, share: float = 0.975) -> float:
    """Return a quantile of Student's t: integrate its density by the trapezoidal rule, then interpolate."""
    t = np.linspace(0, 200, 4_000_001)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = constant * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    below = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (t[1] - t[0])
    return float(np.interp(share, below, t))


def sign_flip_p(differences: np.ndarray) -> float:
    """Return the share of all sign flips whose sum is at least as far from 0 as the observed sum.

    The sums of both halves of the differences are listed, and pairs of them are counted by binary search.
    """
    halves = np.array_split(differences, 2)
    sums = []
    for half in halves:
        signs = np.array(
            [[1 - 2 * (number >> bit & 1) for bit in range(len(half))] for number in range(1 << len(half))]
        )
        sums.append(signs @ half)
    first, second = sums[0], np.sort(sums[1])
    limit = abs(differences.sum()) * (1 - 1e-12)
    at_least = len(second) - np.searchsorted(second, limit - first, side="left")
    at_most = np.searchsorted(second, -limit - first, side="right")
    return float((at_least + at_most).sum() / (len(first) * len(second)))


def main() -> None:
    """Print the difference of two arms."""
    table, *arms = sys.argv[1:]
    own, baseline = outcomes(table, *arms[:2]), outcomes(table, *arms[2:])
    differences = np.array([own[seed] - baseline[seed] for seed in sorted(own.keys() & baseline.keys())])
    n = len(differences)
    half_width = t_quantile(n - 1) * differences.std(ddof=1) / math.sqrt(n)
    mean = differences.mean()
    print(f"n={n} mean={mean:+.6f} low={mean - half_width:+.6f} high={mean + half_width:+.6f}", end=" ")
    print(f"p={sign_flip_p(differences):.6f}")


if __name__ == "__main__":
    main()
