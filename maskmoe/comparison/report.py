"""The report of a comparison: Markdown with plots, made from its results alone."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from maskmoe.cli import atomic_output
from maskmoe.comparison.plots import draw_plots
from maskmoe.comparison.results import Estimate, Results, RunResult, VariantResult, paired_difference
from maskmoe.workflow.markdown import markdown_table

_KINDS = """\
A mixture-of-experts layer has several feed-forward networks, the experts, and sends each token through one of them.
The variants differ in who decides which:

- **Dense**: there are no experts; one feed-forward network of an expert's size for all tokens.
- **SMoE** (Switch): a learned router chooses among all experts.
- **Hash**: a table, fixed before training, gives each id of the vocabulary one expert.
- **MaskMoE**: a table gives each id its *visible* experts. The most frequent ids, which together make up a share P of
  the text, see V_f experts, and a learned router chooses among these; every other id sees one.

`uniform` tables are drawn at random; `balanced` ones even out how many tokens the experts get; `rank-local` ones also
keep all visible experts of an id on one GPU. Each layer has a table of its own unless it says otherwise. A *shared
expert* takes all tokens in addition; it and the routed ones are then half as wide. All variants have the same number
of active parameters, those that a token passes through, but for the routers'."""

_HOW = """\
Every variant is trained on the same tokens; runs of a seed see them in the same order. Learning rates were chosen by
short runs of the first seed. *Loss* is the mean of −ln p of the next token on held-out text, *perplexity* its
exponential. ± is the standard error over seeds. Differences are taken seed by seed; **bold** ones differ from 0 with
95 % confidence (Student's t, which asks much of two or three seeds); of variants with one seed this cannot be said.
Bands are made by how frequent the *input* token's id is in the text, which is what a table can go by: the most frequent
ids, which make up the top 40 % of all tokens; those that make up the next 50 %; and all others."""


