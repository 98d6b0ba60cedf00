"""Report the results of a simulation as a table, as JSON and as a plot."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskmoe.simulation.results import Cost, Result
from maskmoe.simulation.variants import VARIANTS, Routing
from maskmoe.transformer.dispatch.kind import DispatchKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADER = (
    "    GPUs     EP  variant                         own      node    across      rows  load max/mean    all-to-all"
    "      layer",
    "                                                  MB        MB        MB           expected drawn          ms"
    "         ms",
)
_COLOR_OF_ROUTING = {
    Routing.TOPK: "#6b6b6b",
    Routing.MASK: "#1f4e9c",
    Routing.RANK_LOCAL: "#2a9d5c",
    Routing.NODE_LOCAL: "#d9822b",
}


def table(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of one table for each k.

    Bytes and times are for one layer and step; bytes are the mean over ranks.
    """
    for topk, results_of_topk in groupby(results, key=lambda result: result.topk):
        yield f"top-{topk}"
        yield from _HEADER
        for result in results_of_topk:
            start = f"{result.layout.num_gpus:>8,} {result.layout.ep_size:>6,}  {result.variant.name:<26}"
            yield start + (f"  impossible: {result.impossible}" if result.cost is None else _columns(result.cost))
        yield ""


def _columns(cost: Cost) -> str:
    megabytes = (cost.bytes_own / 1e6, cost.bytes_node / 1e6, cost.bytes_across / 1e6)
    return (
        "".join(f"{value:>10,.1f}" for value in megabytes)
        + f"{cost.rows:>10,.0f}{cost.expected_imbalance:>9.2f}{cost.imbalance:>6.2f}"
        + f"{cost.all_to_all_seconds * 1e3:>14,.3f}{cost.seconds * 1e3:>11,.3f}"
    )


def to_json(settings: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Return the settings and all results as JSON values, in bytes, rows and seconds.

    Each result has its case and either the fields of its `Cost` or the reason why it is impossible.
    """
    return {"settings": settings, "results": [_entry(result) for result in results]}


def _entry(result: Result) -> dict[str, Any]:
    case = {
        "num_gpus": result.layout.num_gpus,
        "expert_model_parallel_size": result.layout.ep_size,
        "topk": result.topk,
        "variant": result.variant.name,
        "dispatch": result.dispatch.value,
    }
    if result.cost is None:
        return case | {"impossible": result.impossible}
    return case | asdict(result.cost) | {"imbalance": result.cost.imbalance}


def draw_plot(results: Sequence[Result], path: Path) -> None:
    """Plot bytes to other nodes, bytes within the node, time and load over the number of GPUs, for each k.

    Args:
        results: The results, grouped by k and ascending in the number of GPUs. Impossible variants are not drawn.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    results_by_topk = {topk: list(group) for topk, group in groupby(results, key=lambda result: result.topk)}
    figure = Figure(figsize=(11, 8 * len(results_by_topk)), dpi=130, layout="constrained")
    parts = figure.subfigures(len(results_by_topk), squeeze=False)[:, 0]
    for part, (topk, some_results) in zip(parts, results_by_topk.items(), strict=True):
        max_ep_size = max(result.layout.ep_size for result in some_results)
        part.suptitle(
            f"Dispatch in one layer and step, top-{topk}, up to {max_ep_size:,} expert-parallel ranks",
            fontweight="bold",
        )
        across, within, seconds, load = part.subplots(2, 2, sharex=True).flat
        _draw_lines(across, some_results, lambda cost: cost.bytes_across / 1e6)
        across.set(title="Sent to other nodes", ylabel="MB a GPU")
        _draw_lines(within, some_results, lambda cost: cost.bytes_node / 1e6)
        within.set(title="Sent within the node", ylabel="MB a GPU")
        _draw_lines(seconds, some_results, lambda cost: cost.seconds * 1e3)
        seconds.set(title="Time of all exchanges (model)", ylabel="ms", xlabel="GPUs")
        _draw_lines(load, some_results, lambda cost: cost.imbalance)
        load.set(title="Load of the busiest GPU", ylabel="multiple of the mean", xlabel="GPUs")
        for axes in (across, within, seconds):
            if axes.lines:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.yaxis.set_minor_locator(NullLocator())
        if load.lines:
            load.set_ylim(bottom=1)
        part.legend(*seconds.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png")


def _draw_lines(axes: "Axes", results: Sequence[Result], value: Callable[[Cost], float]) -> None:
    """Draw one line for each possible variant, without zeros, which a log scale cannot show."""
    for variant in VARIANTS:
        costs = [(result.layout.num_gpus, result.cost) for result in results if result.variant == variant]
        points = [(num_gpus, value(cost)) for num_gpus, cost in costs if cost is not None and value(cost) > 0]
        if not points:
            continue
        is_stock = variant.dispatch is DispatchKind.STOCK
        axes.plot(
            *zip(*points, strict=True),
            color=_COLOR_OF_ROUTING[variant.routing],
            linestyle="--" if is_stock else "-",
            marker="o" if is_stock else "s",
            markersize=5,
            markerfacecolor="white" if is_stock else None,
            label=variant.name,
        )
    all_num_gpus = sorted({result.layout.num_gpus for result in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(all_num_gpus, [f"{num_gpus:,}" for num_gpus in all_num_gpus])
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
