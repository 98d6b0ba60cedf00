"""Compare the tokens/s of the quickstart's training with a plain training loop of transformers, on two CPU cores.

Our side is the training of launch/quickstart.sh, with its ranks, flags and environment. The baseline trains our
exported model in one process with two threads, by fused AdamW and without clipping gradients as the quickstart does.
Both sides train on Zipf-distributed ids. Their tokens/s come from the fastest interval, because other work on the
machine only slows an interval down. Sides alternate. The benchmark also prints our last loss: an equal loss says that a
change left the training alone.

    python tools/benchmarks/quickstart_step.py
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import harness
import torch
from laptop_step import LOSS, TIME, write_inputs

from maskmoe.arguments.flags import flag_words, override
from maskmoe.comparison.steps import maskmoe_command
from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.huggingface import MaskMoEForCausalLM
from maskmoe.launch.command import entry_point, standalone_command
from maskmoe.launch.machine import Devices
from maskmoe.launch.model_file import ModelFile
from maskmoe.processes.run_tool import run_tool

DEVICES = Devices(num_gpus=0, num_cores=2)
INTERVAL = 4  # iterations
MODEL = Path(__file__).parents[2] / "launch" / "models" / "laptop.yaml"
# As in launch/quickstart.sh.
PROCESSES, NUM_EXPERTS, VOCAB_SIZE, FREQUENT_MASS, SEED = 2, 8, 4096, 0.4, 1234


def run_command(words: tuple[str, ...]) -> str:
    """Run a command in the quickstart's environment and return what the command prints.

    Raises:
        RuntimeError: The command failed.
    """
    environment = os.environ | DEVICES.environment | {"PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"exit code {run.returncode} of {' '.join(words[:4])} …:\n{run.stderr[-2000:]}")
    return run.stdout


def measure_quickstart(words: tuple[str, ...], tokens: int, losses: list[str]) -> Callable[[], float]:
    """Return a function that trains by the quickstart's command and returns tokens/s.

    Args:
        words: The command.
        tokens: Tokens of an iteration.
        losses: Gets the last loss of each run.
    """

    def train() -> float:
        output = run_command(words)
        losses.append(LOSS.findall(output)[-1])
        return tokens / (min(map(float, TIME.findall(output))) / 1000)

    return train


def measure_loop(model_folder: Path, dataset: Path, iterations: int, batch: tuple[int, int]) -> Callable[[], float]:
    """Return a function that trains an exported model in a loop of transformers and returns tokens/s.

    Args:
        model_folder: The exported model.
        dataset: Prefix of the dataset.
        iterations: Number of iterations.
        batch: Sequences in an iteration, and tokens in a sequence.
    """
    tokens = batch[0] * batch[1]
    ids = torch.from_numpy(open_tokens(dataset)[: iterations * tokens].astype("int64"))
    batches = ids.view(iterations, *batch)

    def train() -> float:
        torch.set_num_threads(DEVICES.num_cores)
        model = MaskMoEForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        ends = [time.perf_counter()]
        for number, input_ids in enumerate(batches, 1):
            model(input_ids=input_ids, labels=input_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number % INTERVAL == 0:
                ends.append(time.perf_counter())
        return INTERVAL * tokens / min(end - start for start, end in pairwise(ends))

    return train


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = harness.make_parser(__doc__, repeats=3)
    parser.add_argument("--iterations", type=int, default=60, help="iterations of a run (default: %(default)s)")
    return parser


def main() -> None:
    """Measure and report."""
    arguments = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = ModelFile.read(MODEL, {}).flags
        sizes = {"num-experts": NUM_EXPERTS, "hybrid-layer-pattern": flags["hybrid-layer-pattern"][0]}
        batch = (int(flags["global-batch-size"][0]), int(flags["seq-length"][0]))
        num_tokens = 2 * arguments.iterations * batch[0] * batch[1]
        inputs = write_inputs(folder, sizes, VOCAB_SIZE, num_tokens, FREQUENT_MASS)
        parallel = {"micro-batch-size": batch[0] // PROCESSES, "expert-model-parallel-size": PROCESSES}
        own = {**inputs, **parallel, "train-iters": arguments.iterations, "log-interval": INTERVAL, "eval-iters": 0}
        flags = override(flags, {flag: (str(value),) for flag, value in {**own, "seed": SEED}.items()})

        def command(**further: object) -> tuple[str, ...]:
            words = {flag.replace("_", "-"): (str(value),) for flag, value in further.items()}
            words = flag_words(override(flags, words))
            return standalone_command(PROCESSES, entry_point("pretrain"), (*words, *DEVICES.megatron_flags))

        # Export a model for the baseline.
        checkpoints, model = folder / "checkpoints", folder / "model"
        run_command(command(train_iters=1, save=checkpoints, save_interval=1))
        run_command(maskmoe_command("convert", "megatron-to-hf", "--load", checkpoints, "--save", model))
        losses: list[str] = []
        case = harness.Case(
            f"quickstart step of {batch[0]} x {batch[1]} tokens",
            "tokens/s",
            measure_quickstart(command(), batch[0] * batch[1], losses),
            measure_loop(model, inputs["data-path"], arguments.iterations, batch),
            {"last losses": losses},
        )
        results = list(harness.run([case], arguments.repeats))
    print(f"last lm loss, ours: {', '.join(sorted(set(losses)))}")
    harness.report(results, arguments.json)


if __name__ == "__main__":
    run_tool(main)
