"""Checks the numbers of the study's page against the tables, with numpy and without the package.

`python check_numbers.py runs/study/results.jsonl docs/study/choice-or-damping.md` computes every
number in the page's tables from the table of results and from `measures.jsonl` beside it, and compares them. A number
of the prose with three decimals must stand in a table, too, and the page must give the answers that follow from the
intervals. Exit code 1 names what differs.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

Cell = tuple[float, float]
"""A value, and the half of its interval or nan."""

BYTES = 2_888_121 + 2_898_399  # of the held-out prose and code
SUITES = {"9 M tokens, N = 32": "experts", "9 M tokens": "confirm", "36 M tokens": "long"}
ARMS = {
    "SMoE": ("confirm", "smoe"),
    "Hash": ("confirm", "hash"),
    "MaskMoE": ("confirm", "maskmoe"),
    "Gated Hash": ("mechanism", "gated-hash"),
    "MaskMoE with weight 1": ("mechanism", "maskmoe-weight-1"),
    "SMoE, smeared keys": ("mechanism", "smoe-smeared"),
    "Hash, smeared keys": ("mechanism", "hash-smeared"),
    "MaskMoE, smeared keys": ("mechanism", "maskmoe-smeared"),
    "Hash, random": ("mechanism", "hash-random"),
}
COLUMNS = {"prose": (["prose"], "all"), "code": (["code"], "all"), "both": (["prose", "code"], "all")}
SIGN_FLIPS = 100_000  # the page samples so many flips of more than 16 pairs


def weighted(run: Mapping, texts: Sequence[str], band: str) -> tuple[float, float]:
    """Return the mean loss of a run over the tokens of some texts and a band, and the number of these tokens."""
    rows = [each for each in run["losses"] if each["text"] in texts and each["band"] == band]
    tokens = np.array([each["tokens"] for each in rows])
    return float(np.average([each["loss"] for each in rows], weights=tokens)), float(tokens.sum())


@cache
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


def estimate(values: Sequence[float]) -> Cell:
    """Return a mean and half of its 95 % interval."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    return float(np.mean(values)), t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


class Tables:
    """The tables of results and measures.

    Args:
        results: Path of the table of results.
    """

    def __init__(self, results: Path) -> None:
        self.runs: dict[tuple[str, str], dict[int, Mapping]] = {}
        self.measures: dict[tuple[str, str], dict[int, Mapping]] = {}
        for path, of in ((results, self.runs), (results.with_name("measures.jsonl"), self.measures)):
            for line in path.read_text(encoding="utf-8").splitlines():
                run = json.loads(line)
                of.setdefault((run["suite"], run["variant"]), {})[run["seed"]] = run

    def losses(self, label: str) -> Iterator[Cell]:
        """Yield the cells of a row such as `SMoE, 9 M tokens`."""
        arm, _, length = label.partition(", ")
        runs = [*self.runs[SUITES[length], ARMS[arm][1]].values()]
        yield (len(runs), math.nan)
        for column in COLUMNS.values():
            yield estimate([weighted(run, *column)[0] for run in runs])
        both = [weighted(run, *COLUMNS["both"]) for run in runs]
        yield estimate([loss * tokens / BYTES / math.log(2) for loss, tokens in both])

    def difference(self, label: str) -> Iterator[Cell]:
        """Yield the cells of a row such as `MaskMoE − SMoE, 9 M tokens` or `Gated Hash − Hash`."""
        length = next((length for length in SUITES if label.endswith(f", {length}")), "")
        names = label.removesuffix(f", {length}").split(" − ")
        own, baseline = (self.runs[SUITES[length] if length else ARMS[arm][0], ARMS[arm][1]] for arm in names)
        seeds = sorted(own.keys() & baseline.keys())

        def pairs(texts: Sequence[str], band: str) -> np.ndarray:
            return np.array([weighted(own[s], texts, band)[0] - weighted(baseline[s], texts, band)[0] for s in seeds])

        yield (len(seeds), math.nan)
        yield estimate(pairs(*COLUMNS["both"]))
        yield (sign_flip_p(pairs(*COLUMNS["both"])), math.nan)
        tokens = weighted(own[seeds[0]], *COLUMNS["both"])[1]
        yield estimate(pairs(*COLUMNS["both"]) * tokens / BYTES / math.log(2))
        bands = [(COLUMNS["both"][0], band) for band in ("top 40 %", "next 50 %", "last 10 %")]
        for column in (COLUMNS["prose"], COLUMNS["code"], *bands):
            yield estimate(pairs(*column))

    def second_choice(self, label: str) -> Iterator[Cell]:
        """Yield the cells of an arm without its best experts."""
        runs, measures = self.runs[ARMS[label]], self.measures[ARMS[label]]
        seeds = sorted(runs.keys() & measures.keys())
        without = np.array([weighted(measures[seed], *COLUMNS["both"])[0] for seed in seeds])
        with_best = np.array([weighted(runs[seed], *COLUMNS["both"])[0] for seed in seeds])
        yield (len(seeds), math.nan)
        yield estimate(without)
        yield estimate(without - with_best)

    def changing(self, label: str) -> Iterator[Cell]:
        """Yield the cells of a row such as `SMoE, all`."""
        arm, _, tokens = label.partition(", ")
        series = [np.array(each["changing"]) for each in self.measures[ARMS[arm]].values() if each["changing"]]
        yield (len(series), math.nan)
        for share in (0.2, 0.5, 0.8):
            rows = [each[np.abs(each[:, 0] - share * each[-1, 0]).argmin()] for each in series]
            yield (100 * float(np.mean(rows, axis=0)[1 if tokens == "all" else 2]), math.nan)


