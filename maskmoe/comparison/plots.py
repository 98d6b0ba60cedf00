"""The plots of a comparison."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskmoe.comparison.answers import (
    common_iterations,
    curve_differences,
    differences_during_training,
    grid_differences,
    mean_of_known,
)
from maskmoe.comparison.results import (
    Estimate,
    Results,
    VariantResult,
    differences_to,
)
from maskmoe.comparison.run_results import RoutingHistory, RunResult
from maskmoe.files.outputs import atomic_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#6b6b6b", "#d9822b", "#8e5bb5", "#c0392b", "#5aa9e6", "#1f4e9c", "#2a9d5c", "#b08d57", "#17becf", "#e377c2")
_DASHES = ("-", "--", ":")
_LEGEND_ROW = 0.22  # inches
_LEGEND_CHARACTER = 0.085  # inches, a generous mean
_LEGEND_HANDLE = 0.55  # inches of the line beside a label, with its space

Histories = dict[str, list[RoutingHistory]]
"""The routing of the runs of each variant, by the variant's name."""


def draw_plots(results: Results, folder: Path) -> dict[str, str]:
    """Write all plots for which there are results.

    Returns:
        captions by file name.
    """
    main, baselines = results.of_role("main"), results.baseline_variants if results.bands else []
    first_runs = {variant.title: results.runs_of(variant.name)[0] for variant in main}
    with_experts = {title: run for title, run in first_runs.items() if run.load}
    histories = _routing_histories(results)
    with_choice = {name: of_runs for name, of_runs in histories.items() if of_runs[0].has_choice}
    changing = {name: of_runs for name, of_runs in with_choice.items() if of_runs[0].fluctuation}
    tuned = [variant for variant in main if len(variant.tuning) > 1]
    others = [each for each in results.baseline_variants if each != results.grid_base]
    gridded = {each.title: found for each in others if len(found := grid_differences(results, each)) > 1}
    # Each plot has a name, a caption, a function that draws it, and what the function draws, if there is any.
    plots: list[tuple[str, str, Callable[[Results, Any], Figure], Any]] = [
        ("overview", "Loss on held-out text by the number of training tokens", _overview, overview_variants(results)),
        ("loss_curves", "Loss on held-out text during training", _loss_curves, results.variant(results.baselines[0])),
        ("bands", "Where the variants differ: loss by frequency of the input token's id", _bands, baselines),
        ("expert_load", "Load of the experts on held-out text", _expert_load, with_experts),
        ("entropy", "How undecided the routers are: entropy of their choice, by layer", _entropy, with_choice),
        ("fluctuation", "Routing fluctuation: tokens of a fixed text whose expert changes", _fluctuation, changing),
        ("distinct_experts", "Number of experts that process the occurrences of one id", _distinct_experts, histories),
        ("grid", "Difference to the baselines by P and V_f", _grid, gridded),
        ("learning_rates", "Choice of the learning rate", _learning_rates, tuned),
    ]
    plots += [
        (
            f"curve_{curve.name}",
            f"Difference to the baselines by {curve.title}",
            partial(_curve, curve.title),
            curve_differences(results, curve),
        )
        for curve in results.curves
    ]
    captions = {}
    for name, caption, draw, drawn in plots:
        if drawn:
            with atomic_output(folder / f"{name}.png") as path:
                draw(results, drawn).savefig(path, format="png")
            captions[f"{name}.png"] = caption
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


