"""The report of a comparison: Markdown with plots, made from its results alone."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from maskmoe.comparison.answers import answers, summarize_routers
from maskmoe.comparison.markdown import render
from maskmoe.comparison.plots import draw_plots, overview_variants
from maskmoe.comparison.results import Estimate, Results, VariantResult, differences_to, loss_on, paired_difference
from maskmoe.comparison.run_results import RunResult
from maskmoe.files.outputs import atomic_output


def write_report(results: Results, folder: Path) -> Path:
    """Write README.md and its plots into a folder, which is created if missing.

    Returns:
        the path of README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = draw_plots(results, folder)
    with atomic_output(folder / "README.md") as path:
        path.write_text(render_report(results, plots), encoding="utf-8")
    return folder / "README.md"


def render_report(results: Results, plots: dict[str, str]) -> str:
    """Return the report in Markdown.

    Args:
        results: the results.
        plots: captions of the plots by file name.
    """
    return render(
        "comparison.md.j2",
        results=results,
        tokens=max((variant.tokens for variant in results.variants), default=0),
        loss=lambda runs: Estimate.of([run.loss for run in runs]),
        further_loss=_further_loss,
        perplexity=_perplexity,
        differences_to=differences_to,
        answers=answers(results),
        overview=overview_variants(results),
        routers=summarize_routers(results),
        method=results.variant(results.method),
        difference=partial(_difference, results),
        rates=sorted({rate for variant in results.variants for rate in variant.tuning}, key=float),
        plots=plots,
    )


def _difference(results: Results, variant: VariantResult, baseline: VariantResult, held_out: str | None) -> str:
    """Return the difference of two variants on a held-out text, in bold if it is resolved; empty if there is none."""
    difference = paired_difference(results, variant.name, baseline.name, loss_on(held_out))
    if variant == baseline or difference is None:
        return ""
    return f"**{difference:+.4f}**" if difference.is_resolved else f"{difference:+.4f}"


def _perplexity(runs: Sequence[RunResult], band: str | None = None) -> Estimate:
    return Estimate.of([math.exp(run.loss_of(band)) for run in runs])


def _further_loss(runs: Sequence[RunResult], name: str) -> Estimate | None:
    """Return the loss of a further held-out text over the runs that have it; None if no run has it."""
    losses = [held_out.loss for run in runs if (held_out := run.held_out(name))]
    return Estimate.of(losses) if losses else None
