"""Reports the costs of dispatch: a table for the terminal, a CSV file, and a plot."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from itertools import groupby
from pathlib import Path

from dispatch_simulation import DispatchCost

from maskmoe.files.csv_files import write_csv

_HEADER = (
    "    GPUs     EP  variant                                 own      node    across      rows  load max/mean"
    "    all-to-all      layer",
    "                                                          MB        MB        MB           expected drawn"
    "          ms         ms",
)
# The panels of the plot: title, field of `DispatchCost`, factor, and label of the factor's unit.
_PANELS = (
    ("Sent to other nodes", "bytes_across", 1e-6, "MB a GPU"),
    ("Sent within the node", "bytes_node", 1e-6, "MB a GPU"),
    ("Time of all exchanges (model)", "seconds", 1e3, "ms"),
    ("Load of the busiest GPU", "load_max_over_mean", 1, "multiple of the mean"),
)
_STYLES = {"row per expert": "o--", "one copy": "s-", "one copy per node": "^:", "planned": "D-"}


def write_costs(costs: Sequence[DispatchCost], path: Path) -> None:
    """Write a CSV file with a row for each case; the columns are the fields of `DispatchCost`.

    Raises:
        UserError: The file cannot be written.
    """
    write_csv(path, [field.name for field in fields(DispatchCost)], map(astuple, costs))


def terminal_table(costs: Sequence[DispatchCost], expert_seconds: float) -> Iterator[str]:
    """Yield the lines of one table for each k.

    Bytes and times are for one layer and step; bytes are the mean over ranks. With the time of an expert for one token,
    forward and backward, each number of GPUs has a line with the load at which planned dispatch loses its advantage.
    """
    for topk, costs_of_topk in groupby(costs, key=lambda cost: cost.topk):
        yield f"top-{topk}"
        yield from _HEADER
        for _, costs_of_cluster in groupby(costs_of_topk, key=lambda cost: cost.num_gpus):
            of_variant = {cost.variant: cost for cost in costs_of_cluster}
            yield from map(_line, of_variant.values())
            planned, node_copy = of_variant["rank-local mask, planned"], of_variant.get("mask, one copy per node")
            if expert_seconds and node_copy and not (planned.impossible or node_copy.impossible):
                yield f"{'':17}{_load_that_costs_as_much(planned, node_copy, expert_seconds)}"
        yield ""


def _line(cost: DispatchCost) -> str:
    """Return the line of one way to dispatch."""
    line = f"{cost.num_gpus:>8,} {cost.ep_size:>6,}  {cost.variant:<34}"
    if cost.impossible:
        return f"{line}  impossible: {cost.impossible}"
    for num_bytes in (cost.bytes_own, cost.bytes_node, cost.bytes_across):
        line += f"{num_bytes / 1e6:>10,.1f}"
    line += f"{cost.rows:>10,.0f}{cost.expected_load_max_over_mean:>9.2f}{cost.load_max_over_mean:>6.2f}"
    return f"{line}{cost.all_to_all_seconds * 1e3:>14,.3f}{cost.seconds * 1e3:>11,.3f}"


def _load_that_costs_as_much(planned: DispatchCost, node_copy: DispatchCost, expert_seconds: float) -> str:
    """Say up to which load of the busiest GPU planned dispatch is as fast as one copy per node, experts included."""
    saved = node_copy.seconds - planned.seconds
    load = node_copy.load_max_over_mean + saved / (planned.computed * expert_seconds)
    verb = "is" if planned.load_max_over_mean <= load else "is not"
    return f"planned {verb} faster than one copy per node (DeepEP): it is up to a load of {load:.2f} times the mean"


def draw_plot(costs: Sequence[DispatchCost], path: Path) -> None:
    """Plot bytes to other nodes, bytes within the node, time and load over the number of GPUs, for each k.

    Args:
        costs: The costs, grouped by k and ascending in the number of GPUs. Impossible cases are not drawn.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure

    possible = [cost for cost in costs if not cost.impossible]
    all_num_gpus = sorted({cost.num_gpus for cost in possible})
    variants = dict.fromkeys(cost.variant for cost in possible)
    routings = list(dict.fromkeys(_parts(variant)[0] for variant in variants))
    topks = sorted({cost.topk for cost in costs})
    figure = Figure(figsize=(11, 8 * len(topks)), dpi=130, layout="constrained")
    for part, topk in zip(figure.subfigures(len(topks), squeeze=False)[:, 0], topks, strict=True):
        part.suptitle(f"Dispatch in one layer and step, top-{topk}", fontweight="bold")
        for axes, (title, field, factor, unit) in zip(part.subplots(2, 2).flat, _PANELS, strict=True):
            for variant in variants:
                # A log scale cannot show zeros.
                of_variant = [cost for cost in possible if (cost.topk, cost.variant) == (topk, variant)]
                points = {cost.num_gpus: getattr(cost, field) * factor or None for cost in of_variant}
                routing, sending = _parts(variant)
                colour = f"C{routings.index(routing)}"
                axes.plot(list(points), list(points.values()), _STYLES[sending], color=colour, label=variant)
            axes.set(title=title, ylabel=unit, xlabel="GPUs")
            axes.set_xscale("log", base=2)
            is_sent = any(getattr(cost, field) > 0 for cost in possible)
            axes.set_yscale("log" if factor != 1 and is_sent else "linear")
            axes.set_xticks(all_num_gpus, [f"{num_gpus:,}" for num_gpus in all_num_gpus])
            axes.grid(alpha=0.4)
        part.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png")


def _parts(variant: str) -> tuple[str, str]:
    """Return the names of routing and sending, of which a variant's name consists."""
    routing, _, sending = variant.rpartition(", ")
    return routing, sending
