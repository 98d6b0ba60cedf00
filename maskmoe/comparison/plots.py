"""The plots of a comparison."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """Write all plots for which there are results.

    Returns:
        captions by file name.
    """
    plots: dict[str, tuple[str, Callable[[Results], Figure | None]]] = {
        "loss_curves.png": ("Loss on held-out text during training", _loss_curves),
        "bands.png": ("Where the variants differ: loss by frequency of the input token's id", _bands),
        "expert_load.png": ("Load of the experts on held-out text", _expert_load),
        "entropy.png": ("How undecided the routers are: entropy of their choice, by layer", _entropy),
        "fluctuation.png": ("Routing fluctuation: tokens of a fixed text whose expert changes", _fluctuation),
        "distinct_experts.png": ("Number of experts that process the occurrences of one id", _distinct_experts),
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


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure whose size is given in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def tidy(axes: "Axes") -> None:
    """Draw a light grid behind the data and remove the upper and right border."""
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: "Figure", axes: "Sequence[Axes] | np.ndarray", columns: int = 3) -> "Figure":
    """Tidy all axes and put the legend of the first axes below the figure."""
    for each in axes:
        tidy(each)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _pair_of_axes(figure: "Figure", *, share_y: bool = False) -> "tuple[Axes, Axes]":
    left, right = figure.subplots(1, 2, sharey=share_y, squeeze=False)[0]
    return left, right


def _grid_of_axes(
    width: float, height: float, extra: float, num: int, *, share: bool = False
) -> "tuple[Figure, np.ndarray]":
    """Return a figure and at least `num` axes, [rows, up to 4 columns], of which the surplus ones are hidden.

    Args:
        width: width of each axes in inches.
        height: height of each axes in inches.
        extra: further height of the figure in inches.
        num: number of axes needed.
        share: whether all axes have the same scales.
    """
    columns = min(4, num)
    rows = -(-num // columns)
    figure = new_figure(max(6.0, width * columns), height * rows + extra)
    all_axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    for axes in all_axes.flat[num:]:
        axes.set_visible(False)
    return figure, all_axes


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    """Return line styles by name of the main variants."""
    names = [variant.name for variant in results.of_role("main")]
    return {
        name: {"color": _COLORS[i % len(_COLORS)], "linestyle": _DASHES[i // len(_COLORS) % len(_DASHES)]}
        for i, name in enumerate(names)
    }


def _held_out_losses(runs: Iterable[RunResult]) -> tuple[list[int], np.ndarray]:
    """Return the iterations with a held-out loss in all runs, and the losses, [runs, iterations]."""
    curves = [dict(zip(run.validation.iterations, run.validation.losses, strict=True)) for run in runs]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    return common, np.array([[curve[iteration] for iteration in common] for curve in curves])


def _loss_curves(results: Results) -> "Figure | None":
    baseline = results.variant(results.baselines[0])
    if baseline is None:
        return None
    styles = _styles(results)
    figure = new_figure(12, 5)
    left, right = _pair_of_axes(figure)
    for variant in results.of_role("main"):
        style = styles[variant.name]
        iterations, losses = _held_out_losses(results.runs_of(variant.name))
        left.plot(iterations, losses.mean(axis=0), label=variant.title, **style)
        points = list(_differences_by_iteration(results, variant.name, baseline.name))
        if points and variant != baseline:
            steps, means, errors = np.array(points).T
            right.plot(steps, means, **style)
            right.fill_between(steps, means - errors, means + errors, color=style["color"], alpha=0.15, linewidth=0)
    left.set(xlabel="iteration", ylabel="loss (nats per token)", yscale="log")
    left.yaxis.set_major_formatter("{x:.1f}")
    left.yaxis.set_minor_formatter("{x:.1f}")
    right.axhline(0, color=styles[baseline.name]["color"], linewidth=1)
    right.set(xlabel="iteration", ylabel=f"loss minus the loss of {baseline.title}, ± standard error")
    return _finish(figure, (left, right))


def _differences_by_iteration(results: Results, name: str, baseline: str) -> Iterator[tuple[float, float, float]]:
    """Yield iteration, mean difference of held-out losses, and its standard error (0 for a single pair)."""
    iterations, _ = _held_out_losses([*results.runs_of(name), *results.runs_of(baseline)])
    for iteration in iterations:
        difference = paired_difference(results, name, baseline, _held_out_loss_at(iteration))
        if difference is not None:
            yield iteration, difference.mean, float(np.nan_to_num(difference.standard_error))


def _held_out_loss_at(iteration: int) -> Callable[[RunResult], float]:
    return lambda run: run.validation.losses[run.validation.iterations.index(iteration)]


def _bands(results: Results) -> "Figure | None":
    names, baselines = results.band_names(), results.baseline_variants
    if not names or not baselines:
        return None
    variants = results.of_role("main")
    figure = new_figure(12, 1.2 + 0.42 * len(variants))
    all_axes = figure.subplots(1, len(baselines), sharey=True, squeeze=False)[0]
    values: dict[str, Callable[[RunResult], float]] = {"all": lambda run: run.loss}
    values |= {f"ids of {name}": lambda run, name=name: run.band_loss(name) for name in names}
    offsets = np.linspace(-0.27, 0.27, len(values))
    for axes, baseline in zip(all_axes, baselines, strict=True):
        for (label, value), offset, color in zip(values.items(), offsets, ("black", *_COLORS[1:]), strict=False):
            marker = {"color": color, "marker": "o", "linestyle": "none"}
            for row, variant in enumerate(variants):
                difference = paired_difference(results, variant.name, baseline.name, value)
                if difference is not None and variant != baseline:
                    error = np.nan_to_num(difference.standard_error)
                    axes.errorbar(difference.mean, row + offset, xerr=error, markersize=4, **marker)
            axes.plot([], [], label=label, **marker)
        axes.axvline(0, color="#8a8a8a", linewidth=1)
        axes.set_yticks(range(len(variants)), [variant.title for variant in variants])
        axes.set(xlabel=f"loss minus the loss of {baseline.title} (left is better)")
    all_axes[0].invert_yaxis()
    return _finish(figure, all_axes, columns=4)


def _expert_load(results: Results) -> "Figure | None":
    first_runs = {variant.title: results.runs_of(variant.name)[0] for variant in results.of_role("main")}
    first_runs = {title: run for title, run in first_runs.items() if run.load}
    if not first_runs:
        return None
    figure, all_axes = _grid_of_axes(3.1, 1.9, 0.6, len(first_runs))
    image = None
    for axes, (title, run) in zip(all_axes.flat, first_runs.items(), strict=False):
        load = np.array(run.load, dtype=float)  # [layers, experts]
        load /= load.mean(axis=1, keepdims=True)
        image = axes.imshow(load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
        axes.set_title(f"{title}\nmax/mean {load.max(axis=1).mean():.2f}", fontsize=8)
        axes.set_yticks(range(len(load)), range(1, len(load) + 1), fontsize=7)
        axes.set_xticks([])
        axes.set_xlabel("expert", fontsize=7)
        axes.set_ylabel("layer", fontsize=7)
    assert image is not None
    figure.colorbar(image, ax=all_axes, label="tokens, as a multiple of the mean", shrink=0.8)
    return figure


def _routing_histories(
    results: Results, *, with_choice: bool = False
) -> list[tuple[VariantResult, list[RoutingHistory]]]:
    """Return the main variants with experts, each with the routing of all its runs.

    Args:
        results: all results.
        with_choice: whether to omit variants whose routers have no choice.
    """
    found = []
    for variant in results.of_role("main"):
        histories = [run.routing for run in results.runs_of(variant.name) if run.routing]
        if histories and (histories[0].has_choice or not with_choice):
            found.append((variant, histories))
    return found


def _mean_of_runs(values: Iterable[Sequence[Sequence[float | None]]]) -> np.ndarray:
    """Return the mean over runs of numbers by checkpoint and layer, [checkpoints, layers]."""
    return np.mean([np.array(of_run, dtype=float) for of_run in values], axis=0)


def _entropy(results: Results) -> "Figure | None":
    variants = _routing_histories(results, with_choice=True)
    if not variants:
        return None
    styles = _styles(results)
    layers = variants[0][1][0].layers
    figure, all_axes = _grid_of_axes(3.4, 3.2, 0.8, len(layers), share=True)
    for variant, histories in variants:
        entropy = _mean_of_runs(history.entropy for history in histories)
        for axes, of_layer in zip(all_axes.flat, entropy.T, strict=False):
            axes.plot(histories[0].iterations, of_layer, label=variant.title, marker=".", **styles[variant.name])
    for axes, layer in zip(all_axes.flat, layers, strict=False):
        axes.set(title=f"layer {layer}", xlabel="iteration")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("entropy (nats)")
        axes.set_ylim(bottom=0)
    return _finish(figure, all_axes.flat[: len(layers)])


def _fluctuation(results: Results) -> "Figure | None":
    variants = _routing_histories(results, with_choice=True)
    if not variants:
        return None
    styles = _styles(results)
    figure = new_figure(11, 4.5)
    left, right = _pair_of_axes(figure, share_y=True)
    for variant, histories in variants:
        of_all = _mean_of_runs(history.fluctuation for history in histories)
        of_routable = _mean_of_runs(history.routable_fluctuation for history in histories)
        for axes, shares in ((left, of_all), (right, of_routable)):
            percent = 100 * shares.mean(axis=1)
            axes.plot(histories[0].iterations[1:], percent, label=variant.title, marker=".", **styles[variant.name])
    left.set(title="all tokens", xlabel="iteration", ylabel="% whose expert changed since the last checkpoint")
    right.set(title="tokens with two or more visible experts", xlabel="iteration")
    left.set_ylim(bottom=0)
    return _finish(figure, (left, right))


def _distinct_experts(results: Results) -> "Figure | None":
    variants = _routing_histories(results)
    if not variants:
        return None
    bands = results.band_names()
    figure = new_figure(9, 1.2 + 0.34 * len(variants))
    axes = figure.subplots()
    height = 0.8 / len(bands)
    for index, band in enumerate(bands):
        # A band without occurrences has the mean nan, which draws no bar.
        values = [
            np.mean([np.mean(np.array(history.distinct_experts[band], dtype=float)) for history in histories])
            for _, histories in variants
        ]
        rows = np.arange(len(variants)) + (index - (len(bands) - 1) / 2) * height
        axes.barh(rows, values, height=height, color=_COLORS[index + 1], label=f"ids of {band}")
    axes.set_yticks(range(len(variants)), [variant.title for variant, _ in variants])
    axes.invert_yaxis()
    axes.set_xlabel("distinct experts that an id's occurrences were sent to, mean over ids and layers")
    return _finish(figure, (axes,))


def _grid(results: Results) -> "Figure | None":
    grid = results.of_role("grid")
    if not grid:
        return None
    seed, base = results.runs_of(grid[0].name)[0].seed, results.grid_base
    points = {
        (variant.number("frequent-mass"), int(variant.number("frequent-visible-experts"))): run.loss
        for variant in (base, *grid)
        for run in results.runs_of(variant.name)
        if run.seed == seed
    }
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    for index, num_visible in enumerate(sorted({num_visible for _, num_visible in points})):
        curve = sorted((mass, loss) for (mass, number), loss in points.items() if number == num_visible)
        percent, losses = 100 * np.array(curve).T[0], np.array(curve).T[1]
        label = f"{base.title}, V_f = {num_visible}"
        axes.plot(percent, np.exp(losses), color=_COLORS[4 + index], marker="o", label=label)
    for baseline, dashes in zip(results.baseline_variants, ("--", ":", "-."), strict=False):
        for run in results.runs_of(baseline.name):
            if run.seed == seed:
                color = _styles(results)[baseline.name]["color"]
                axes.axhline(float(np.exp(run.loss)), color=color, linestyle=dashes, label=baseline.title)
    axes.set(xlabel="P (% of the text that frequent ids make up)", ylabel=f"perplexity, seed {seed}")
    axes.legend(frameon=False)
    tidy(axes)
    return figure


def _learning_rates(results: Results) -> "Figure | None":
    tuned = [variant for variant in results.of_role("main") if len(variant.tuning) > 1]
    if not tuned:
        return None
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for variant in tuned:
        points = sorted((float(rate), loss) for rate, loss in variant.tuning.items() if loss is not None)
        rates, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(rates, losses, label=variant.title, marker="o", **_styles(results)[variant.name])
    axes.set(xlabel="largest learning rate", ylabel="held-out loss of a short run", xscale="log")
    tried = sorted({float(rate) for variant in tuned for rate in variant.tuning})
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False)
    tidy(axes)
    return figure
