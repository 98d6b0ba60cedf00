"""Writes the page of the study from the tables of results and measures, in seconds.

`python tools/studies/choice_or_damping/page.py runs/study/results.jsonl` writes `choice-or-damping.md` and
`choice-or-damping.png` beside the table, if no run is missing. The measures are those of `measures.jsonl` beside the
table. The prose is in `page.md.j2`; `check_numbers.py` checks the page.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
from analysis import CONFIRMATION, CONTRASTS, TEXTS, Study, outcome, variants_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measures import Measures, read_measures

from maskmoe.comparison.report import markdown_table, new_figure, tidy
from maskmoe.comparison.statistics import Estimate, mean, paired_difference
from maskmoe.comparison.table import ALL_TOKENS, RunResult
from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output, write_text
from maskmoe.processes.run_tool import run_tool
from maskmoe.routing_mask.frequency import FrequencyBands

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "docs" / "generators"))
from pages import wrap

NAME = "choice-or-damping"

BYTES = {"prose": 2_888_121, "code": 2_898_399}
"""Size of the text of the held-out documents in UTF-8."""

BLOCKS = {CONFIRMATION: "9 M tokens", "long": "36 M tokens", "experts": "9 M tokens, N = 32"}
ARMS = ("smoe", "hash", "maskmoe")
ARMS_WITH_CHOICE = ("smoe", "maskmoe")
SHARES_OF_TRAINING = (0.2, 0.5, 0.8)


def bits_per_byte(run: RunResult) -> float:
    """Return the loss of prose and code together in bits per byte of text."""
    nats = sum(each.loss * each.tokens for each in run.losses if each.text in TEXTS and each.band == ALL_TOKENS)
    return nats / math.log(2) / sum(BYTES.values())


def title(suite: str, arm: str) -> str:
    """Return the name of an arm on the page."""
    return {**variants_of(CONFIRMATION), **variants_of(suite)}[arm].title


def table(rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table of a header and rows."""
    header, *others = [[*map(str, row)] for row in rows]
    return markdown_table(header, others)


def losses_table(study: Study) -> str:
    """Return the table of the losses of the arms of the blocks B, D and E."""
    rows = [["losses", "runs", *TEXTS, "both", "bits per byte"]]
    for suite, length in BLOCKS.items():
        for arm in ARMS:
            runs = study.runs(suite, arm)
            texts = [mean([*study.outcomes(suite, arm, each).values()]) for each in (*zip(TEXTS), TEXTS)]
            bits = mean([bits_per_byte(run) for run in runs.values()])
            cells = (f"{estimate:.3f}" for estimate in (*texts, bits))
            rows.append([f"{title(suite, arm)}, {length}", str(len(runs)), *cells])
    return table(rows)


def label(suite: str, own: str, baseline: str) -> str:
    """Return the name of a difference on the page."""
    length = f", {BLOCKS[suite]}" if suite in BLOCKS else ""
    return f"{title(suite, own)} − {title(suite, baseline)}{length}"


def differences_table(study: Study, suites: Iterable[str]) -> str:
    """Return the table of the differences of some blocks."""
    rows = [["difference", "pairs", "both", "p", "bits per byte", *TEXTS, *FrequencyBands.names]]
    for suite in suites:
        for own, baseline in CONTRASTS[suite]:
            difference = partial(study.difference, suite, own, baseline)
            both = difference()
            runs = (study.runs(suite, arm) for arm in (own, baseline))
            bits = ({seed: bits_per_byte(run) for seed, run in each.items()} for each in runs)
            parts = [paired_difference(*bits), *(difference(text) for text in zip(TEXTS))]
            parts += [difference(band=band) for band in FrequencyBands.names]
            cells = (f"{estimate:+.3f}" for estimate in parts)
            p = "<0.001" if both.p < 0.001 else f"{both.p:.3f}"
            rows.append([label(suite, own, baseline), both.n, f"{both:+.3f}", p, *cells])
    return table(rows)


def of_arm(measures: Sequence[Measures], arm: str) -> Iterator[Measures]:
    """Yield the measures of an arm of block B."""
    return (each for each in measures if (each.suite, each.variant) == (CONFIRMATION, arm))


def second_choices_table(study: Study, measures: Sequence[Measures]) -> str:
    """Return the table of losses without each token's best expert."""
    rows = [["without each token's best expert", "runs", "both", "loss added"]]
    for arm in ARMS_WITH_CHOICE:
        with_best = study.outcomes(CONFIRMATION, arm)
        without = {each.seed: outcome(each.losses) for each in of_arm(measures, arm)}
        added = paired_difference(without, with_best)
        rows.append([title(CONFIRMATION, arm), len(without), f"{mean([*without.values()]):.3f}", f"{added:+.3f}"])
    return table(rows)


