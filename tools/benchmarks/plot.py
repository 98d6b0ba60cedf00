"""Plot the results against stock Megatron-Core that benchmarks write with `--json`.

Times are relative to the time of stock Megatron-Core; each bar also shows its milliseconds.

    python tools/benchmarks/plot.py --output benchmarks.png dispatcher.json moe_layer.json train_step.json
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from maskmoe.arguments.parser import OneLineParser
from maskmoe.files.outputs import atomic_output
from maskmoe.processes.run_tool import run_tool

_TO_FLOOR = " to the floor"
_COLORS = {"stock": "#b0b0b0", "ours": "#2f6fb0", "floor": "#e0a030"}


@dataclass(frozen=True)
class Bars:
    """One case.

    Attributes:
        case: the name of the case.
        seconds: the median seconds of each side, by name; the floor only if it was measured.
    """

    case: str
    seconds: dict[str, float]


def read_bars(path: Path) -> list[Bars]:
    """Read the cases against stock Megatron-Core from a file of results."""
    results = {result["case"]: result for result in json.loads(path.read_text())}
    bars = []
    for case, result in results.items():
        to_floor = results.get(case + _TO_FLOOR)
        if case.endswith(_TO_FLOOR) or "stock" not in result["costs"]:
            continue
        seconds = {"stock": statistics.median(result["baseline"])}
        # The ratio is a median over pairs measured at the same time, so it is more precise than two medians.
        seconds["ours"] = seconds["stock"] * result["ratio"]
        if to_floor:
            seconds["floor"] = seconds["ours"] / to_floor["ratio"]
        bars.append(Bars(case, seconds))
    return bars


def draw(panels: Sequence[Sequence[Bars]], title: str, output: Path) -> None:
    """Draw one panel for each file, with a height that depends on its number of cases, and write the picture."""
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9, 0.9 + 0.62 * sum(map(len, panels))),
        height_ratios=[len(panel) for panel in panels],
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    longest = max((max(bars.seconds.values()) / bars.seconds["stock"] for panel in panels for bars in panel), default=1)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for row, bars in enumerate(panel):
            for index, (side, seconds) in enumerate(bars.seconds.items()):
                relative = seconds / bars.seconds["stock"]
                y = row + 0.27 * (index - 1)
                axis.barh(y, relative, 0.25, color=_COLORS[side], label=side if row == 0 else None)
                axis.text(relative + 0.01, y, f"{1e3 * seconds:.3g} ms", va="center", fontsize=7)
        axis.set_yticks(range(len(panel)), [bars.case for bars in panel], fontsize=8)
        axis.set_ylim(len(panel) - 0.5, -0.5)
        axis.set_xlim(0, 1.1 * max(1, longest))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    axes[-1, 0].set_xlabel("time of forward and backward, stock Megatron-Core = 1")
    with atomic_output(output) as path:
        figure.savefig(path, format="png", dpi=130)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="F", help="results that a benchmark wrote with --json")
    parser.add_argument("--title", default="", help="title of the picture, for example the machine")
    parser.add_argument("--output", type=Path, required=True, metavar="F.png", help="write the picture to this file")
    arguments = parser.parse_args()
    draw([read_bars(path) for path in arguments.results], arguments.title, arguments.output)


if __name__ == "__main__":
    run_tool(main)
