"""The plots of a comparison."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskmoe.cli import atomic_output
from maskmoe.comparison.results import Results, RoutingHistory, RunResult, VariantResult, paired_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#6b6b6b", "#d9822b", "#8e5bb5", "#c0392b", "#5aa9e6", "#1f4e9c", "#2a9d5c", "#b08d57", "#17becf", "#e377c2")
_DASHES = ("-", "--", ":")


def draw_plots(results: Results, folder: Path) -> dict[str, str]:
    """Write the plots for which there are results.

    Returns:
        captions by file name.
    """
    plots = {
        "loss_curves.png": ("Loss on held-out text during training", _loss_curves),
        "bands.png": ("Where the variants differ: loss by frequency of the input token's id", _bands),
        "expert_load.png": ("Load of the experts on held-out text", _expert_load),
        "entropy.png": ("How undecided the routers are: entropy of their choice, by layer", _entropy),
        "fluctuation.png": ("Routing fluctuation: tokens of a fixed text whose expert changes", _fluctuation),
        "distinct_experts.png": ("Experts that the occurrences of one id spread over", _distinct_experts),
        "grid.png": ("Perplexity over P and V_f", _grid),
        "learning_rates.png": ("Choice of the learning rate", _learning_rates),
    }
    captions = {}
    for name, (caption, draw) in plots.items():
        figure = draw(results)
        if figure is not None:
            with atomic_output(folder / name) as path:
                figure.savefig(path, format="png")
            captions[name] = caption
    return captions


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _tidy(axes: "Axes") -> None:
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    """Line styles by name of main variants."""
    names = [variant.name for variant in results.of_role("main")]
    return {
        name: {"color": _COLORS[i % len(_COLORS)], "linestyle": _DASHES[i // len(_COLORS) % len(_DASHES)]}
        for i, name in enumerate(names)
    }


def _mean_curve(runs: Sequence[RunResult]) -> tuple[list[int], np.ndarray]:
    """Iterations that all runs have a held-out loss of, and the losses, [runs, iterations]."""
    curves = [dict(zip(run.validation.iterations, run.validation.losses, strict=True)) for run in runs]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    return common, np.array([[curve[iteration] for iteration in common] for curve in curves])


def _loss_curves(results: Results) -> "Figure | None":
    baseline = results.baselines[0]
    if not results.runs_of(baseline):
        return None
    figure = _new_figure(12, 5)
    left, right = figure.subplots(1, 2)
    for variant in results.of_role("main"):
        style = _styles(results)[variant.name]
        iterations, losses = _mean_curve(results.runs_of(variant.name))
        left.plot(iterations, losses.mean(axis=0), label=variant.title, **style)
        points = list(_differences_by_iteration(results, variant.name, baseline))
        if points and variant.name != baseline:
            steps, means, errors = map(np.array, zip(*points, strict=True))
            right.plot(steps, means, **style)
            right.fill_between(steps, means - errors, means + errors, color=style["color"], alpha=0.15, linewidth=0)
    left.set(xlabel="iteration", ylabel="loss (nats per token)", yscale="log")
    left.yaxis.set_major_formatter("{x:.1f}")
    left.yaxis.set_minor_formatter("{x:.1f}")
    right.axhline(0, color=_styles(results)[baseline]["color"], linewidth=1)
    title = results.variant(baseline).title
    right.set(xlabel="iteration", ylabel=f"loss minus that of {title}, ± standard error")
    for axes in (left, right):
        _tidy(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _differences_by_iteration(results: Results, name: str, baseline: str) -> Iterator[tuple[int, float, float]]:
    """Iteration, mean difference and its standard error (0 if there is one pair only)."""
    iterations, _ = _mean_curve([*results.runs_of(name), *results.runs_of(baseline)])
    for iteration in iterations:
        difference = paired_difference(results, name, baseline, _validation_at(iteration))
        if difference is not None:
            yield iteration, difference.mean, np.nan_to_num(difference.standard_error)


def _validation_at(iteration: int) -> Callable[[RunResult], float]:
    return lambda run: run.validation.losses[run.validation.iterations.index(iteration)]


def _bands(results: Results) -> "Figure | None":
    names = results.band_names()
    baselines = [variant for name in results.baselines if (variant := results.variant(name))]
    if not names or not baselines:
        return None
    variants = results.of_role("main")
    figure = _new_figure(12, 1.2 + 0.42 * len(variants))
    all_axes = figure.subplots(1, len(baselines), sharey=True, squeeze=False)[0]
    columns = {"all": lambda run: run.loss} | {name: _band(name) for name in names}
    offsets = np.linspace(-0.27, 0.27, len(columns))
    for axes, baseline in zip(all_axes, baselines, strict=True):
        for (label, value), offset, color in zip(columns.items(), offsets, ("black", *_COLORS[1:]), strict=False):
            for row, variant in enumerate(variants):
                difference = paired_difference(results, variant.name, baseline.name, value)
                if difference is not None and variant != baseline:
                    axes.errorbar(
                        difference.mean,
                        row + offset,
                        xerr=np.nan_to_num(difference.standard_error),
                        color=color,
                        marker="o",
                        markersize=4,
                        linestyle="none",
                    )
            axes.plot(
                [], [], color=color, marker="o", linestyle="none", label=label if label == "all" else f"ids of {label}"
            )
        axes.axvline(0, color="#8a8a8a", linewidth=1)
        axes.set_yticks(range(len(variants)), [variant.title for variant in variants])
        axes.set(xlabel=f"loss minus that of {baseline.title} (left is better)")
        _tidy(axes)
    all_axes[0].invert_yaxis()
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _band(name: str) -> Callable[[RunResult], float]:
    return lambda run: next(band["loss"] for band in run.bands if band["name"] == name)


def _expert_load(results: Results) -> "Figure | None":
    variants = [variant for variant in results.of_role("main") if results.runs_of(variant.name)[0].load]
    if not variants:
        return None
    columns = min(4, len(variants))
    rows = -(-len(variants) // columns)
    figure = _new_figure(3.1 * columns, 1.9 * rows + 0.6)
    all_axes = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in all_axes.flat[len(variants) :]:
        axes.set_visible(False)
    for axes, variant in zip(all_axes.flat, variants, strict=False):
        run = results.runs_of(variant.name)[0]
        load = np.array(run.load, dtype=float)  # [layers, experts]
        load /= load.mean(axis=1, keepdims=True)
        image = axes.imshow(load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
        axes.set_title(f"{variant.title}\nmax/mean {load.max(axis=1).mean():.2f}", fontsize=8)
        axes.set_yticks(range(len(load)), range(1, len(load) + 1), fontsize=7)
        axes.set_xticks([])
        axes.set_xlabel("expert", fontsize=7)
        axes.set_ylabel("layer", fontsize=7)
    figure.colorbar(image, ax=all_axes, label="tokens, as a multiple of the mean", shrink=0.8)
    return figure


def _routed(results: Results) -> list[VariantResult]:
    """Main variants in which a router has a choice."""
    return [
        variant
        for variant in results.of_role("main")
        if (routing := results.runs_of(variant.name)[0].routing) and routing.has_choice
    ]


def _mean_of_runs(
    results: Results, name: str, value: Callable[[RoutingHistory], Sequence[Sequence[float | None]]]
) -> np.ndarray:
    """Mean over the runs of a variant of numbers by checkpoint and layer, [checkpoints, layers]."""
    return np.mean([np.array(value(run.routing), dtype=float) for run in results.runs_of(name)], axis=0)


def _entropy(results: Results) -> "Figure | None":
    variants = _routed(results)
    if not variants:
        return None
    layers = results.runs_of(variants[0].name)[0].routing.layers
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = _new_figure(max(6.0, 3.4 * columns), 3.2 * rows + 0.8)
    all_axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in all_axes.flat[len(layers) :]:
        axes.set_visible(False)
    for variant in variants:
        iterations = results.runs_of(variant.name)[0].routing.iterations
        entropy = _mean_of_runs(results, variant.name, lambda routing: routing.entropy)
        for axes, of_layer in zip(all_axes.flat, entropy.T, strict=False):
            axes.plot(iterations, of_layer, label=variant.title, marker=".", **_styles(results)[variant.name])
    for axes, layer in zip(all_axes.flat, layers, strict=False):
        axes.set(title=f"layer {layer}", xlabel="iteration")
        _tidy(axes)
    for axes in all_axes[:, 0]:
        axes.set_ylabel("entropy (nats)")
        axes.set_ylim(bottom=0)
    handles = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _fluctuation(results: Results) -> "Figure | None":
    variants = _routed(results)
    if not variants:
        return None
    figure = _new_figure(11, 4.5)
    left, right = figure.subplots(1, 2, sharey=True)
    for variant in variants:
        iterations = results.runs_of(variant.name)[0].routing.iterations[1:]
        of_all = _mean_of_runs(results, variant.name, lambda routing: routing.fluctuation)
        of_routable = _mean_of_runs(results, variant.name, lambda routing: routing.routable_fluctuation)
        for axes, shares in ((left, of_all), (right, of_routable)):
            percent = 100 * shares.mean(axis=1)
            axes.plot(iterations, percent, label=variant.title, marker=".", **_styles(results)[variant.name])
    left.set(title="of all tokens", xlabel="iteration", ylabel="% whose expert changed since the last checkpoint")
    right.set(title="of tokens with two or more visible experts", xlabel="iteration")
    left.set_ylim(bottom=0)
    for axes in (left, right):
        _tidy(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _distinct_experts(results: Results) -> "Figure | None":
    variants = [variant for variant in results.of_role("main") if results.runs_of(variant.name)[0].routing]
    if not variants:
        return None
    bands = results.band_names()
    figure = _new_figure(9, 1.2 + 0.34 * len(variants))
    axes = figure.subplots()
    height = 0.8 / len(bands)
    for index, band in enumerate(bands):
        values = [
            np.mean([_distinct_in_band(run, band) for run in results.runs_of(variant.name)]) for variant in variants
        ]
        rows = np.arange(len(variants)) + (index - (len(bands) - 1) / 2) * height
        axes.barh(rows, values, height=height, color=_COLORS[index + 1], label=f"ids of {band}")
    axes.set_yticks(range(len(variants)), [variant.title for variant in variants])
    axes.invert_yaxis()
    axes.set_xlabel("distinct experts that an id's occurrences were sent to, mean over ids and layers")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _tidy(axes)
    return figure


def _distinct_in_band(run: RunResult, band: str) -> float:
    # Not a number where none of the ids occurred, which draws no bar.
    return float(np.array(run.routing.distinct_experts[band], dtype=float).mean())


def _grid(results: Results) -> "Figure | None":
    grid = results.of_role("grid")
    if not grid:
        return None
    seed = results.runs_of(grid[0].name)[0].seed
    base = next(variant for variant in results.of_role("main") if grid[0].name.startswith(f"{variant.name}."))
    points = {
        (variant.number("frequent-mass"), int(variant.number("frequent-visible-experts"))): run.loss
        for variant in (base, *grid)
        for run in results.runs_of(variant.name)
        if run.seed == seed
    }
    figure = _new_figure(7.5, 4.8)
    axes = figure.subplots()
    for index, num_visible in enumerate(sorted({num_visible for _, num_visible in points})):
        curve = sorted((mass, loss) for (mass, number), loss in points.items() if number == num_visible)
        masses, losses = zip(*curve, strict=True)
        axes.plot(
            [100 * mass for mass in masses],
            np.exp(losses),
            color=_COLORS[4 + index],
            marker="o",
            label=f"{base.title}, V_f = {num_visible}",
        )
    for name, dashes in zip(results.baselines, ("--", ":", "-."), strict=False):
        of_seed = [run.loss for run in results.runs_of(name) if run.seed == seed]
        if of_seed:
            color = _styles(results)[name]["color"]
            title = results.variant(name).title
            axes.axhline(np.exp(of_seed[0]), color=color, linestyle=dashes, label=title)
    axes.set(xlabel="P (% of the text that frequent ids make up)", ylabel=f"perplexity, seed {seed}")
    axes.legend(frameon=False)
    _tidy(axes)
    return figure


def _learning_rates(results: Results) -> "Figure | None":
    tuned = [variant for variant in results.of_role("main") if len(variant.tuning) > 1]
    if not tuned:
        return None
    figure = _new_figure(7, 4.5)
    axes = figure.subplots()
    for variant in tuned:
        points = [(float(rate), loss) for rate, loss in variant.tuning.items() if loss is not None]
        axes.plot(*zip(*sorted(points), strict=True), label=variant.title, marker="o", **_styles(results)[variant.name])
    axes.set(xlabel="largest learning rate", ylabel="held-out loss of a short run", xscale="log")
    rates = sorted({float(rate) for variant in tuned for rate in variant.tuning})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False)
    _tidy(axes)
    return figure
