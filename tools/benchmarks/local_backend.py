"""Measure training steps without Transformer Engine against Megatron-Core's local layers.

Both sides train models of the same sizes with `transformer_impl` "local". The models with experts of our side have a
routing mask, and the stock models choose among all experts. The dense models isolate attention, norms, activation
functions and loss.

Peak memory is the growth of the resident memory during one training step, in a fresh process for each side. Before the
step, the process has taken a step on a short sequence, so that weights, gradients and the optimizer's state are not
counted. On a GPU, peak memory is that of torch's allocator.

    python tools/benchmarks/local_backend.py
    python tools/benchmarks/local_backend.py --cases laptop memory-4096-tokens
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
import argparse
import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import torch
from ranks import compare, join_ranks
from train_step import build_parser as build_train_step_parser
from train_step import build_trainer, zipf_batches

from maskmoe.megatron_compat import cpu
from maskmoe.processes.run_tool import run_tool

_LONG = {"hidden_size": 256, "num_attention_heads": 8, "num_experts": 8, "vocab_size": 4096, "batch_size": 1}
CASES: dict[str, dict[str, Any]] = {
    "laptop": {"hidden_size": 128, "num_attention_heads": 4, "num_experts": 8, "vocab_size": 4096, "seq_length": 256},
    "2048-tokens": _LONG | {"seq_length": 2048},
    "2048-tokens-dense": _LONG | {"seq_length": 2048, "num_experts": 0},
    "memory-4096-tokens": _LONG | {"seq_length": 4096},
    "memory-4096-tokens-dense": _LONG | {"seq_length": 4096, "num_experts": 0},
}
"""Sizes of models with 4 layers; `laptop` is the model of launch/models/laptop.yaml."""

_COMMON = {"num_layers": 4, "batch_size": 4, "frequent_visible_experts": 4, "assignment": "balanced"}
_MIB = 2**20


def sizes_of(case: str, arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments of `train_step.py` for a case."""
    defaults = vars(build_train_step_parser().parse_args([]))
    sizes = defaults | _COMMON | CASES[case] | {"dtype": arguments.dtype}
    return argparse.Namespace(**sizes | {"seq_length": arguments.seq_length or sizes["seq_length"]})


def peak_mib(side: Any, sizes: argparse.Namespace) -> float:
    """Return the growth of memory during a training step of one side, in MiB; needs a fresh process."""
    trainer = build_trainer(side, sizes, 1, join_ranks())
    full, trainer.batches = trainer.batches, zipf_batches(sizes.vocab_size, 1, 64, seed=0)
    trainer.step()
    trainer.batches = full
    before = _reset_peak()
    trainer.step()
    return (_peak() - before) / _MIB


def _reset_peak() -> int:
    """Forget the peak of the memory so far, and return the bytes that are in use."""
    if not cpu.is_installed():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _peak()


def _peak() -> int:
    """Return the largest number of bytes in use since `_reset_peak`."""
    if not cpu.is_installed():
        return torch.cuda.max_memory_allocated()
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def compare_peaks(case: str, arguments: argparse.Namespace) -> harness.Result:
    """Measure both sides in fresh processes."""

    def measure(side: str) -> float:
        command = [sys.executable, __file__, "--cases", case, "--peak-of", side, "--dtype", arguments.dtype]
        command += ["--seq-length", str(sizes_of(case, arguments).seq_length)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    return harness.Result(f"peak {case} {arguments.dtype}", "MiB", [measure("ours")], [measure("stock")])


def main() -> None:
    parser = harness.make_parser(__doc__, repeats=11)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="(default: all)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="threads that compute (default: all cores, here %(default)s)",
    )
    parser.add_argument("--seq-length", type=int, help="tokens in a sequence (default: those of the case)")
    parser.add_argument("--peak-of", choices=["ours", "stock"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(peak_mib(arguments.peak_of, sizes_of(arguments.cases[0], arguments)))
        return
    results = [compare_peaks(case, arguments) for case in arguments.cases if case.startswith("memory")]
    timed = [case for case in arguments.cases if not case.startswith("memory")]
    groups = join_ranks()
    torch.set_num_threads(arguments.threads)
    for case in timed:
        ours, stock = (build_trainer(side, sizes_of(case, arguments), 1, groups) for side in ("ours", "stock"))
        timing = compare(f"training step {case} {arguments.dtype}", ours.step, "stock", stock.step)
        results += harness.run([timing], arguments.repeats)
    harness.report(results, arguments.json)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_tool(main)
