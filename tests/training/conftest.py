"""Real training runs of a tiny model, started once and shared by the tests of this folder.

A test names the runs that it looks at with `@pytest.mark.runs(name, …)` and gets their outcomes, in that order, from
the fixture `runs`. All runs that the selected tests name are queued with the first of them and run two at a time.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.runs import free_port, read_scalars

from maskmoe.data.indexed_dataset import IndexedDatasetWriter, optimal_dtype
from maskmoe.routing_mask.assignment import MaskRecipe
from maskmoe.routing_mask.frequency import count_token_frequency
from maskmoe.routing_mask.mask import RoutingMask, build_routing_mask

VOCAB_SIZE = 510
TRAINING = ("-m", "maskmoe.training.pretrain")
SETTINGS = f"""
    --num-layers 4 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32
    --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --num-experts 8 --moe-ffn-hidden-size 32 --moe-router-topk 2
    --micro-batch-size 2 --global-batch-size 8 --train-iters 21
    --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 3
    --data-path data --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --num-workers 0
    --eval-iters 1 --eval-interval 5 --save-interval 7 --log-interval 1 --tensorboard-log-interval 1
"""
TIMEOUT = 180


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        flags: added to `SETTINGS`, over which they win.
        ranks: processes, one group.
        continues: the run whose checkpoint it loads.
        mask: file given as `--routing-mask`; None leaves the flag out.
        saves: whether it writes checkpoints, every 7 iterations and where it ends.
        program: what Python runs.
        torchrun: started as users do, rather than by this module, which saves seconds.
        restarts: how often torchrun may restart the ranks.
        logs_scalars: whether it writes TensorBoard events.
        omits: a flag of `SETTINGS` that it leaves out.
    """

    flags: str = ""
    ranks: int = 1
    continues: str | None = None
    mask: str | None = "mask.safetensors"
    saves: bool = False
    program: Sequence[str] = TRAINING
    torchrun: bool = False
    restarts: int = 0
    logs_scalars: bool = True
    omits: str | None = None


DISTRIBUTED = "--use-distributed-optimizer"
EXPERT_2 = "--expert-model-parallel-size 2"
PIPELINE_2 = "--pipeline-model-parallel-size 2"
TENSOR_2 = "--tensor-model-parallel-size 2 --sequence-parallel"
TENSOR_EXPERT_2 = f"{TENSOR_2} --expert-tensor-parallel-size 1 {EXPERT_2}"
ALL_GATHER = "--moe-token-dispatcher-type allgather"
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
# Checkpoints are written at 7, as `SETTINGS` has it, and at the end.
UNTIL_12 = "--exit-interval 12"
FROM_7 = f"{UNTIL_12} --ckpt-step 7"
EIGHT_MICRO_BATCHES = "--micro-batch-size 1 --exit-interval 6"
STALE_IDS = (str(Path(__file__).with_name("pretrain_with_stale_ids.py")),)
RECORDED_ROUTING = (str(Path(__file__).with_name("pretrain_with_recorded_routing.py")),)