def _frame(
    num: int, width: float, height: float, extra: float = 0.0, *, is_tidy: bool = True, **options: Any
) -> "tuple[Figure, np.ndarray]":
    """Return a figure and at least `num` axes, [rows, up to 4 columns], of which the surplus ones are hidden.

    Args:
        num: number of axes needed.
        width: width of each axes in inches.
        height: height of each axes in inches.
        extra: further height of the figure in inches.
        is_tidy: whether to call `tidy` for all axes.
        options: further options of `Figure.subplots`.
    """
    columns = min(4, num)
    rows = -(-num // columns)
    figure = new_figure(max(6.0, width * columns), height * rows + extra)
    all_axes = figure.subplots(rows, columns, squeeze=False, **options)
    for index, axes in enumerate(all_axes.flat):
        axes.set_visible(index < num)
        if is_tidy:
            tidy(axes)
    return figure, all_axes


def _with_legend(figure: "Figure", axes: "Axes") -> "Figure":
    """Put the legend of some axes below, in as many columns as fit. The figure grows by the legend's rows."""
    handles, labels = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    longest = _LEGEND_HANDLE + _LEGEND_CHARACTER * max(map(len, labels), default=0)
    columns = min(max(1, int(width / longest)), len(labels) or 1)
    figure.set_size_inches(width, height + _LEGEND_ROW * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    """Return label, color and dashes of the lines of all main variants by the variant's name."""
    styles = itertools.cycle(itertools.product(_DASHES, _COLORS))
    return {
        variant.name: {"label": variant.title, "color": color, "linestyle": dashes}
        for variant, (dashes, color) in zip(results.of_role("main"), styles, strict=False)
    }


def overview_variants(results: Results) -> list[VariantResult]:
    """Return the main variants that were tuned themselves, or all of them if none was tuned."""
    main = results.of_role("main")
    return [variant for variant in main if variant.tuning] or main


def _overview(results: Results, variants: list[VariantResult]) -> "Figure":
    styles = _styles(results)
    figure, ((left, right),) = _frame(2, 6, 5)
    for variant in variants:
        style, runs = styles[variant.name], results.runs_of(variant.name)
        iterations = np.array(common_iterations(runs))
        estimates = [Estimate.of([run.held_out_loss(each) for run in runs]) for each in iterations]
        _draw_band(left, iterations * variant.tokens_per_iteration / 1e6, estimates, style)
    method = results.variant(results.method)
    for baseline in results.baseline_variants:
        if method is None or baseline == method:
            continue
        points = differences_during_training(results, method, baseline)
        if points:
            iterations, estimates = zip(*points, strict=True)
            style = {**styles[baseline.name], "label": f"{method.title} − {baseline.title}"}
            _draw_band(right, np.array(iterations) * method.tokens_per_iteration / 1e6, list(estimates), style)
    left.set(xlabel="million training tokens", ylabel="loss on held-out text (nats per token)")
    right.set(xlabel="million training tokens", ylabel="difference of the losses (below 0: the method is better)")
    right.axhline(0, color="#8a8a8a", linewidth=1)
    if right.lines[:-1]:
        right.legend(frameon=False)
    return _with_legend(figure, left)


def _draw_band(axes: "Axes", places: np.ndarray, estimates: list[Estimate], style: dict[str, Any]) -> None:
    """Draw means as a line, and their 95 % intervals as a band."""
    means = np.array([estimate.mean for estimate in estimates])
    errors = np.array([estimate.half_width for estimate in estimates])  # nan for one seed: there is no band
    axes.plot(places, means, **style)
    axes.fill_between(places, means - errors, means + errors, color=style["color"], alpha=0.18, linewidth=0)


def _draw_error_bars(
    axes: "Axes", places: Sequence[float], estimates: Sequence[Estimate], style: dict[str, Any]
) -> None:
    """Draw means as a line with markers, and their 95 % intervals as bars."""
    means = [estimate.mean for estimate in estimates]
    errors = [estimate.half_width for estimate in estimates]  # nan for one seed: there is no bar
    axes.errorbar(places, means, yerr=errors, capsize=3, marker="o", **style)


def _curve(title: str, results: Results, differences: dict[str, list[tuple[float, Estimate]]]) -> "Figure":
    styles = _styles(results)
    method = results.variant(results.method)
    assert method is not None
    figure, ((axes,),) = _frame(1, 7, 4.5)
    for name, points in differences.items():
        values, estimates = zip(*points, strict=True)
        label = f"{method.title} − {styles[name]['label']}"
        _draw_error_bars(axes, values, estimates, {**styles[name], "label": label})
    axes.axhline(0, color="#8a8a8a", linewidth=1)
    values = sorted({value for points in differences.values() for value, _ in points})
    scale = "log" if values[0] > 0 else "linear"
    axes.set(xlabel=title, ylabel="difference of the losses, with 95 % interval", xscale=scale)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)
    return _with_legend(figure, axes)


def _loss_curves(results: Results, baseline: VariantResult) -> "Figure":
    styles = _styles(results)
    figure, ((left, right),) = _frame(2, 6, 5)
    for variant in results.of_role("main"):
        style, runs = styles[variant.name], results.runs_of(variant.name)
        iterations = common_iterations(runs)
        left.plot(iterations, [np.mean([run.held_out_loss(each) for run in runs]) for each in iterations], **style)
        points = differences_during_training(results, variant, baseline)
        if points and variant != baseline:
            steps, estimates = zip(*points, strict=True)
            _draw_band(right, np.array(steps), list(estimates), style)
    left.set(xlabel="iteration", ylabel="loss (nats per token)", yscale="log")
    left.yaxis.set_major_formatter("{x:.1f}")
    left.yaxis.set_minor_formatter("{x:.1f}")
    right.axhline(0, color=styles[baseline.name]["color"], linewidth=1)
    right.set(xlabel="iteration", ylabel=f"loss minus the loss of {baseline.title}, with 95 % interval")
    return _with_legend(figure, left)


def _bands(results: Results, baselines: list[VariantResult]) -> "Figure":
    variants = results.of_role("main")
    labels = ["all", *(f"ids of {band.name}" for band in results.bands)]
    figure, all_axes = _frame(len(baselines), 12 / len(baselines), 1.2 + 0.42 * len(variants), sharey=True)
    markers = [{"color": color, "marker": "o", "linestyle": "none"} for color in ("black", *_COLORS[1:])]
    offsets = np.linspace(-0.27, 0.27, len(labels))
    for axes, baseline in zip(all_axes.flat, baselines, strict=False):
        for difference in differences_to(results, baseline):
            position = variants.index(difference.variant)
            for estimate, offset, marker in zip(difference.estimates, offsets, markers, strict=False):
                error = np.nan_to_num(estimate.half_width)
                axes.errorbar(estimate.mean, position + offset, xerr=error, markersize=4, **marker)
        for label, marker in zip(labels, markers, strict=False):
            axes.plot([], [], label=label, **marker)
        axes.axvline(0, color="#8a8a8a", linewidth=1)
        axes.set_yticks(range(len(variants)), [variant.title for variant in variants])
        axes.set(xlabel=f"loss minus the loss of {baseline.title} (left is better), with 95 % interval")
    all_axes[0, 0].invert_yaxis()
    return _with_legend(figure, all_axes[0, 0])


def _expert_load(_results: Results, runs: dict[str, RunResult]) -> "Figure":
    figure, all_axes = _frame(len(runs), 3.1, 1.9, 0.6, is_tidy=False)
    for axes, (title, run) in zip(all_axes.flat, runs.items(), strict=False):
        load = np.array(run.load, dtype=float)  # [layers, experts]
        load /= load.mean(axis=1, keepdims=True)
        # The load also counts layers of multi-token prediction, whose routing is not analyzed.
        analyzed = run.routing.layers if run.routing else []
        layers = analyzed if len(analyzed) == len(load) else range(1, len(load) + 1)
        axes.imshow(load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
        axes.set_title(f"{title}\nmax/mean {load.max(axis=1).mean():.2f}", fontsize=8)
        axes.set_yticks(range(len(load)), layers, fontsize=7)
        axes.set_xticks([])
        axes.set_xlabel("expert", fontsize=7)
        axes.set_ylabel("layer", fontsize=7)
    image = all_axes[0, 0].images[0]
    figure.colorbar(image, ax=all_axes, label="tokens, as a multiple of the mean", shrink=0.8)
    return figure


def _routing_histories(results: Results) -> Histories:
    """Return the routing of all runs of each main variant with experts, by the variant's name."""
    histories = {
        variant.name: [run.routing for run in results.runs_of(variant.name) if run.routing]
        for variant in results.of_role("main")
    }
    return {name: of_runs for name, of_runs in histories.items() if of_runs}


def _mean(values: Iterable[object]) -> np.ndarray:
    """Return the mean over runs of arrays by checkpoint and layer; a value that does not exist is nan."""
    return np.mean([np.array(of_run, dtype=float) for of_run in values], axis=0)


def _entropy(results: Results, variants: Histories) -> "Figure":
    layers = sorted({layer for histories in variants.values() for layer in histories[0].layers})
    figure, all_axes = _frame(len(layers), 3.4, 3.2, 0.8, sharex=True, sharey=True)
    axes_of_layer = dict(zip(layers, all_axes.flat, strict=False))
    for layer, axes in axes_of_layer.items():
        axes.set(title=f"layer {layer}", xlabel="iteration")
    for name, histories in variants.items():
        style = _styles(results)[name]
        all_axes[0, 0].plot([], [], marker=".", **style)  # the legend names variants without experts in the first layer
        entropy = _mean(history.entropy for history in histories)
        for layer, of_layer in zip(histories[0].layers, entropy.T, strict=True):
            axes_of_layer[layer].plot(histories[0].iterations, of_layer, marker=".", **style | {"label": None})
    for axes in all_axes[:, 0]:
        axes.set(ylabel="entropy (nats)", ylim=(0, None))
    return _with_legend(figure, all_axes[0, 0])


def _fluctuation(results: Results, variants: Histories) -> "Figure":
    figure, ((left, right),) = _frame(2, 5.5, 4.5, sharey=True)
    for name, histories in variants.items():
        of_all = [history.fluctuation for history in histories]
        of_routable = [history.routable_fluctuation for history in histories]  # None in layers without a choice
        for axes, runs in ((left, of_all), (right, of_routable)):
            percent = [100 * mean_of_known(itertools.chain(*layers)) for layers in zip(*runs, strict=True)]
            axes.plot(histories[0].iterations[1:], percent, marker=".", **_styles(results)[name])
    left.set(title="all tokens", xlabel="iteration", ylabel="% whose expert changed since the last checkpoint")
    right.set(title="tokens with two or more visible experts", xlabel="iteration", ylim=(0, None))
    return _with_legend(figure, left)


def _distinct_experts(results: Results, variants: Histories) -> "Figure":
    figure, ((axes,),) = _frame(1, 9, 1.2 + 0.34 * len(variants))
    height = 0.8 / len(results.bands)
    for index, band in enumerate(results.bands):
        # A band without occurrences has the mean nan, which draws no bar.
        values = [
            _mean(history.distinct_experts[band.name] for history in histories).mean()
            for histories in variants.values()
        ]
        rows = np.arange(len(variants)) + (index - (len(results.bands) - 1) / 2) * height
        axes.barh(rows, values, height=height, color=_COLORS[index + 1], label=f"ids of {band.name}")
    styles = _styles(results)
    axes.set_yticks(range(len(variants)), [styles[name]["label"] for name in variants])
    axes.invert_yaxis()
    axes.set_xlabel("distinct experts that an id's occurrences were sent to, mean over ids and layers")
    return _with_legend(figure, axes)


def _grid(results: Results, found: dict[str, dict[tuple[float, float], Estimate]]) -> "Figure":
    assert results.grid_base is not None
    numbers = sorted({number for _, number in results.grid_variants})
    figure, all_axes = _frame(len(found), 6, 4.2, sharey=True)
    for axes, (baseline, differences) in zip(all_axes.flat, found.items(), strict=False):
        for index, num_visible in enumerate(numbers):
            curve = {100 * mass: each for (mass, number), each in differences.items() if number == num_visible}
            style = {"color": _COLORS[(4 + index) % len(_COLORS)], "label": f"V_f = {num_visible:.0f}"}
            _draw_error_bars(axes, list(curve), list(curve.values()), style)
        axes.axhline(0, color="#8a8a8a", linewidth=1)
        axes.set(
            title=f"{results.grid_base.title} − {baseline}",
            xlabel="P (% of the text that frequent ids make up)",
        )
    all_axes[0, 0].set_ylabel("difference of the losses, with 95 % interval")
    return _with_legend(figure, all_axes[0, 0])


def _learning_rates(results: Results, tuned: list[VariantResult]) -> "Figure":
    figure, ((axes,),) = _frame(1, 7, 4.5)
    for variant in tuned:
        points = sorted((float(rate), loss) for rate, loss in variant.tuning.items() if loss is not None)
        rates, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(rates, losses, marker="o", **_styles(results)[variant.name])
    axes.set(xlabel="learning rate (largest of a run)", ylabel="held-out loss at the end of a trial", xscale="log")
    tried = sorted({float(rate) for variant in tuned for rate in variant.tuning})
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False)
    return figure
