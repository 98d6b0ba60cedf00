"""Measure all benchmarks as one group of ranks: `torchrun … -m gpu_campaign.benchmarks FOLDER ENGINE… [--small]`.

Each ENGINE is `local` or `Transformer-Engine`. FOLDER gets the results of each benchmark and engine, after each case.
"""

import argparse
import traceback
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
import dispatcher
import moe_layer
import router
import torch
import train_step
from ranks import join_ranks, measure

from maskmoe.errors import RunFailure
from maskmoe.processes.run_tool import run_tool

_TOKENS = ("--tokens", "4096", "--hidden-size", "2048", "--experts", "2/16", "8/64")
_STEP = (
    *("--num-layers", "4", "--hidden-size", "1024", "--num-experts", "16", "--vocab-size", "32768"),
    *("--seq-length", "1024", "--batch-size", "4"),
)
# The most valuable benchmarks come first: program and arguments by name.
_BENCHMARKS = {
    "step-planned": (train_step, (*_STEP, "--topk", "1", "2", "--assignment", "rank-local")),
    "step-one-copy": (train_step, (*_STEP, "--topk", "2")),
    "layer": (moe_layer, (*_TOKENS, "--ffn-hidden-size", "1024", "--dispatches-alone")),
    "dispatch": (dispatcher, (*_TOKENS, "--dispatches-alone")),
    "router": (router, _TOKENS),
}
_FEW_TOKENS = ("--tokens", "64", "--hidden-size", "64", "--experts", "2/4")
_SMALL_STEP = (
    *("--num-layers", "1", "--hidden-size", "64", "--num-experts", "4", "--vocab-size", "128"),
    *("--seq-length", "32", "--batch-size", "2", "--topk", "2", "--frequent-visible-experts", "2"),
)
# Later arguments override those of `_BENCHMARKS`.
_SMALL = {
    "step-planned": _SMALL_STEP,
    "step-one-copy": _SMALL_STEP,
    "layer": (*_FEW_TOKENS, "--ffn-hidden-size", "32"),
    "dispatch": _FEW_TOKENS,
    "router": _FEW_TOKENS,
}
_ENGINES = {"local": (), "Transformer-Engine": ("--transformer-engine",)}


def main() -> None:
    """Measure on all ranks. A benchmark that fails does not stop the others.

    Raises:
        RunFailure: a benchmark failed.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("engines", nargs="+", choices=_ENGINES)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    groups, failed = join_ranks(), []
    for engine in arguments.engines:
        for name, (benchmark, words) in _BENCHMARKS.items():
            small = (*_SMALL[name], "--repeats", "1") if arguments.small else ("--repeats", "9")
            path = arguments.folder / f"{engine}-{name}.json"
            words = (*words, *_ENGINES[engine], "--dtype", "bfloat16", *small, "--json", str(path))
            options = benchmark.build_parser().parse_args(words)
            try:
                measure(benchmark.cases(options, groups), options)
            except Exception:
                traceback.print_exc()
                failed.append(path.stem)
            torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()
    if failed:
        raise RunFailure(f"benchmarks failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_tool(main)