RUNS = {
    # Initial weights depend on the layout. So what is compared over layouts starts from one checkpoint.
    "start": Run("--exit-interval 1", saves=True),
    "start, distributed optimizer": Run(f"--exit-interval 1 {DISTRIBUTED}", saves=True),
    "reference": Run(),
    "resumed from start": Run(continues="start", mask=None),
    # Layouts.
    "expert parallel 2": Run(EXPERT_2, ranks=2, continues="start", torchrun=True),
    "expert parallel 2, undisturbed": Run(EXPERT_2, ranks=2, saves=True),
    "expert parallel 4": Run("--expert-model-parallel-size 4", ranks=4, continues="start"),
    "expert parallel 2, distributed optimizer": Run(
        f"{EXPERT_2} {DISTRIBUTED}", ranks=2, continues="start, distributed optimizer"
    ),
    "pipeline 2": Run(f"{PIPELINE_2} --save-interval 21", ranks=2, continues="start", saves=True),
    "interleaved pipeline": Run(f"{PIPELINE_2} --num-layers-per-virtual-pipeline-stage 1", ranks=2, continues="start"),
    "tensor 2 with sequence parallel": Run(TENSOR_2, ranks=2, continues="start"),
    "data parallel 2, distributed optimizer": Run(
        f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather",
        ranks=2,
        continues="start, distributed optimizer",
    ),
    "tensor 2, expert parallel 2": Run(TENSOR_EXPERT_2, ranks=2, continues="start"),
    "tensor 2, experts in 2 parts, data parallel 2": Run(
        f"{TENSOR_2} --expert-tensor-parallel-size 2 {EXPERT_2}", ranks=4, continues="start"
    ),
    "all-gather, expert parallel 2": Run(f"{ALL_GATHER} {EXPERT_2}", ranks=2, continues="start"),
    "all-gather, tensor 2, expert parallel 2": Run(f"{ALL_GATHER} {TENSOR_EXPERT_2}", ranks=2, continues="start"),
    # Recomputation.
    "full recompute": Run(FULL_RECOMPUTE),
    "selective recompute": Run("--recompute-granularity selective --recompute-modules moe"),
    "pipeline 2, 8 micro-batches": Run(f"{PIPELINE_2} {EIGHT_MICRO_BATCHES}", ranks=2),
    "pipeline 2, 8 micro-batches, full recompute": Run(f"{PIPELINE_2} {EIGHT_MICRO_BATCHES} {FULL_RECOMPUTE}", ranks=2),
    "pipeline 2, 8 micro-batches, full recompute, stale ids": Run(
        f"{PIPELINE_2} {EIGHT_MICRO_BATCHES} {FULL_RECOMPUTE}", ranks=2, program=STALE_IDS
    ),
    # Stop and resume.
    "fp32": Run(f"{DROPOUT} {UNTIL_12}", saves=True),
    "fp32, resumed": Run(f"{DROPOUT} {FROM_7}", continues="fp32"),
    "bf16": Run(f"--bf16 {DROPOUT} {UNTIL_12}", saves=True),
    "bf16, resumed": Run(f"--bf16 {DROPOUT} {FROM_7}", continues="bf16"),
    "fp32, distributed optimizer": Run(f"{DISTRIBUTED} {DROPOUT} {UNTIL_12}", ranks=2, saves=True),
    "fp32, distributed optimizer, resumed": Run(
        f"{DISTRIBUTED} {DROPOUT} {FROM_7}", ranks=2, continues="fp32, distributed optimizer"
    ),
    "bf16, distributed optimizer": Run(f"--bf16 {DISTRIBUTED} {UNTIL_12}", ranks=2, saves=True),
    "bf16, distributed optimizer, resumed": Run(
        f"--bf16 {DISTRIBUTED} {FROM_7}", ranks=2, continues="bf16, distributed optimizer"
    ),
    # Another expert parallel size after a stop.
    "experts on 2": Run(f"{EXPERT_2} {UNTIL_12}", ranks=2, saves=True),
    "experts on 2, resumed": Run(f"{EXPERT_2} {FROM_7}", ranks=2, continues="experts on 2"),
    "experts on 2, resumed on 1": Run(FROM_7, continues="experts on 2"),
    "experts on 2, distributed optimizer": Run(f"{EXPERT_2} {DISTRIBUTED} {UNTIL_12}", ranks=2, saves=True),
    "experts on 2, distributed optimizer, resumed": Run(
        f"{EXPERT_2} {DISTRIBUTED} {FROM_7}", ranks=2, continues="experts on 2, distributed optimizer"
    ),
    "experts on 2, distributed optimizer, resumed on 1": Run(
        f"{DISTRIBUTED} {FROM_7}", continues="experts on 2, distributed optimizer"
    ),
    "saved asynchronously": Run(f"{DISTRIBUTED} {DROPOUT} {UNTIL_12} --async-save", ranks=2, saves=True),
    "saved asynchronously, resumed": Run(
        f"{DISTRIBUTED} {DROPOUT} {FROM_7} --async-save", ranks=2, continues="saved asynchronously"
    ),
    # Other layouts after a stop.
    "tensor 2": Run(f"{TENSOR_2} {UNTIL_12}", ranks=2, saves=True),
    "tensor 2, resumed as pipeline 2": Run(f"{PIPELINE_2} {FROM_7}", ranks=2, continues="tensor 2"),
    "joint": Run(f"{TENSOR_EXPERT_2} {PIPELINE_2} {UNTIL_12}", ranks=4, saves=True),
    "joint, resumed on 1": Run(FROM_7, continues="joint"),
    "joint, resumed as pipeline 4": Run(f"--pipeline-model-parallel-size 4 {FROM_7}", ranks=4, continues="joint"),
    "joint, distributed optimizer": Run(
        f"{TENSOR_2} --expert-tensor-parallel-size 1 --expert-model-parallel-size 4 {DISTRIBUTED} {UNTIL_12}",
        ranks=4,
        saves=True,
    ),
    "joint, distributed optimizer, resumed on 1": Run(
        f"{DISTRIBUTED} {FROM_7}", continues="joint, distributed optimizer"
    ),
    "joint, distributed optimizer, resumed as pipeline 2, expert parallel 2, data parallel 2": Run(
        f"{PIPELINE_2} {EXPERT_2} {DISTRIBUTED} {FROM_7}", ranks=4, continues="joint, distributed optimizer"
    ),
    # Other masks.
    "mask of another seed": Run("--exit-interval 5", mask="other_seed.safetensors"),
    "second rank without tokens, on 1": Run(UNTIL_12, mask="starving.safetensors", saves=True),
    "second rank without tokens": Run(
        f"{EXPERT_2} {FROM_7}", ranks=2, continues="second rank without tokens, on 1", mask="starving.safetensors"
    ),
}


