"""The table of repeated runs: how the loss of a repeated run differs from the recorded loss of the same run."""

import math

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.results import Estimate, collect_results

_HEADER = ("run", "here", "recorded", "difference", "sd of seeds", "95 % interval")


def rerun_table(comparison: Comparison) -> str:
    """Return the table of all finished repeated runs.

    The last columns are the standard deviation of the recorded losses over seeds, and the 95 % interval of their mean.

    Args:
        comparison: a comparison that repeats runs, see `Comparison.rerun`.

    Raises:
        UserError: the parts do not fit together.
    """
    recorded = collect_results(comparison.suite, {n: found.part for n, found in comparison.recorded.items()}, "")
    own = {run.name: found.part for run in comparison.whole_runs() if (found := comparison.find_part(run))}
    rows, num_near, num_known = list[tuple[str, ...]]([_HEADER]), 0, 0
    for run in collect_results(comparison.suite, own, "").runs:
        of_variant = recorded.runs_of(run.variant)
        before = next(each.loss for each in of_variant if each.seed == run.seed)
        row = [f"{run.variant}.seed-{run.seed}", f"{run.loss:.4f}", _number(before, ".4f")]
        spread = Estimate.of([each.loss for each in of_variant])
        if spread.num > 1:
            low, high = spread.interval
            row += [_number(run.loss - before, "+.4f"), f"{spread.standard_deviation:.4f}", f"{low:.4f} to {high:.4f}"]
            num_known += math.isfinite(before)
            num_near += abs(run.loss - before) <= spread.standard_deviation
        else:
            row += [_number(run.loss - before, "+.4f"), "–", "–"]
        rows.append(tuple(row))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    lines.append(f"{num_near} of {num_known} repeated losses differ from the recorded loss by at most the sd of seeds")
    return "\n".join(lines)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"
