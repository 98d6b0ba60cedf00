"""Report the results of a simulation as a table, as JSON and as a plot."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskmoe.analysis.dispatch_cost.simulate import Result
from maskmoe.analysis.dispatch_cost.variants import VARIANTS, Routing
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
# The panels of a plot, row by row: title, field of `Cost`, factor, and label of the factor's unit.
_PANELS = (
    ("Sent to other nodes", "bytes_across", 1e-6, "MB a GPU"),
    ("Sent within the node", "bytes_node", 1e-6, "MB a GPU"),
    ("Time of all exchanges (model)", "seconds", 1e3, "ms"),
    ("Load of the busiest GPU", "imbalance", 1, "multiple of the mean"),
)


def table(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of one table for each k.

    Bytes and times are for one layer and step; bytes are the mean over ranks.
    """
    for topk, results_of_topk in groupby(results, key=lambda result: result.topk):
        yield f"top-{topk}"
        yield from _HEADER
        for result in results_of_topk:
            line = f"{result.layout.num_gpus:>8,} {result.layout.ep_size:>6,}  {result.variant.name:<26}"
            if cost := result.cost:
                for num_bytes in (cost.bytes_own, cost.bytes_node, cost.bytes_across):
                    line += f"{num_bytes / 1e6:>10,.1f}"
                line += f"{cost.rows:>10,.0f}{cost.expected_imbalance:>9.2f}{cost.imbalance:>6.2f}"
                line += f"{cost.all_to_all_seconds * 1e3:>14,.3f}{cost.seconds * 1e3:>11,.3f}"
            else:
                line += f"  impossible: {result.impossible}"
            yield line
        yield ""


def to_json(settings: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Return the settings and all results as JSON values, in bytes, rows and seconds.

    Each result has its case and either the fields of its `Cost` or the reason why it is impossible.
    """
    return {"settings": settings, "results": [_entry(result) for result in results]}


def _entry(result: Result) -> dict[str, Any]:
    cost = result.cost
    return {
        "num_gpus": result.layout.num_gpus,
        "expert_model_parallel_size": result.layout.ep_size,
        "topk": result.topk,
        "variant": result.variant.name,
        "dispatch": result.dispatch.value,
        **(asdict(cost) | {"imbalance": cost.imbalance} if cost else {"impossible": result.impossible}),
    }


def draw_plot(results: Sequence[Result], path: Path) -> None:
    """Plot bytes to other nodes, bytes within the node, time and load over the number of GPUs, for each k.

    A panel without values is left out, such as the bytes to other nodes of GPUs that are all in one node.

    Args:
        results: The results, grouped by k and ascending in the number of GPUs; at least one is possible. Impossible
            variants are not drawn.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    results_by_topk = {topk: list(group) for topk, group in groupby(results, key=lambda result: result.topk)}
    panels_of_topk = {topk: panels for topk, group in results_by_topk.items() if (panels := _filled_panels(group))}
    rows = [math.ceil(len(panels) / 2) for panels in panels_of_topk.values()]
    figure = Figure(figsize=(11, 4 * sum(rows)), dpi=130, layout="constrained")
    parts = figure.subfigures(len(rows), squeeze=False, height_ratios=rows)[:, 0]
    for part, num_rows, (topk, panels) in zip(parts, rows, panels_of_topk.items(), strict=True):
        results_of_topk = results_by_topk[topk]
        all_num_gpus = sorted({result.layout.num_gpus for result in results_of_topk if result.cost})
        max_ep_size = max(result.layout.ep_size for result in results_of_topk if result.cost)
        part.suptitle(
            f"Dispatch in one layer and step, top-{topk}, up to {max_ep_size:,} expert-parallel ranks",
            fontweight="bold",
        )
        all_axes = part.subplots(num_rows, 2, sharex=True, squeeze=False)
        for axes, (title, field, factor, unit) in zip(all_axes.flat, panels, strict=False):
            _draw_lines(axes, results_of_topk, field, factor)
            axes.set(title=title, ylabel=unit, xlabel="GPUs", axisbelow=True)
            axes.set_xscale("log", base=2)
            axes.set_xticks(all_num_gpus, [f"{num_gpus:,}" for num_gpus in all_num_gpus])
            axes.tick_params(labelbottom=True)
            axes.grid(color="#e6e6e6", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            if field == "imbalance":
                axes.set_ylim(bottom=1)
            else:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.yaxis.set_minor_locator(NullLocator())
        for axes in all_axes.flat[len(panels) :]:
            axes.set_axis_off()
        # The load has a line for every possible variant.
        handles = all_axes.flat[len(panels) - 1].get_legend_handles_labels()
        part.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png")


def _filled_panels(results: Sequence[Result]) -> list[tuple[str, str, float, str]]:
    """Return the panels for which at least one result has a value other than zero."""
    costs = [result.cost for result in results if result.cost]
    return [panel for panel in _PANELS if any(getattr(cost, panel[1]) for cost in costs)]


def _draw_lines(axes: "Axes", results: Sequence[Result], field: str, factor: float) -> None:
    """Draw one line for each possible variant, without zeros, which a log scale cannot show."""
    for variant in VARIANTS:
        costs = {result.layout.num_gpus: result.cost for result in results if result.variant == variant and result.cost}
        values = {num_gpus: getattr(cost, field) * factor for num_gpus, cost in costs.items() if getattr(cost, field)}
        if values:
            is_stock = variant.dispatch is DispatchKind.STOCK
            axes.plot(
                *zip(*values.items(), strict=True),
                "--o" if is_stock else "-s",
                color=_COLOR_OF_ROUTING[variant.routing],
                markersize=5,
                markerfacecolor="white" if is_stock else None,
                label=variant.name,
            )