def runs_of_model(name: str, flags: str, layouts: dict[str, tuple[int, str]], **settings) -> dict[str, Run]:
    """A model on one process, and in several layouts from where that one was after 4 of 8 iterations.

    Args:
        name: of the run on one process; the others are called `NAME, LAYOUT`.
        flags: of all of them.
        layouts: number of ranks and further flags of each.
        settings: of all of them, see `Run`.
    """
    flags = f"--exit-interval 8 {flags}"
    runs = {name: Run(f"{flags} --save-interval 4", saves=True, **settings)}
    for layout, (ranks, more_flags) in layouts.items():
        runs[f"{name}, {layout}"] = Run(f"{flags} {more_flags} --ckpt-step 4", ranks=ranks, continues=name, **settings)
    return runs


BALANCING_LOSSES = """
    --moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss --moe-aux-loss-coeff 1e-2 2e-2 3e-2
"""
MORE_RECOMPUTE = "--recompute-granularity selective --recompute-modules moe shared_experts mlp core_attn"
# All that a model can have, at once: what goes wrong in one part shows in the losses of all.
RICH = f"""
    --num-attention-heads 4 --group-query-attention --num-query-groups 2 --moe-layer-freq [1,0,1,1]
    --moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate --moe-z-loss-coeff 1e-3 {BALANCING_LOSSES}
"""
TIED = {"omits": "--untie-embeddings-and-output-weights"}
# The choice is by scores with a bias, from 2 of 4 groups of 2 experts.
GROUPS = """
    --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk 3
    --moe-router-score-function sqrtsoftplus --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.1
"""
ALL_HEADS_NORMS = """
    --qk-layernorm --qk-layernorm-all-heads --num-attention-heads 4 --group-query-attention --num-query-groups 2
"""
CAPACITY = "--moe-router-topk 3 --moe-expert-capacity-factor 0.8"
# One micro-batch a step, so that the global loss is the same however many ranks share it.
WHOLE_BATCH = "--moe-router-load-balancing-type seq_aux_loss global_aux_loss --moe-aux-loss-coeff 2e-2 3e-2"

