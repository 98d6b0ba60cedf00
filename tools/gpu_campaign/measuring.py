"""The steps that measure parts of the model against stock Megatron-Core, by the programs in `tools/benchmarks`."""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_campaign.results import Cell, Findings, Plot, Table
from gpu_campaign.step import Command, Context, Step
from maskmoe.launch.command import standalone_command

_NUM_EXPERTS = 8
_DTYPE = ("--dtype", "bfloat16")
_TOKENS = ("--tokens", "4096", "--hidden-size", "2048", "--experts", "2/8", "8/64")
_FEW_TOKENS = ("--tokens", "64", "--hidden-size", "64", "--experts", "2/4", "--repeats", "1")


def comparison(
    name: str,
    benchmark: str,
    title: str,
    arguments: Sequence[str],
    small: Sequence[str],
    *,
    limit: float = 75,
    on_all_gpus: bool = False,
) -> Step:
    """Return a step that measures a benchmark against stock Megatron-Core, ours and stock in turns.

    Args:
        name: the name of the step.
        benchmark: the program in `tools/benchmarks`, without `.py`.
        title: what the step shows.
        arguments: the arguments on a GPU.
        small: the arguments of a dry run on the CPU.
        limit: seconds for the step.
        on_all_gpus: whether the benchmark also runs on all GPUs if there are several.
    """

    def files(context: Context) -> dict[int, Path]:
        """Return the file of results for each number of ranks."""
        ranks = [1, *([_num_ranks(context)] if on_all_gpus and _num_ranks(context) > 1 else [])]
        return {number: context.folder(name) / f"{number}-ranks.json" for number in ranks}

    def picture(context: Context) -> Path:
        return context.folder(name) / f"{name}.png"

    def commands(context: Context) -> list[Command]:
        chosen = small if context.is_dry_run else arguments
        made = [
            _benchmark(context, benchmark, ranks, (*chosen, *_DTYPE, "--json", str(path)))
            for ranks, path in files(context).items()
        ]
        plot = ("--output", str(picture(context)), *map(str, files(context).values()))
        return [*made, _benchmark(context, "plot", 1, plot)]

    def read(context: Context) -> Findings:
        results = [result for path in files(context).values() for result in json.loads(path.read_text())]
        rows = tuple(_row(result) for result in results if "stock" in result["costs"])
        columns = (
            *("case", "ratio of times", "smallest", "largest", "ours (ms)", "stock (ms)"),
            *("kernels, ours", "stock", "host waits, ours", "stock"),
        )
        plot = Plot(file=str(picture(context).relative_to(context.output)), caption=f"{title}: times against stock")
        return Findings(tables=(Table(title="Against stock Megatron-Core", columns=columns, rows=rows),), plots=(plot,))

    return Step(name, title, limit, commands, read, measures=True)


def kernel_counts() -> Step:
    """Return the step that counts kernels and host waits of the parts of a layer, forward and backward."""
    arguments = ("--tokens", "4096", "--hidden-size", "2048", "--experts", "8/64", "--ffn-hidden-size", "1024")
    small = ("--tokens", "64", "--hidden-size", "64", "--experts", "2/4", "--ffn-hidden-size", "32")

    def file(context: Context) -> Path:
        return context.folder("kernels") / "kernels.json"

    def commands(context: Context) -> list[Command]:
        chosen = small if context.is_dry_run else arguments
        return [_benchmark(context, "kernels", _num_ranks(context), (*chosen, *_DTYPE, "--json", str(file(context))))]

    def read(context: Context) -> Findings:
        counted = json.loads(file(context).read_text())
        directions = ("forward", "backward")
        rows = tuple(
            (
                part,
                *(of[direction]["kernels"] for direction in directions),
                *(of[direction]["copies"] for direction in directions),
                *(of[direction]["host_waits"] for direction in directions),
                *(1e3 * of[direction]["device_seconds"] for direction in directions),
            )
            for part, of in counted.items()
        )
        names = ("kernels", "copies", "host waits", "device time (ms)")
        columns = ("part", *(f"{name}, {direction}" for name in names for direction in directions))
        missing = [part for part, of in counted.items() if not context.is_dry_run and not of["forward"]["kernels"]]
        return Findings(
            facts={"layer": " ".join(arguments), "ranks": _num_ranks(context)},
            tables=(Table(title="Counted by the profiler", columns=columns, rows=rows),),
            problems=tuple(f"{part} launched no kernel" for part in missing),
        )

    return Step("kernels", "Kernels and host waits of an MoE layer", 75, commands, read, measures=True)


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


def _num_ranks(context: Context) -> int:
    """Return the number of ranks on all GPUs, which must divide the experts; two in a dry run."""
    return 2 if context.is_dry_run else math.gcd(context.devices.num_gpus, _NUM_EXPERTS)


def _benchmark(context: Context, program: str, ranks: int, arguments: Sequence[str]) -> Command:
    """Return the command that runs a benchmark on some ranks."""
    script = str(context.root / "tools" / "benchmarks" / f"{program}.py")
    if ranks == 1:
        return Command((sys.executable, script, *arguments))
    return Command(standalone_command(ranks, program, arguments))


MEASUREMENTS = (
    comparison("router", "router", "Router", _TOKENS, _FEW_TOKENS),
    comparison(
        *("dispatch", "dispatcher", "Dispatch and combine"),
        *((*_TOKENS, "--dispatches-alone"), (*_FEW_TOKENS, "--dispatches-alone")),
        on_all_gpus=True,
    ),
    comparison(
        *("layer", "moe_layer", "MoE layer"),
        (*_TOKENS, "--ffn-hidden-size", "1024", "--dispatches-alone"),
        (*_FEW_TOKENS, "--ffn-hidden-size", "32", "--dispatches-alone"),
        on_all_gpus=True,
    ),
    comparison(
        *("experts", "experts", "Experts"),
        ("--sizes", "8192x2048x1024/8", "32768x2048x1024/64"),
        ("--sizes", "64x16x32/4", "--repeats", "1"),
    ),
    comparison(
        *("step", "train_step", "Training step"),
        (
            *("--num-layers", "4", "--hidden-size", "1024", "--num-experts", "16", "--vocab-size", "32768"),
            *("--seq-length", "1024", "--batch-size", "4", "--topk", "1", "2"),
        ),
        (
            *("--num-layers", "1", "--hidden-size", "64", "--num-experts", "4", "--vocab-size", "128"),
            *("--seq-length", "32", "--batch-size", "2", "--topk", "2", "--frequent-visible-experts", "2"),
            *("--repeats", "1"),
        ),
        on_all_gpus=True,
    ),
)
