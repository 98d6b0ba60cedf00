"""The step that measures parts of the model against stock Megatron-Core, by the programs in `tools/benchmarks`."""

import json
import math
import statistics
from typing import Any

from gpu_campaign.results import Cell, Findings, Table
from gpu_campaign.runs import NUM_EXPERTS
from gpu_campaign.step import Command, Context
from maskmoe.launch.torchrun_command import standalone_command

_NOTE = (
    "Stock Megatron-Core fuses whatever it can: with Transformer Engine router, permutation, activation functions, and "
    "the accumulation of gradients. Ours has the same settings, except that Transformer Engine's router knows no mask. "
    "The ratio is the median of ours / stock over pairs that were measured in turns. A benchmark fails if ours does "
    "the operations of stock."
)
_COLUMNS = (
    *("case", "ratio of times", "smallest", "largest", "ours (ms)", "stock (ms)"),
    *("kernels, ours", "stock", "host waits, ours", "stock"),
)


def measuring_command(context: Context) -> list[Command]:
    """Return one command for all benchmarks, on as many ranks as divide the experts."""
    engines = (
        ("Transformer-Engine", "local") if context.has_transformer_engine and not context.is_dry_run else ("local",)
    )
    words = (str(context.folder("benchmarks")), *engines, *(("--small",) if context.is_dry_run else ()))
    ranks = math.gcd(context.num_ranks, NUM_EXPERTS)
    return [Command(standalone_command(ranks, ("-m", "gpu_campaign.benchmarks"), words))]


def read_measurements(context: Context) -> Findings:
    """Return a table of each benchmark that has measured a case."""
    tables = []
    for path in sorted(context.folder("benchmarks").glob("*.json"), key=lambda path: path.stat().st_mtime):
        results = json.loads(path.read_text())["results"]
        rows = tuple(_row(result) for result in results if "stock" in result["costs"])
        tables.append(Table(title=path.stem, columns=_COLUMNS, rows=rows))
    problems = () if tables else ("nothing was measured",)
    return Findings(notes=(_NOTE,), tables=tuple(tables), problems=problems)


def _row(result: dict[str, Any]) -> tuple[Cell, ...]:
    """Return the row of one case."""
    ratios = [ours / stock for ours, stock in zip(result["ours"], result["baseline"], strict=True)]
    devices = [result["costs"][side]["device"] or {} for side in ("ours", "stock")]
    return (
        result["case"],
        result["ratio"],
        min(ratios),
        max(ratios),
        *(1e3 * statistics.median(result[side]) for side in ("ours", "baseline")),
        *(device.get("kernels") for device in devices),
        *(device.get("host_waits") for device in devices),
    )