def changing_table(measures: Sequence[Measures]) -> str:
    """Return the table of the tokens that still change their expert, in per cent."""
    times = (f"after {100 * share:.0f} %" for share in SHARES_OF_TRAINING)
    rows = [["tokens that change their expert later", "runs", *times]]
    for arm in ARMS_WITH_CHOICE:
        series = [each.changing for each in of_arm(measures, arm)]
        for column, tokens in ((1, "all"), (2, "frequent ids")):
            after = [[changing_after(each, share)[column] for share in SHARES_OF_TRAINING] for each in series]
            cells = (f"{100 * share:.1f} %" for share in np.mean(after, axis=0))
            rows.append([f"{title(CONFIRMATION, arm)}, {tokens}", len(series), *cells])
    return table(rows)


def changing_after(changing: Sequence[tuple[int, float, float]], share: float) -> tuple[int, float, float]:
    """Return the entry of the checkpoint that is nearest to a share of the training."""
    return min(changing, key=lambda entry: abs(entry[0] - share * changing[-1][0]))


def draw(study: Study) -> Figure:
    """Return a figure of the losses of the blocks B and D, and below them the differences of each table."""
    losses = {
        f"{title(suite, arm)}, {BLOCKS[suite]}": [*study.outcomes(suite, arm).values()]
        for suite in (CONFIRMATION, "long")
        for arm in ARMS
    }
    differences = [
        {label(suite, *arms): study.difference(suite, *arms).pairs for suite in suites for arms in CONTRASTS[suite]}
        for suites in (BLOCKS, ["mechanism"])
    ]
    parts = [losses, *differences]
    figure = new_figure(8, 2 + 0.34 * sum(map(len, parts)))
    first, *others = figure.subplots(len(parts), height_ratios=[*map(len, parts)])
    draw_rows(first, losses)
    first.set_xlabel("loss (nats per token)")
    for axes, rows in zip(others, differences, strict=True):
        draw_rows(axes, rows)
        axes.axvline(0, color="#444444", linewidth=1)
        axes.set_xlabel("difference in loss (nats per token)")
    return figure


def draw_rows(axes: Axes, rows: Mapping[str, Sequence[float]]) -> None:
    """Draw a row for each label: a dot for each value, and the mean with its interval."""
    for row, values in enumerate(rows.values()):
        axes.scatter(values, [row] * len(values), s=18, alpha=0.4, color="#1f4e9c", linewidths=0)
        estimate = mean(values)
        error = 0 if math.isnan(estimate.half_width) else estimate.half_width
        axes.errorbar(estimate.mean, row + 0.25, xerr=error, fmt="|", markersize=8, color="#c0392b", capsize=3)
    axes.set_yticks(range(len(rows)), [*rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    tidy(axes)


def side(difference: Estimate) -> str:
    """Return how far a loss is above or below another one."""
    return f"{abs(difference.mean):.3f} ± {difference.half_width:.3f} {'below' if difference.mean < 0 else 'above'}"


def standing(difference: Estimate) -> str:
    """Return what a difference shows at the 5 % level."""
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "not resolved"


def missing_runs(study: Study, measures: Sequence[Measures]) -> Iterator[str]:
    """Yield what the page needs and the tables lack, block by block."""
    for suite in ("rates", *CONTRASTS):
        missing, planned = study.missing(suite)
        if missing:
            yield f"{missing} of {planned} runs of {suite}"
    yield from (f"the measures of {arm}" for arm in ARMS_WITH_CHOICE if not any(of_arm(measures, arm)))


def render(study: Study, measures: Sequence[Measures]) -> str:
    """Return the page."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("page.md.j2").render(
        name=NAME,
        difference=study.difference,
        said=lambda estimate: f"{estimate:+.3f}",
        side=side,
        standing=standing,
        lucky=[f"{loss:.2f}" for loss in sorted(study.outcomes("mechanism", "smoe-smeared").values())],
        losses=losses_table(study),
        differences=differences_table(study, BLOCKS),
        interventions=differences_table(study, ["mechanism"]),
        second_choices=second_choices_table(study, measures),
        changing=changing_table(measures),
    )
    return wrap(text)


def main() -> None:
    """Write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="table of results, such as runs/study/results.jsonl")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the page (default: the folder of the table)"
    )
    arguments = parser.parse_args()
    path, folder = arguments.table, arguments.output or arguments.table.parent
    study, measures = Study.read(path), read_measures(path.with_name("measures.jsonl"))
    missing = "; ".join(missing_runs(study, measures))
    if missing:
        raise UserError(f"{path}: the page needs all runs. Missing: {missing}. For a part of the runs, use analysis.py")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_output(folder / f"{NAME}.png") as temporary:
        draw(study).savefig(temporary, format="png")
    write_text(folder / f"{NAME}.md", render(study, measures))


if __name__ == "__main__":
    run_tool(main)
