"""Compare the tokens/s of the quickstart's training with a plain training loop of transformers.

Our side trains the quickstart's model, launch/models/laptop.yaml, on Zipf-distributed ids: once in each layout of
processes × threads. The baseline trains our exported model in one process with as many threads as there are cores, by
fused AdamW and without clipping gradients as the quickstart does. Tokens/s come from the fastest interval of four
iterations, because other work on the machine only slows an interval down. Sides alternate. The benchmark also prints
our last loss: an equal loss says that a change left the training alone.

    python tools/benchmarks/quickstart_step.py
"""

import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import torch
from training_runs import LOSS, TIME, laptop_flags, run_program, run_training, write_inputs

from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.data.parallel import available_cores
from maskmoe.huggingface import MaskMoEForCausalLM
from maskmoe.processes.run_tool import run_tool

INTERVAL = 4  # iterations
VOCAB_SIZE = 4096


def measure_loop(model_folder: Path, dataset: Path, iterations: int, batch: tuple[int, int]) -> Callable[[], float]:
    """Return a function that trains an exported model in a loop of transformers and returns tokens/s.

    Args:
        model_folder: the exported model.
        dataset: prefix of the dataset.
        iterations: number of iterations.
        batch: sequences in an iteration, and tokens in a sequence.
    """
    tokens = batch[0] * batch[1]
    ids = torch.from_numpy(open_tokens(dataset)[: iterations * tokens].astype("int64"))
    batches = ids.view(iterations, *batch)

    def train() -> float:
        torch.set_num_threads(available_cores())
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


def main() -> None:
    """Measure and report."""
    parser = harness.make_parser(__doc__, repeats=3)
    parser.add_argument("--iterations", type=int, default=60, help="iterations of a run (default: %(default)s)")
    cores = available_cores()
    parser.add_argument(
        "--layouts",
        nargs="+",
        type=harness.sizes("PxT"),
        default=[f"1x{cores}", f"2x{max(1, cores // 2)}"],
        metavar="PxT",
        help="cases: P processes with T threads each (default: one process, and two)",
    )
    arguments = parser.parse_args()
    iterations = max(INTERVAL, arguments.iterations)
    flags = laptop_flags()
    batch = flags["global-batch-size"], flags["seq-length"]
    tokens = batch[0] * batch[1]
    flags |= {"train-iters": iterations, "lr-decay-iters": 800, "log-interval": INTERVAL, "eval-iters": 0, "seed": 1234}
    flags |= {"verbose": True}  # prints Megatron's times of an iteration
    losses: dict[str, list[str]] = {layout: [] for layout in arguments.layouts}

    def measure(layout: str, inputs: dict[str, Any]) -> Callable[[], float]:
        """Return a function that trains in a layout of processes x threads and returns tokens/s."""
        ranks, threads = map(int, layout.split("x"))
        layout_flags = {"micro-batch-size": batch[0] // ranks, "expert-model-parallel-size": ranks}

        def train() -> float:
            # The first run leaves the model that the baseline trains.
            saving = {} if model.exists() else {"save": checkpoints, "save-interval": iterations}
            output = run_training(flags | inputs | layout_flags | saving, ranks, threads)
            if saving:
                words = ["megatron-to-hf", "--load", str(checkpoints), "--save", str(model)]
                run_program(["-m", "maskmoe", "convert", *words], 1)
            losses[layout].append(LOSS.findall(output)[-1])
            return tokens / (min(map(float, TIME.findall(output))) / 1000)

        return train

    with tempfile.TemporaryDirectory() as name:
        folder, checkpoints, model = Path(name), Path(name, "checkpoints"), Path(name, "model")
        inputs = write_inputs(folder, flags, VOCAB_SIZE, 2 * iterations * tokens)
        baseline = measure_loop(model, inputs["data-path"], iterations, batch)
        cases = [
            harness.Case(
                f"quickstart step, {layout} processes x threads", "tokens/s", measure(layout, inputs), baseline
            )
            for layout in arguments.layouts
        ]
        results = list(harness.run(cases, arguments.repeats, warms_up=False))
    for layout, values in losses.items():
        print(f"last lm loss, {layout}: {', '.join(sorted(set(values)))}")
    harness.report(results, arguments.json)


if __name__ == "__main__":
    run_tool(main)