RUNS |= runs_of_model(
    "rich",
    f"{RICH} --mtp-num-layers 1",
    {
        "resumed": (1, ""),
        "tensor 2, expert parallel 2": (2, TENSOR_EXPERT_2),
        "pipeline 2": (2, PIPELINE_2),
        "interleaved pipeline": (2, f"{PIPELINE_2} --num-layers-per-virtual-pipeline-stage 1"),
        "overlapped shared experts": (2, f"{TENSOR_EXPERT_2} --moe-shared-expert-overlap"),
        "selective recompute": (2, f"{TENSOR_EXPERT_2} {MORE_RECOMPUTE}"),
        "tensor 2, expert parallel 2, pipeline 2": (4, f"{TENSOR_EXPERT_2} {PIPELINE_2}"),
        "full recompute, tensor 2, pipeline 2": (4, f"{TENSOR_2} {PIPELINE_2} {FULL_RECOMPUTE}"),
    },
    mask="five_layers.safetensors",
    **TIED,
)
RUNS |= runs_of_model(
    "repeated prediction",
    f"{RICH} --mtp-num-layers 2 --mtp-use-repeated-layer",
    {"tensor 2": (2, TENSOR_2), "pipeline 2": (2, PIPELINE_2)},
    mask="six_layers.safetensors",
    **TIED,
)
RUNS |= runs_of_model(
    "data parallel rich",
    f"{RICH} --moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1e-2 2e-2 {DISTRIBUTED}",
    {
        "tensor 2, expert parallel 4, pipeline 2, data parallel 2": (
            8,
            f"{TENSOR_2} --expert-tensor-parallel-size 1 --expert-model-parallel-size 4 {PIPELINE_2}",
        )
    },
)
RUNS |= runs_of_model(
    "groups",
    GROUPS,
    {
        "resumed": (1, ""),
        "tensor 2, expert parallel 2": (2, TENSOR_EXPERT_2),
        "expert parallel 2": (2, EXPERT_2),
    },
)
RUNS |= runs_of_model("norms over all heads", ALL_HEADS_NORMS, {"tensor 2": (2, TENSOR_2)})
RUNS |= runs_of_model("capacity", CAPACITY, {"expert parallel 2": (2, EXPERT_2), "pipeline 2": (2, PIPELINE_2)})
RUNS |= runs_of_model(
    "padded capacity",
    f"{CAPACITY} --moe-pad-expert-input-to-capacity --moe-token-drop-policy position",
    {"expert parallel 2": (2, EXPERT_2), "pipeline 2": (2, PIPELINE_2)},
)
RUNS |= runs_of_model(
    "global loss",
    f"{WHOLE_BATCH} --micro-batch-size 8",
    {
        "expert parallel 2": (2, f"{EXPERT_2} --micro-batch-size 4"),
        "tensor 2, data parallel 2": (4, f"{TENSOR_2} --micro-batch-size 4"),
    },
)
# Dispatched by plan with two expert-parallel ranks; with one process, by Megatron's dispatcher.
RUNS |= runs_of_model(
    "experts of one rank",
    "--moe-z-loss-coeff 1e-3 --moe-shared-expert-intermediate-size 16 --moe-router-topk 3",
    {
        "expert parallel 2": (2, EXPERT_2),
        "tensor 2, expert parallel 2": (2, TENSOR_EXPERT_2),
        "selective recompute": (2, f"{EXPERT_2} --recompute-granularity selective --recompute-modules moe"),
        "full recompute, expert parallel 2, pipeline 2": (4, f"{EXPERT_2} {PIPELINE_2} {FULL_RECOMPUTE}"),
        "expert parallel 2, interleaved pipeline": (
            4,
            f"{EXPERT_2} {PIPELINE_2} --num-layers-per-virtual-pipeline-stage 1",
        ),
    },
    mask="rank_local.safetensors",
)
RUNS["recorded routing, experts of one rank, expert parallel 2"] = Run(
    f"{EXPERT_2} --moe-router-topk 3 --moe-z-loss-coeff 1e-3 --moe-per-layer-logging --log-interval 2 "
    "--eval-interval 3 --exit-interval 4",
    ranks=2,
    mask="rank_local.safetensors",
    program=RECORDED_ROUTING,
)
# What is compared: every loss that training logs, and the norm of all gradients.
SCALARS = (
    "lm loss",
    "lm loss validation",
    "mtp_1 loss",
    "mtp_2 loss",
    "load_balancing_loss",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "z_loss",
    "grad-norm",
)