def numbers(cell: str) -> list[float]:
    """Return the numbers of a cell: a value, and after `±` half of its interval."""
    parts = cell.replace("−", "-").removeprefix("<").removesuffix("%").split(" ± ")
    return [float(part) for part in parts]


def standing(low: float, high: float) -> str:
    """Return what the interval of a difference shows."""
    return "better" if high < 0 else "worse" if low > 0 else "not resolved"


def answers(tables: Tables) -> Iterator[str]:
    """Yield what the page says."""

    def interval(label: str) -> tuple[float, float]:
        mean, half = [*tables.difference(label)][1]
        return mean - half, mean + half

    def side(label: str) -> str:
        mean, half = [*tables.difference(label)][1]
        return f"{abs(mean):.3f} ± {half:.3f} {'below' if mean < 0 else 'above'}"

    to_smoe, to_hash = (interval(f"MaskMoE − {baseline}, 9 M tokens") for baseline in ("SMoE", "Hash"))
    yield f"MaskMoE model {'beats' if max(to_smoe[1], to_hash[1]) < 0 else 'is not shown to beat'} both SMoE and Hash"
    for arm, (low, high) in (("SMoE", to_smoe), ("Hash", to_hash)):
        yield f"{side(f'MaskMoE − {arm}, 9 M tokens')} {arm}'s ({standing(low, high)})"
    if min(to_smoe[0], to_hash[0]) > -0.01:
        yield "Both intervals exclude the lead of 0.01"
    if to_hash[1] >= 0:
        yield "no lead of MaskMoE over Hash is shown that choice or damping could explain"
    for length in ("36 M tokens", "9 M tokens, N = 32"):
        to_smoe, to_hash = (side(f"MaskMoE − {baseline}, {length}") for baseline in ("SMoE", "Hash"))
        yield f"is {to_smoe} SMoE's and {to_hash} Hash's."
    for labels, wording in (
        (
            ("MaskMoE − SMoE, 36 M tokens", "MaskMoE − Hash, 36 M tokens"),
            "(found against SMoE: {}; against Hash: {}), and",
        ),
        (("Gated Hash − Hash", "Gated Hash − MaskMoE"), "frequent ids. Against Hash: {}; against MaskMoE: {}. - "),
        (
            ("MaskMoE with weight 1 − Hash", "MaskMoE with weight 1 − MaskMoE"),
            "the weight 1. Against Hash: {}; against MaskMoE: {}. - ",
        ),
        (
            ("MaskMoE, smeared keys − SMoE, smeared keys", "MaskMoE, smeared keys − Hash, smeared keys"),
            "MaskMoE against SMoE: {}; against Hash: {}. But",
        ),
    ):
        yield wording.format(*(standing(*interval(label)) for label in labels))
    runs = tables.runs[ARMS["SMoE, smeared keys"]].values()
    lucky = sorted(weighted(run, *COLUMNS["both"])[0] for run in runs)
    yield "end at {:.2f} to {:.2f}, the others at {:.2f} to {:.2f}.".format(*lucky[:1], *lucky[2:4], *lucky[-1:])


def other_experts(tables: Tables) -> Iterator[str]:
    """Yield the runs of block C that should have Hash's experts, and whose experts got other numbers of tokens."""
    of_hash = tables.runs.get(("confirm", "hash"), {})
    for arm in ("gated-hash", "hash-smeared"):
        for seed, run in tables.runs.get(("mechanism", arm), {}).items():
            if seed in of_hash and run["load"] != of_hash[seed]["load"]:
                yield f"{arm} with seed {seed} does not have Hash's experts"


def differing(page: str, tables: Tables) -> Iterator[str]:
    """Yield the cells and answers of the page that the tables do not give, and numbers of the prose in no cell."""
    kinds: dict[str, Callable[..., Iterator[Cell]]] = {
        "losses": tables.losses,
        "difference": tables.difference,
        "without each token's best expert": tables.second_choice,
        "tokens that change their expert later": tables.changing,
    }
    known, head = set(), ""
    lines = [line for line in page.splitlines() if line.startswith("|") and not line.startswith("|--")]
    for line in lines:
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if label in kinds:
            head = label
            continue
        known |= set(re.findall(r"\d+\.\d{3}", line))
        for number, (cell, (value, half)) in enumerate(zip(cells, kinds[head](label), strict=True)):
            found = numbers(cell)
            tolerance = 0.051 if cell.endswith("%") else 0.00051
            if head == "difference" and number == 2:
                # The sampled p may be off by four standard deviations, and `<0.001` by 0.001.
                tolerance = 0.0011 + 4 * math.sqrt(value * (2 - value) / SIGN_FLIPS)
            wanted = [value] if math.isnan(half) else [value, half]
            if len(found) != len(wanted) or not np.allclose(found, wanted, rtol=0, atol=tolerance):
                yield f"{head}: {label}: the page has {cell}, the tables give {wanted}"
    prose = "\n".join(line for line in page.splitlines() if not line.startswith("|"))
    for number in sorted(set(re.findall(r"\d+\.\d{3}\b", prose)) - known):
        yield f"{number} of the prose is in no table"
    text = " ".join(page.split())
    yield from (f"the page does not say: {answer}" for answer in answers(tables) if answer not in text)
    yield from other_experts(tables)


def main() -> None:
    """Check the page that the command line names."""
    results, page = map(Path, sys.argv[1:])
    wrong = [*differing(page.read_text(encoding="utf-8"), Tables(results))]
    print(*wrong, f"{len(wrong)} numbers or answers of {page} differ from the tables", sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
