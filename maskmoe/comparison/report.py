"""The report of a comparison: Markdown with plots, made from its results alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maskmoe.cli import atomic_output
from maskmoe.comparison.markdown import render
from maskmoe.comparison.plots import draw_plots
from maskmoe.comparison.results import Estimate, Results, VariantResult, paired_difference


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        header: titles of the columns.
        rows: cells of each row.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Difference:
    """How all variants differ from one baseline.

    Attributes:
        title: title of the baseline.
        table: differences of each variant.
        verdicts: titles of the variants by verdict: `Better`, `Worse`, `Not resolved`.
    """

    title: str
    table: Table
    verdicts: dict[str, list[str]]


def write_report(results: Results, folder: Path) -> Path:
    """Write README.md, its plots and results.json into a folder, which is created if missing.

    Returns:
        the path of README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = draw_plots(results, folder)
    results.save(folder / "results.json")
    with atomic_output(folder / "README.md") as path:
        path.write_text(render_report(results, plots), encoding="utf-8")
    return folder / "README.md"


def render_report(results: Results, plots: dict[str, str]) -> str:
    """Return the report in Markdown.

    Args:
        results: the results.
        plots: captions of the plots by file name.
    """
    bands = results.runs[0].bands if results.runs else []
    return render(
        "comparison.md.j2",
        results=results,
        tokens=max((variant.tokens for variant in results.variants), default=0),
        hours=sum(run.seconds for run in results.runs) / 3600,
        perplexity=_perplexity_table(results),
        shares=[f"{band.name}: {band.share:.0%}" for band in bands],
        differences=[_difference_to(results, baseline) for baseline in results.baseline_variants],
        grid=_grid_table(results) if results.of_role("grid") else None,
        grid_seed=_grid_seed(results) if results.of_role("grid") else None,
        learning_rates=_learning_rate_table(results),
        edge=[variant.title for variant in _tuned(results) if variant.learning_rate in _edge_rates(results)],
        plots=plots,
    )


def _perplexity_table(results: Results) -> Table:
    bands = results.band_names()
    header = ["variant", "parameters", "active", "seeds", "loss", "perplexity", *(f"ids of {name}" for name in bands)]
    rows = []
    for variant in results.of_role("main"):
        runs = results.runs_of(variant.name)
        parameters = variant.parameters
        rows.append(
            [
                variant.title,
                f"{parameters.total:,}" if parameters else "–",
                f"{parameters.active:,}" if parameters else "–",
                str(len(runs)),
                _estimate([run.loss for run in runs], ".4f"),
                _estimate([math.exp(run.loss) for run in runs], ".3f"),
                *(_estimate([math.exp(run.band_loss(name)) for run in runs], ".2f") for name in bands),
            ]
        )
    return Table(header, rows)


def _difference_to(results: Results, baseline: VariantResult) -> Difference:
    bands = results.band_names()
    rows = []
    verdicts: dict[str, list[str]] = {"Better": [], "Worse": [], "Not resolved": []}
    for variant in results.of_role("main"):
        difference = paired_difference(results, variant.name, baseline.name, lambda run: run.loss)
        if variant == baseline or difference is None:
            continue
        of_bands = [
            paired_difference(results, variant.name, baseline.name, lambda run, name=name: run.band_loss(name))
            for name in bands
        ]
        cells = [_difference(estimate) for estimate in (difference, *of_bands) if estimate is not None]
        rows.append([variant.title, *cells, str(difference.num)])
        if difference.num > 1:
            sign = "Better" if difference.mean < 0 else "Worse"
            verdicts[sign if difference.is_resolved else "Not resolved"].append(variant.title)
    header = ["variant", "all tokens", *(f"ids of {name}" for name in bands), "seeds"]
    return Difference(baseline.title, Table(header, rows), verdicts)


def _grid_seed(results: Results) -> int:
    return results.runs_of(results.of_role("grid")[0].name)[0].seed


def _grid_table(results: Results) -> Table:
    """Return a table of the runs of one seed, by P and V_f."""
    seed = _grid_seed(results)
    of_seed = replace(results, runs=[run for run in results.runs if run.seed == seed])
    points = {
        (variant.number("frequent-mass"), variant.number("frequent-visible-experts")): run
        for variant in (results.grid_base, *results.of_role("grid"))
        for run in of_seed.runs_of(variant.name)
    }
    rows = []
    for (mass, num_visible), run in sorted(points.items(), key=lambda point: point[0]):
        differences = [
            paired_difference(of_seed, run.variant, baseline.name, lambda run: run.loss)
            for baseline in results.baseline_variants
        ]
        rows.append(
            [
                f"{mass:.0%}",
                f"{num_visible:.0f}",
                f"{run.loss:.4f}",
                f"{math.exp(run.loss):.3f}",
                *(f"{difference.mean:+.4f}" if difference else "–" for difference in differences),
            ]
        )
    return Table(["P", "V_f", "loss", "perplexity", *(f"− {each.title}" for each in results.baseline_variants)], rows)


def _tuned(results: Results) -> list[VariantResult]:
    return [variant for variant in results.variants if variant.tuning]


def _tried_rates(results: Results) -> list[str]:
    return sorted({rate for variant in _tuned(results) for rate in variant.tuning}, key=float)


def _edge_rates(results: Results) -> set[str]:
    rates = _tried_rates(results)
    return {rates[0], rates[-1]} if rates else set()


def _learning_rate_table(results: Results) -> Table | None:
    """Return the losses of short runs by learning rate; None if no variant was tuned."""
    rates = _tried_rates(results)
    rows = [
        [variant.title, *(_tuning_loss(variant.tuning.get(rate)) for rate in rates), variant.learning_rate]
        for variant in _tuned(results)
    ]
    return Table(["variant", *rates, "chosen"], rows) if rows else None


def _tuning_loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def _estimate(values: Sequence[float], form: str) -> str:
    """Format a mean over seeds with its standard error, if there are several seeds."""
    estimate = Estimate.of(values)
    error = f" ± {estimate.standard_error:{form}}" if estimate.num > 1 else ""
    return f"{estimate.mean:{form}}{error}"


def _difference(estimate: Estimate) -> str:
    text = f"{estimate.mean:+.4f}" + (f" ± {estimate.standard_error:.4f}" if estimate.num > 1 else "")
    return f"**{text}**" if estimate.is_resolved else text
