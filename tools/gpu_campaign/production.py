"""The steps that train on all GPUs as in production: the speed of a run, and communication with and without overlap."""

import json
from dataclasses import dataclass

from gpu_campaign.results import Cell, Findings, Table
from gpu_campaign.runs import Run, expert_parallel_size
from gpu_campaign.step import Command, Context
from maskmoe.comparison.table import training_seconds
from maskmoe.routing_mask.dispatch_kind import DispatchKind

_OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
_ONE_BUCKET = ("--ddp-bucket-size", "1000000000")
_NO_FILES = ("--save", "false", "--eval-iters", "0", "--tensorboard-log-interval", "1")


# ---- Speed -----------------------------------------------------------------------------------------------------------


def _speed_run(context: Context) -> Run:
    """Return the run: a model of 12 layers, or the laptop model in a dry run."""
    large = ("rank-local-12", "12l-768d-maskmoe", 8)
    mask, model, micro_batch = ("rank-local", "laptop", 1) if context.is_dry_run else large
    ranks = context.num_ranks
    flags = (
        *("--expert-model-parallel-size", str(expert_parallel_size(context)), "--bf16"),
        *("--micro-batch-size", str(micro_batch), "--global-batch-size", str(2 * micro_batch * ranks)),
        *("--use-distributed-optimizer", *_OVERLAP, *_NO_FILES, "--exit-interval", "20"),
        "--log-memory-to-tensorboard",
        *("--profile", "--use-pytorch-profiler", "--profile-step-start", "10", "--profile-step-end", "12"),
    )
    return Run("speed", "run", flags, mask, model, ranks)


def speed_commands(context: Context) -> list[Command]:
    """Return the commands that predict the cost of a run and train it; Megatron's profiler keeps a trace."""
    run = _speed_run(context)
    check, report = run.command(context, "--check"), str(context.folder("speed") / "check.json")
    return [Command((*check.words, "--json", report, "--force")), run.command(context)]


def read_speed(context: Context) -> Findings:
    """Return operations per second, and the memory beside its prediction."""
    run, check = _speed_run(context), json.loads((context.folder("speed") / "check.json").read_text())
    iterations = len(run.scalars(context, "lm loss"))
    seconds = training_seconds(run.folder(context) / "tensorboard") / iterations
    tokens, memory = check["layout"]["tokens_per_step"], check["memory"]["stages"][0]
    # `--check` counts with Megatron's `num_floating_point_operations`, and the experts that tokens use under the mask.
    teraflops = check["cost"]["flops_per_token"] * tokens / seconds / run.ranks / 1e12
    peak = json.loads((context.folder("cuda") / "facts.json").read_text()).get("bf16 TFLOP/s of a GPU")
    predicted = sum(memory[purpose] for purpose in check["memory"]["exact"])
    measured = max(run.scalars(context, "mem-max-allocated-bytes").values(), default=None)
    facts: dict[str, Cell] = {
        "iterations": iterations,
        "seconds an iteration (median)": seconds,
        "tokens/s": tokens / seconds,
        "TFLOP/s of a GPU": teraflops,
        "MFU": teraflops / peak if peak else None,
        "memory, predicted: weights, gradients, optimizer (bytes)": predicted,
        "memory, predicted: all (bytes)": memory["total"],
        "memory, measured at its peak (bytes)": measured,
        "measured / predicted": measured / memory["total"] if measured else None,
    }
    traces = sorted(run.folder(context).glob("torch_profile/*"))
    facts["trace, for chrome://tracing"] = str(traces[0].relative_to(context.output)) if traces else None
    problems = () if traces else ("the profiler has left no trace",)
    if measured is not None and measured < predicted:
        problems += ("the memory is less than weights, gradients and optimizer take, so it was not measured",)
    return Findings(facts=facts, problems=problems)


# ---- Overlap ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """Two runs that differ in one thing.

    Attributes:
        dispatch: the way to dispatch, in both runs.
        runs: the runs without and with overlap, whose losses must be equal in every bit.
    """

    dispatch: DispatchKind
    runs: tuple[Run, Run]


def _pairs(context: Context) -> list[_Pair]:
    """Return the pairs of runs that are compared.

    Both sides of a pair have the same buckets: otherwise, the order of sums would differ. Without overlap, Megatron
    has one bucket.
    """
    ranks = context.num_ranks

    def run(name: str, mask: str, *flags: str) -> Run:
        common = (
            *("--expert-model-parallel-size", str(expert_parallel_size(context)), "--moe-router-topk", "2"),
            *("--micro-batch-size", "1", "--global-batch-size", str(2 * ranks)),
            *("--bf16", "--deterministic-mode", "--use-distributed-optimizer", "--exit-interval", "8", *_NO_FILES),
        )
        return Run("overlap", f"{mask}, {name}", (*common, *flags), mask, "laptop", ranks)

    def pair(dispatch: DispatchKind, mask: str) -> _Pair:
        return _Pair(dispatch, (run("off", mask), run("on", mask, *_OVERLAP, *_ONE_BUCKET)))

    if expert_parallel_size(context) == 1:
        return [pair(DispatchKind.ONE_RANK, "balanced")]
    return [pair(DispatchKind.PLANNED, "rank-local"), pair(DispatchKind.ONE_COPY, "balanced")]


def overlap_commands(context: Context) -> list[Command]:
    """Return the commands of all runs."""
    runs = {run.name: run for pair in _pairs(context) for run in pair.runs}
    return [run.command(context) for run in runs.values()]


def read_overlap(context: Context) -> Findings:
    """Compare the losses of each pair of runs bit by bit."""
    rows, problems, notes = list[tuple[Cell, ...]](), list[str](), list[str]()
    for pair in _pairs(context):
        curves = [run.scalars(context, "lm loss") for run in pair.runs]
        first, second = (run.name for run in pair.runs)
        if not (curves[0] and curves[0].keys() == curves[1].keys()):
            problems.append(f"{first} and {second}: a run did not log its losses")
            continue
        differing = sum(loss != curves[1][iteration] for iteration, loss in curves[0].items())
        rows.append((first, second, f"{differing} of {len(curves[0])}"))
        if differing:
            problems.append(f"{first} and {second}: {differing} losses differ")
        for run, gathers in zip(pair.runs, (False, True), strict=True):
            if not run.has_logged(context, "overlap_param_gather", str(gathers)):
                problems.append(f"{run.name}: overlap_param_gather was not {gathers}")
            if not run.has_logged(context, "dispatch", pair.dispatch.value):
                problems.append(f"{run.name}: the run did not dispatch by {pair.dispatch.value}")
    if expert_parallel_size(context) == 1:
        notes.append("Experts are on one rank, so no rows travel.")
    columns = ("run", "run", "losses that differ")
    return Findings(
        notes=tuple(notes),
        tables=(Table(title="Overlap, with --deterministic-mode", columns=columns, rows=tuple(rows)),),
        problems=tuple(problems),
    )
