"""Compare the tokens/s of a small model's training on one CPU core with the same run of another checkout.

Both sides run the training entry point, `maskmoe.training.pretrain`, as one process with one thread, on the model of
`launch/suites/laptop.yaml` and Zipf-distributed ids. A process trains some hundred iterations, and the tokens/s come
from the fastest logged interval, because other work on the machine only slows an interval down. Processes of both sides
alternate. The benchmark also prints the last loss of each side: equal losses say that a change left the training alone.

    git worktree add /tmp/baseline main
    python tools/benchmarks/laptop_step.py --baseline /tmp/baseline
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import yaml
from zipf import zipf_mask, zipf_probabilities

from maskmoe.data.dataset_writing import IndexedDatasetWriter
from maskmoe.errors import UserError
from maskmoe.processes.run_tool import run_tool
from maskmoe.routing_mask.assignment import MaskRecipe

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "launch" / "suites" / "laptop.yaml"
DOCUMENT_TOKENS = 512
TIME = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
LOSS = re.compile(r"lm loss: (\S+)")


def write_inputs(
    folder: Path, flags: dict[str, Any], vocab_size: int, num_tokens: int, frequent_mass: float = 0.5
) -> dict[str, Any]:
    """Write a dataset and a routing mask; return the flags that name them.

    Args:
        folder: Gets the files.
        flags: The flags of the model.
        vocab_size: Number of ids.
        num_tokens: Tokens of the dataset.
        frequent_mass: The share of the tokens whose ids see several experts.
    """
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "zipf", np.dtype(np.uint16)) as writer:
        for _ in range(num_tokens // DOCUMENT_TOKENS):
            tokens = rng.choice(vocab_size, size=DOCUMENT_TOKENS, p=zipf_probabilities(vocab_size))
            writer.add_documents(tokens, np.array([DOCUMENT_TOKENS]))
    recipe = MaskRecipe(
        num_experts=flags["num-experts"],
        num_layers=flags["hybrid-layer-pattern"].count("E"),
        assignment="balanced",
        frequent_mass=frequent_mass,
        frequent_visible_experts=4,
    )
    zipf_mask(recipe, vocab_size).save(folder / "mask.safetensors")
    return {
        "data-path": folder / "zipf",
        "data-cache-path": folder / "cache",
        "split": "100,0,0",
        "tokenizer-type": "NullTokenizer",
        "vocab-size": vocab_size,
        "routing-mask": folder / "mask.safetensors",
    }


def words_of(flags: dict[str, Any]) -> list[str]:
    """Return the command-line words of flags; a flag whose value is True stands alone."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def run_training(checkout: Path, flags: dict[str, Any]) -> str:
    """Train in a new process, on one rank with one thread, and return what the process prints.

    Args:
        checkout: a folder that holds the package `maskmoe`.
        flags: the flags of the run.

    Raises:
        RuntimeError: training failed, or logged no step.
    """
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    run = subprocess.run(
        [sys.executable, "-m", "maskmoe.training.pretrain", "--verbose", *words_of(flags)],
        env=os.environ | variables | address | {"PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""},
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0 or not TIME.search(run.stdout):
        raise RuntimeError(f"training in {checkout} failed with exit code {run.returncode}:\n{run.stderr[-2000:]}")
    return run.stdout


def measure_training(checkout: Path, flags: dict[str, Any], losses: list[str]) -> Callable[[], float]:
    """Return a function that trains once with a checkout's code and returns tokens/s.

    Args:
        checkout: a folder that holds the package `maskmoe`.
        flags: the flags of the run.
        losses: gets the last loss of each run.

    Raises:
        UserError: the folder holds no package `maskmoe`.
    """
    if not (checkout / "maskmoe" / "training" / "pretrain.py").is_file():
        raise UserError(f"{checkout} is not a checkout: it holds no maskmoe/training/pretrain.py")
    tokens_an_iteration = flags["global-batch-size"] * flags["seq-length"]

    def train() -> float:
        output = run_training(checkout, flags)
        intervals = [float(milliseconds) for milliseconds in TIME.findall(output)]
        losses.append(LOSS.findall(output)[-1])
        return tokens_an_iteration / (min(intervals) / 1000)

    return train


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = harness.make_parser(__doc__, repeats=3)
    parser.add_argument("--baseline", type=Path, required=True, metavar="PATH", help="the checkout to compare with")
    parser.add_argument("--micro-batch-size", type=int, help="sequences in a step (default: the suite's)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=200, help="iterations of a run (default: %(default)s)")
    parser.add_argument("--log-interval", type=int, default=10, help="iterations of an interval (default: %(default)s)")
    return parser


def main() -> None:
    """Measure and report."""
    arguments = build_parser().parse_args()
    suite = yaml.safe_load(SUITE.read_text())
    flags = suite["flags"] | suite["expert-flags"] | {"hybrid-layer-pattern": "*E" * suite["layers"]}
    batch_size = arguments.micro_batch_size or flags["micro-batch-size"]
    flags |= {
        "micro-batch-size": batch_size,
        "global-batch-size": batch_size,
        "train-iters": arguments.iterations,
        "log-interval": arguments.log_interval,
        "eval-iters": 0,
        "lr": 4e-3,
    }
    losses: dict[str, list[str]] = {"ours": [], "baseline": []}
    with tempfile.TemporaryDirectory() as folder:
        num_tokens = 2 * arguments.iterations * batch_size * flags["seq-length"]
        flags |= write_inputs(Path(folder), flags, arguments.vocab_size, num_tokens)
        case = harness.Case(
            f"laptop step of {batch_size} x {flags['seq-length']} tokens",
            "tokens/s",
            measure_training(ROOT, flags, losses["ours"]),
            measure_training(arguments.baseline.resolve(), flags, losses["baseline"]),
            {"last losses": losses},
        )
        results = list(harness.run([case], arguments.repeats))
    for side, values in losses.items():
        print(f"last lm loss, {side}: {', '.join(sorted(set(values)))}")
    harness.report(results, arguments.json)


if __name__ == "__main__":
    run_tool(main)
