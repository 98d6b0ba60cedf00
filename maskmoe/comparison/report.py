"""The page of a comparison, made from the table of results alone: tables, and a dot for each run."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskmoe.comparison.run import OWN_TEXT
from maskmoe.comparison.statistics import mean, paired_difference, unpaired_difference
from maskmoe.comparison.suite import Suite
from maskmoe.comparison.table import ALL_TOKENS, RunResult
from maskmoe.files.outputs import atomic_output, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT_FILES = ("README.md", "losses.png")
"""Names of the files of a report."""


def write_report(suite: Suite, name: str, results: Sequence[RunResult], folder: Path) -> Path:
    """Write README.md and losses.png of the finished runs of a suite; return the path of README.md.

    Args:
        suite: The suite.
        name: Name of the suite.
        results: Results of the suite's runs.
        folder: Folder of the files, which is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = (folder / file for file in REPORT_FILES)
    with atomic_output(picture) as path:
        _draw(suite, results).savefig(path, format="png")
    write_text(page, "\n\n".join(_page(suite, name, results)) + "\n")
    return page


def _page(suite: Suite, name: str, results: Sequence[RunResult]) -> Iterator[str]:
    """Yield the paragraphs of the page."""
    planned = sum(len(variant.seeds) for variant in suite.variants.values())
    # Runs of an installed package have no commit.
    commits = ", ".join(sorted({commit[:12] for result in results if (commit := result.origin.get("commit"))}))
    commits = f" (commits {commits})" if commits else ""
    yield f"# {suite.title}"
    yield (
        f"{len(results)} of {planned} runs of the suite `{name}` are finished{commits}. Losses are in nats "
        "per token of held-out text. ± is half of the 95 % interval over seeds (Student's t; Welch's t for differences "
        "that are not paired). p belongs to a two-sided sign-flip test over pairs of equal seeds. No value is "
        "corrected for the number of comparisons."
    )
    yield "![The loss of each run](losses.png)"
    for setting in dict.fromkeys(variant.setting for variant in suite.variants.values()):
        names = [name for name, variant in suite.variants.items() if variant.setting == setting]
        found = {name: [result for result in results if result.variant == name] for name in names}
        found = {name: of for name, of in found.items() if of}
        if setting and found:
            yield f"## {setting}"
        baselines = [name for name in found if name.removesuffix(f".{setting}") in suite.baselines]
        for text in dict.fromkeys(each.text for of in found.values() for result in of for each in result.losses):
            yield from _tables(suite, text, found, baselines)


def _tables(
    suite: Suite, text: str, found: Mapping[str, Sequence[RunResult]], baselines: Sequence[str]
) -> Iterator[str]:
    """Yield a table of losses, a table of differences, and a table of the loss of every seed, for one text."""
    first = next(iter(found.values()))[0]
    bands = [each.band for each in first.losses if each.text == text]
    shares = {each.band: each.tokens for each in first.losses if each.text == text}
    yield f"### Text: {text}, {shares.get(ALL_TOKENS, 0):,} tokens"
    titles = {name: suite.variants[name].title for name in found}

    rows = [["variant", "runs", *bands]]
    for name, results in found.items():
        estimates = [mean([result.loss(text, band) for result in results]) for band in bands]
        rows.append([titles[name], str(len(results)), *(f"{estimate:.4f}" for estimate in estimates)])
    yield _table(rows)

    losses = {name: {band: _by_seed(of, text, band) for band in bands} for name, of in found.items()}
    rows = [["difference", "pairs", *bands, "not paired", "p"]]
    for name in found:
        for baseline in (each for each in baselines if each != name):
            estimates = [paired_difference(losses[name][band], losses[baseline][band]) for band in bands]
            own, theirs = (list(losses[each][ALL_TOKENS].values()) for each in (name, baseline))
            title = f"{titles[name]} − {titles[baseline]}"
            unpaired = f"{unpaired_difference(own, theirs):+.4f}"
            values = [f"{estimate:+.4f}" for estimate in estimates]
            rows.append([title, str(estimates[0].n), *values, unpaired, f"{estimates[0].p:.3f}"])
    if len(rows) > 1:
        yield _table(rows)

    seeds = sorted({seed for of in losses.values() for seed in of[ALL_TOKENS]})
    rows = [["seed", *titles.values()]]
    for seed in seeds:
        of_seed = [losses[name][ALL_TOKENS].get(seed) for name in found]
        rows.append([str(seed), *("–" if loss is None else f"{loss:.4f}" for loss in of_seed)])
    yield _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    # Titles of a suite may have bars and line ends.
    escaped = ([" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in rows)
    return markdown_table("\n".join(" | ".join(row) for row in escaped))


def _by_seed(results: Sequence[RunResult], text: str, band: str) -> dict[int, float]:
    """Return the losses that exist by seed."""
    losses = {result.seed: result.loss(text, band) for result in results}
    return {seed: loss for seed, loss in losses.items() if not np.isnan(loss)}


def _draw(suite: Suite, results: Sequence[RunResult]) -> "Figure":
    """Return a figure with a row for each variant, a dot for each run, and a line at each mean."""
    names = [name for name in suite.variants if any(result.variant == name for result in results)]
    figure = new_figure(8, 1.2 + 0.35 * max(1, len(names)))
    axes = figure.add_subplot()
    for row, name in enumerate(names):
        losses = [result.loss(OWN_TEXT) for result in results if result.variant == name]
        axes.scatter(losses, [row] * len(losses), s=18, alpha=0.6, color="#1f4e9c", linewidths=0)
        axes.plot([np.mean(losses)] * 2, [row - 0.3, row + 0.3], color="#c0392b")
    axes.set_yticks(range(len(names)), [suite.variants[name].title for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("loss on held-out text (nats per token); a line marks the mean")
    tidy(axes)
    return figure


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure whose size is given in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def tidy(axes: "Axes") -> None:
    """Draw a light grid behind the data and remove the upper and right border."""
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def markdown_table(text: str) -> str:
    """Return a Markdown table whose first column is aligned left and whose other columns are aligned right.

    Args:
        text: The header and the rows on one line each, with cells that are separated by `|`.
    """
    lines = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.strip()]
    header, *rows = [[cell.strip() for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