@dataclass(frozen=True)
class Outcome:
    """What a finished run left.

    Attributes:
        exit_codes: one a rank; under torchrun that of torchrun alone.
        errors: what was written to stderr, one text a rank, or one for all under torchrun.
        folder: its checkpoints are in `save`, its TensorBoard events in `tensorboard`, its output in `*.log`.
    """

    exit_codes: tuple[int, ...]
    errors: tuple[str, ...]
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "save"

    @cached_property
    def curves(self) -> dict[str, dict[int, float]]:
        """Those of `SCALARS` that the run logged, by iteration, with the precision of fp32."""
        logged = read_scalars(self.folder)
        return {name: {event.step: event.value for event in logged[name]} for name in SCALARS if name in logged}

    @property
    def iterations(self) -> list[int]:
        """The iterations that this run trained."""
        return list(self.curves["lm loss"])

    def difference(self, reference: "Outcome", scalars: Sequence[str] | None = None) -> float:
        """The largest relative difference to a reference, over all iterations of this run and all `scalars`.

        By default over all that it logged.
        """
        values = [
            (value, reference.curves[name][iteration])
            for name in scalars or self.curves
            for iteration, value in self.curves[name].items()
        ]
        ours, theirs = np.array(values).T
        return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))

    def report(self) -> str:
        """The end of all that its processes wrote."""
        logs = sorted(self.folder.glob("*.log"))
        return f"exit codes {self.exit_codes}\n" + "\n".join(f"{log.name}: {log.read_text()[-4000:]}" for log in logs)


