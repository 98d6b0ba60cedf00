"""The page of a comparison, made from the table of results alone: tables, and a dot for each run."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskmoe.comparison.run import OWN_TEXT
from maskmoe.comparison.statistics import mean, paired_difference
from maskmoe.comparison.suite import Suite
from maskmoe.comparison.table import ALL_TOKENS, RunResult
from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARK = "<!-- written by maskmoe compare -->"

Losses = Mapping[str, Mapping[str, Mapping[int, float]]]
"""The losses on one text, by variant, band and seed."""


def write_report(suite: Suite, name: str, results: Sequence[RunResult], folder: Path) -> Path:
    """Write README.md and losses.png of the finished runs of a suite; return the path of README.md.

    Args:
        suite: The suite.
        name: Name of the suite.
        results: Results of the suite's runs.
        folder: Folder of the files, which is made.

    Raises:
        UserError: No run is finished, or the folder has a page that this function did not write.
    """
    if not results:
        raise UserError(f"no run of the suite {name} is finished, so there is nothing to report")
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "README.md", folder / "losses.png"
    if page.exists() and not page.read_bytes().rstrip().endswith(_MARK.encode()):
        raise UserError(f"{page} was not written by maskmoe compare: move it away")
    with atomic_output(picture) as path:
        _draw(suite, results).savefig(path, format="png")
    write_text(page, "\n\n".join([*_page(suite, name, results), _MARK]) + "\n")
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
        "per token of held-out text. ± is half of the 95 % interval over seeds (Student's t); differences are over "
        "pairs of equal seeds. p belongs to a two-sided sign-flip test over the pairs. No value is corrected for the "
        "number of comparisons."
    )
    yield "![The loss of each run](losses.png)"
    for setting in dict.fromkeys(variant.setting for variant in suite.variants.values()):
        of_setting = [result for result in results if suite.variants[result.variant].setting == setting]
        if setting and of_setting:
            yield f"## {setting}"
        for text in dict.fromkeys(each.text for result in of_setting for each in result.losses):
            yield from _tables(suite, text, of_setting)


def _tables(suite: Suite, text: str, results: Sequence[RunResult]) -> Iterator[str]:
    """Yield a table of losses, a table of differences, and a table of the loss of every seed, for one text."""
    tokens = {each.band: each.tokens for each in results[0].losses if each.text == text}
    yield f"### Text: {text}, {tokens.get(ALL_TOKENS, 0):,} tokens"
    names = [name for name in suite.variants if any(result.variant == name for result in results)]
    losses = {
        name: {band: _by_seed([each for each in results if each.variant == name], text, band) for band in tokens}
        for name in names
    }
    titles = {name: suite.variants[name].title for name in names}
    yield markdown_table(["variant", "runs", *tokens], _mean_rows(losses, titles))
    baselines = [name for name in names if name.removesuffix(f".{suite.variants[name].setting}") in suite.baselines]
    if rows := [*_difference_rows(losses, titles, baselines)]:
        yield markdown_table(["difference", "pairs", *tokens, "p"], rows)
    seeds = sorted({seed for of in losses.values() for seed in of[ALL_TOKENS]})
    rows = [[str(seed), *(_loss(losses[name][ALL_TOKENS].get(seed)) for name in names)] for seed in seeds]
    yield markdown_table(["seed", *titles.values()], rows)


def _mean_rows(losses: Losses, titles: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the mean losses of each variant."""
    for name, bands in losses.items():
        means = [f"{mean([*of_band.values()]):.4f}" for of_band in bands.values()]
        yield [titles[name], str(len(bands[ALL_TOKENS])), *means]


def _difference_rows(losses: Losses, titles: Mapping[str, str], baselines: Sequence[str]) -> Iterator[list[str]]:
    """Yield the differences of each variant to each baseline."""
    for name, baseline in itertools.product(losses, baselines):
        if name == baseline:
            continue
        own, theirs = losses[name], losses[baseline]
        paired = {band: paired_difference(own[band], theirs[band]) for band in own}
        p = paired[ALL_TOKENS].p
        cells = (f"{estimate:+.4f}" for estimate in paired.values())
        title = f"{titles[name]} − {titles[baseline]}"
        yield [title, str(paired[ALL_TOKENS].n), *cells, "–" if math.isnan(p) else f"{p:.3f}"]


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


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


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is aligned left and whose other columns are aligned right."""
    rows = [*rows]
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
