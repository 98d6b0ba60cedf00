"""The steps that measure parts of the model against stock Megatron-Core, by the programs in `tools/benchmarks`."""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plot import draw, read_bars

from gpu_campaign.results import Cell, Findings, Plot, Table
from gpu_campaign.step import Command, Context, Step
from maskmoe.launch.command import standalone_command

_NUM_EXPERTS = 8
_NOTE = (
    "Both sides use Megatron-Core's local modules, without fused kernels, unless the case names Transformer Engine. "
    "The ratio is the median of ours / stock over pairs that were measured in turns."
)
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
    limit: float = 90,
    on_all_gpus: bool = False,
    has_engine: bool = True,
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
        has_engine: whether the benchmark also measures modules of Transformer Engine, if it is installed.
    """

    def variants(context: Context) -> dict[Path, tuple[int, tuple[str, ...]]]:
        """Return number of ranks and further arguments of each variant, by its file of results."""
        ranks = sorted({1, _num_ranks(context)} if on_all_gpus else {1})
        engines = _engines(context) if has_engine else {"local": ()}
        return {
            context.folder(name) / f"{engine}-{number}-ranks.json": (number, flags)
            for engine, flags in engines.items()
            for number in ranks
        }

    def commands(context: Context) -> list[Command]:
        chosen = small if context.is_dry_run else arguments
        return [
            _benchmark(context, benchmark, ranks, (*chosen, *_DTYPE, *further, "--json", str(path)))
            for path, (ranks, further) in variants(context).items()
        ]

    def read(context: Context) -> Findings:
        paths = [path for path in variants(context) if path.exists()]
        results = [result for path in paths for result in json.loads(path.read_text())]
        rows = tuple(_row(result) for result in results if "stock" in result["costs"])
        columns = (
            *("case", "ratio of times", "smallest", "largest", "ours (ms)", "stock (ms)"),
            *("kernels, ours", "stock", "host waits, ours", "stock"),
        )
        picture = context.folder(name) / f"{name}.png"
        draw([read_bars(path) for path in paths], f"{title}: times against stock Megatron-Core", picture)
        plot = Plot(file=str(picture.relative_to(context.output)), caption=f"{title}: times against stock")
        table = Table(title="Against stock Megatron-Core", columns=columns, rows=rows)
        return Findings(notes=(_NOTE,), tables=(table,), plots=(plot,))

    return Step(name, title, limit, commands, read, measures=True)


def _engines(context: Context) -> dict[str, tuple[str, ...]]:
    """Return the flags of a benchmark for each kind of modules that this machine can run."""
    has_engine = context.has_transformer_engine and not context.is_dry_run
    return {"local": ()} | ({"Transformer-Engine": ("--transformer-engine",)} if has_engine else {})


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
    return Command(standalone_command(ranks, ("-m", program), arguments))


MEASUREMENTS = (
    comparison("router", "router", "Router", _TOKENS, _FEW_TOKENS, has_engine=False),
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
        has_engine=False,
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