class Workplace:
    """A folder with a dataset, its token counts and routing masks, where training processes run.

    Attributes:
        folder: its path; holds `data.bin`, `data.idx`, `counts.safetensors`, and the routing masks `mask.safetensors`,
            `five_layers.safetensors`, `six_layers.safetensors`, `other_seed.safetensors`, `starving.safetensors` and
            `rank_local.safetensors`, which is rank-local for two ranks.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        write_dataset(folder / "data", np.random.default_rng(0))
        frequency = count_token_frequency([str(folder / "data")], VOCAB_SIZE, workers=1)
        frequency.save(folder / "counts.safetensors")
        for name, num_layers, seed in (
            ("mask", 4, 1),
            ("five_layers", 5, 1),
            ("six_layers", 6, 1),
            ("other_seed", 4, 2),
        ):
            recipe = MaskRecipe(8, num_layers, "uniform", frequent_mass=0.4, frequent_visible_experts=4, seed=seed)
            mask = build_routing_mask(recipe, frequency=frequency)
            mask.save(folder / f"{name}.safetensors")
        starving = RoutingMask(mask.row_of_id % 4, mask.visible_bits, VOCAB_SIZE, 8, 4, mask.provenance)
        starving.save(folder / "starving.safetensors")  # all tokens go to the first 4 experts
        recipe = MaskRecipe(8, 4, "rank-local", 0.4, frequent_visible_experts=4, seed=1, expert_model_parallel_size=2)
        local = build_routing_mask(recipe, frequency=frequency)
        # As if it were so by chance: such a mask may be used with any number of ranks.
        local = replace(local, provenance=mask.provenance)
        local.save(folder / "rank_local.safetensors")

    def run(self, run: Run, folder: Path, load: Path | None = None, timeout: float = TIMEOUT) -> Outcome:
        """Start the processes of a run and wait for their end; if one fails or they hang, the others are killed."""
        with self.start(run, folder, load) as processes:
            return processes.wait(timeout=timeout)

    def start(
        self, run: Run, folder: Path, load: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> "RankProcesses":
        """Start the processes of a run; to be used as a context manager, at whose end they are killed."""
        program = [*run.program, *self.flags(run, folder, load)]
        folder.mkdir()
        if run.torchrun:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.ranks)]
            launcher += ["--monitor-interval", "0.1", "--max-restarts", str(run.restarts)]
            return RankProcesses([*launcher, *program], [{}], folder, self.folder, environment or {})
        return RankProcesses(program, variables_of_ranks(run.ranks), folder, self.folder, environment or {})

    def execute(self, program: Sequence[str], folder: Path, ranks: int = 1) -> Outcome:
        """Run Python on `program` as one group of ranks; their output goes to `folder`, which exists."""
        with RankProcesses(program, variables_of_ranks(ranks), folder, self.folder, {}) as processes:
            return processes.wait()

    def flags(self, run: Run, folder: Path, load: Path | None = None) -> list[str]:
        """The command line arguments of a run that writes to `folder`."""
        flags = [*shlex.split(SETTINGS), "--data-cache-path", str(folder / "cache")]
        flags += ["--tensorboard-dir", str(folder / "tensorboard")] if run.logs_scalars else []
        flags += ["--routing-mask", run.mask] if run.mask else []
        flags += ["--load", str(load)] if load else []
        flags += ["--save", str(folder / "save")] if run.saves else []
        flags = [flag for flag in flags if flag != run.omits]
        return [*flags, *shlex.split(run.flags)]


def variables_of_ranks(ranks: int) -> list[dict[str, str]]:
    """What torchrun would put into the environment of each rank of one group."""
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    group = size | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


class RankProcesses:
    """Running processes of one run, one a rank, or torchrun alone; killed at the end of the `with` block.

    Attributes:
        folder: their output is in `out0.log`, `err0.log` and so on.
        pids: theirs; under torchrun that of torchrun alone.
    """

    def __init__(
        self,
        program: Sequence[str],
        per_rank: Sequence[dict[str, str]],
        folder: Path,
        working_folder: Path,
        environment: Mapping[str, str],
    ):
        self.folder = folder
        common = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        self._processes = []
        for rank, variables in enumerate(per_rank):
            with open(folder / f"out{rank}.log", "w") as out, open(folder / f"err{rank}.log", "w") as err:
                process = subprocess.Popen(
                    [sys.executable, *program],
                    cwd=working_folder,
                    env=os.environ | common | environment | variables,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            self._processes.append(process)

    def __enter__(self) -> "RankProcesses":
        return self

    def __exit__(self, *exception) -> None:
        for process in self._processes:
            kill_with_children(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def pid_of_rank(self, rank: int) -> int | None:
        """The process of a rank that torchrun started; None if it has not, or not again."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.pids[0]).children():
                if child.environ().get("RANK") == str(rank):
                    return child.pid
        return None

    @property
    def output(self) -> str:
        """All that was written so far."""
        return "".join(log.read_text() for log in sorted(self.folder.glob("*.log")))

    def wait_until(self, holds: Callable[[], object]) -> None:
        """Return as soon as `holds()` is true; fails the test if the processes end before, or it takes too long."""
        deadline = time.monotonic() + TIMEOUT
        while not holds():
            ended = any(process.poll() is not None for process in self._processes)
            if (ended and not holds()) or time.monotonic() > deadline:
                pytest.fail(f"{'ended' if ended else 'waited'} in vain\n{self._outcome().report()}")
            time.sleep(0.02)

    def wait_for_iteration(self, iteration: int) -> None:
        """Return once that iteration is logged."""
        self.wait_until(lambda: re.search(rf"iteration +{iteration}/", self.output))

    @property
    def is_running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def wait(self, all_end: bool = False, timeout: float = TIMEOUT) -> Outcome:
        """Wait for the end of all, or of the first that fails; then kill the others.

        Args:
            all_end: wait for all, also if one fails.
            timeout: seconds until all are killed.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            codes = [process.poll() for process in self._processes]
            if None not in codes or (any(codes) and not all_end):
                break
            time.sleep(0.05)
        self.__exit__()
        return self._outcome()

    def _outcome(self) -> Outcome:
        errors = tuple((self.folder / f"err{rank}.log").read_text() for rank in range(len(self._processes)))
        return Outcome(tuple(process.returncode for process in self._processes), errors, self.folder)


def write_dataset(prefix: Path, random: np.random.Generator, vocab_size: int = VOCAB_SIZE) -> None:
    """Write Zipf-distributed ids of which every second one follows from the one before; about 100 samples."""
    shares = 1 / np.arange(1, vocab_size + 1)
    with IndexedDatasetWriter(prefix, optimal_dtype(vocab_size)) as writer:
        for _ in range(30):
            ids = random.choice(vocab_size, size=2 * random.integers(25, 100), p=shares / shares.sum())
            ids[1::2] = (ids[0::2] * 7 + 3) % vocab_size
            writer.add_document(ids)


def kill_with_children(process: subprocess.Popen) -> None:
    """Kill a process and all that it started; torchrun's ranks are in process groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "runs(*names): training runs of tests/training/conftest.py that a test looks at")