def write_report(results: Results, folder: Path) -> Path:
    """Write README.md, its plots and results.json into a folder, which is made.

    Returns:
        the path of README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = draw_plots(results, folder)
    with atomic_output(folder / "results.json") as path:
        results.save(path)
    with atomic_output(folder / "README.md") as path:
        path.write_text(render_report(results, plots), encoding="utf-8")
    return folder / "README.md"


def render_report(results: Results, plots: dict[str, str]) -> str:
    """The report in Markdown.

    Args:
        results: what to report.
        plots: captions by file name.
    """
    sections = [f"# {results.title}", _made_by(results), "## What is compared", _KINDS, _HOW]
    if results.unfinished:
        sections.append(f"**Unfinished**: {len(results.unfinished)} runs are missing: {', '.join(results.unfinished)}.")
    sections += ["## Perplexity on held-out text", _perplexity_table(results)]
    for name in results.baselines:
        if (baseline := results.variant(name)) is not None:
            sections += [f"## Difference to {baseline.title}", *_differences(results, baseline)]
    if grid := _grid_table(results):
        sections += ["## P and V_f", grid]
    if results.limits:
        sections += ["## The two ends of MaskMoE", _limits(results)]
    sections += ["## Learning rates", _learning_rates(results), "## Plots"]
    sections += [f"### {caption}\n\n![{caption}]({name})" for name, caption in plots.items()]
    return "\n\n".join(sections) + "\n"


def _made_by(results: Results) -> str:
    runs, tokens = len(results.runs), max((variant.tokens for variant in results.variants), default=0)
    hours = sum(run.seconds for run in results.runs) / 3600
    return (
        f"{runs} runs of {tokens:,} tokens, {hours:.1f} hours of training added up, on {results.machine}; made by\n\n"
        f"```bash\n{results.command}\n```"
    )


def _perplexity_table(results: Results) -> str:
    bands = results.band_names()
    shares = {band["name"]: band["share"] for run in results.runs[:1] for band in run.bands}
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
                _estimate(Estimate.of([run.loss for run in runs]), ".4f"),
                _estimate(Estimate.of([math.exp(run.loss) for run in runs]), ".3f"),
                *(_estimate(Estimate.of([math.exp(_band_loss(run, name)) for run in runs]), ".2f") for name in bands),
            ]
        )
    of_tokens = ", ".join(f"{name}: {share:.0%}" for name, share in shares.items())
    return f"{markdown_table(header, rows)}\n\nShare of the held-out tokens by band: {of_tokens}."


def _differences(results: Results, baseline: VariantResult) -> Iterator[str]:
    bands = results.band_names()
    rows, better, worse, open_ = [], [], [], []
    for variant in results.of_role("main"):
        difference = paired_difference(results, variant.name, baseline.name, lambda run: run.loss)
        if variant == baseline or difference is None:
            continue
        of_bands = [paired_difference(results, variant.name, baseline.name, _of_band(name)) for name in bands]
        rows.append([variant.title, *map(_difference, (difference, *of_bands)), str(difference.num)])
        if difference.num > 1:
            verdict = open_ if not difference.is_resolved else better if difference.mean < 0 else worse
            verdict.append(variant.title)
    yield f"Loss minus that of {baseline.title}; below 0 is better."
    yield markdown_table(["variant", "all tokens", *(f"ids of {name}" for name in bands), "seeds"], rows)
    for words, titles in (("Better", better), ("Worse", worse), ("Not resolved", open_)):
        if titles:
            yield f"{words}: {'; '.join(titles)}."


def _grid_table(results: Results) -> str | None:
    grid = results.of_role("grid")
    if not grid:
        return None
    base = next(v for v in results.of_role("main") if grid[0].name.startswith(f"{v.name}."))
    seed = results.runs_of(grid[0].name)[0].seed
    rows = []
    for variant in sorted((base, *grid), key=_place_in_grid):
        of_seed = [run for run in results.runs_of(variant.name) if run.seed == seed]
        if not of_seed:
            continue
        differences = [
            paired_difference(_only(results, seed), variant.name, name, lambda run: run.loss)
            for name in results.baselines
        ]
        rows.append(
            [
                f"{variant.number('frequent-mass'):.0%}",
                f"{variant.number('frequent-visible-experts'):.0f}",
                f"{of_seed[0].loss:.4f}",
                f"{math.exp(of_seed[0].loss):.3f}",
                *(f"{difference.mean:+.4f}" if difference else "–" for difference in differences),
            ]
        )
    titles = [variant.title for name in results.baselines if (variant := results.variant(name))]
    header = ["P", "V_f", "loss", "perplexity", *(f"− {title}" for title in titles)]
    return f"{base.title}; seed {seed} alone.\n\n{markdown_table(header, rows)}"


def _place_in_grid(variant: VariantResult) -> tuple[float, float]:
    return variant.number("frequent-mass"), variant.number("frequent-visible-experts")


def _only(results: Results, seed: int) -> Results:
    return replace(results, runs=[run for run in results.runs if run.seed == seed])


def _limits(results: Results) -> str:
    lines = []
    for limit in results.limits:
        equal = limit.num_equal == limit.iterations > 0
        other = results.variant(limit.equals)
        verdict = "the same to the last bit" if equal else f"**DIFFERENT** in {limit.iterations - limit.num_equal}"
        lines.append(
            f"- {limit.title} against {other.title if other else limit.equals}, seed {limit.seed}: training losses of "
            f"{limit.iterations} iterations, {verdict}."
        )
    return "\n".join(lines)


def _learning_rates(results: Results) -> str:
    tuned = [variant for variant in results.variants if variant.tuning]
    if not tuned:
        return "One for all: " + ", ".join(sorted({variant.learning_rate for variant in results.variants})) + "."
    rates = sorted({rate for variant in tuned for rate in variant.tuning}, key=float)
    rows = [
        [variant.title, *(_tuning_loss(variant, rate) for rate in rates), variant.learning_rate] for variant in tuned
    ]
    note = "Held-out loss of short runs."
    if edge := [variant.title for variant in tuned if variant.learning_rate in (rates[0], rates[-1])]:
        note += f" At the edge of what was tried, so that another may be better: {'; '.join(edge)}."
    return f"{note}\n\n{markdown_table(['variant', *rates, 'chosen'], rows)}"


def _tuning_loss(variant: VariantResult, rate: str) -> str:
    loss = variant.tuning.get(rate)
    return "diverged" if loss is None else f"{loss:.4f}"


def _band_loss(run: RunResult, name: str) -> float:
    return next(band["loss"] for band in run.bands if band["name"] == name)


def _of_band(name: str) -> Callable[[RunResult], float]:
    return lambda run: _band_loss(run, name)


def _estimate(estimate: Estimate, form: str) -> str:
    error = f" ± {estimate.standard_error:{form}}" if estimate.num > 1 else ""
    return f"{estimate.mean:{form}}{error}"


def _difference(estimate: Estimate) -> str:
    text = f"{estimate.mean:+.4f}" + (f" ± {estimate.standard_error:.4f}" if estimate.num > 1 else "")
    return f"**{text}**" if estimate.is_resolved else text