@pytest.fixture(scope="session")
def run_table() -> dict[str, Run]:
    return RUNS


@pytest.fixture(scope="session")
def settings() -> str:
    return SETTINGS


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def new_run() -> type[Run]:
    """The description of a training run."""
    return Run


@pytest.fixture(scope="session")
def start(workplace: Workplace) -> Iterator[Callable[..., Future[Outcome]]]:
    """Queue a run in a folder of the given name."""
    pool = ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 1) // 2))

    def start(name: str, run: Run, source: Future[Outcome] | None = None) -> Future[Outcome]:
        folder = workplace.folder / "runs" / re.sub(r"\W+", "_", name)
        folder.parent.mkdir(exist_ok=True)
        return pool.submit(lambda: workplace.run(run, folder, source and source.result().checkpoints))

    yield start
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def start_by_name(
    request: pytest.FixtureRequest, start: Callable[..., Future[Outcome]]
) -> Callable[[str], Future[Outcome]]:
    """Queue one of `RUNS`, once; those that the selected tests name are queued to begin with, in their order."""

    @cache
    def start_by_name(name: str) -> Future[Outcome]:
        run = RUNS[name]
        return start(name, run, start_by_name(run.continues) if run.continues else None)

    for item in request.session.items:
        for mark in item.iter_markers("runs"):
            for name in mark.args:
                start_by_name(name)
    return start_by_name


@pytest.fixture
def runs(request: pytest.FixtureRequest, start_by_name: Callable[[str], Future[Outcome]]) -> list[Outcome]:
    """The outcomes of the runs that the test's mark `runs` names; all ended well."""
    outcomes = [start_by_name(name).result() for mark in request.node.iter_markers("runs") for name in mark.args]
    for outcome in outcomes:
        if any(outcome.exit_codes):
            pytest.fail(f"{outcome.folder.name}: {outcome.report()}")
    return outcomes


class Refusal:
    """Checks that a run was refused for bad input.

    Attributes:
        run: to be varied by the test; it would write everything that a run can write, but for TensorBoard's events.
    """

    run = Run(saves=True, logs_scalars=False)

    def __call__(self, run: Future[Outcome], exit_code: int = 2) -> str:
        """Wait for it, check its exit code and that it neither trained nor wrote; return its one error line."""
        outcome = run.result()
        lines = [line for text in outcome.errors for line in text.splitlines() if line.startswith("error: ")]
        assert outcome.exit_codes == (exit_code,), outcome.report()
        assert len(lines) == 1, outcome.report()
        assert "Traceback (most recent call last)" not in "".join(outcome.errors) or exit_code == 1
        assert not any(re.search(r"iteration +\d+/", log.read_text()) for log in outcome.folder.glob("out*.log"))
        assert {path.name for path in outcome.folder.iterdir()} == {"out0.log", "err0.log"}
        return lines[0]


@pytest.fixture(scope="session")
def refusal() -> Refusal:
    return Refusal()


@pytest.fixture(scope="session")
def files_and_times() -> Callable[[Path], dict[Path, int]]:
    """All files under a folder, and when they were last changed."""
    return lambda folder: {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
