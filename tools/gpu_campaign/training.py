"""The step that trains the laptop model on the CPU and on a GPU, and compares the losses."""

from collections.abc import Mapping
from pathlib import Path

from gpu_campaign.results import Cell, Findings, Plot, Table
from gpu_campaign.runs import Run
from gpu_campaign.step import Command, Context
from maskmoe.comparison.report import new_figure, tidy

ITERATIONS = 30
TOLERANCE = 0.03
_NOTE = (
    f"All runs start from one checkpoint and read the same data. Losses may differ by {TOLERANCE} nats from the CPU's: "
    "bf16 keeps 8 significant bits where the CPU computes in float32, and tokens whose best experts are almost level "
    "may choose another one. On a CPU, bf16 changes the loss by up to 0.01 nats."
)
_REFERENCE = "float32 on the CPU"
_SHOWN = (1, 5, 10, 15, 20, 25, 30)


def training_commands(context: Context) -> list[Command]:
    """Return the commands that train on the CPU in float32, and on each implementation of the GPU in bf16.

    Initial weights depend on the device, so all runs start from one checkpoint.
    """
    start = Run("training", "start", ("--exit-interval", "1"), environment=_on_cpu(context))
    return [run.command(context) for run in (start, *_runs(context))]


def _runs(context: Context) -> tuple[Run, ...]:
    """Return the runs that are compared; the first one is the reference."""
    load = ("--load", str(context.folder("training") / "start" / "checkpoints"), "--finetune", "--save", "false")
    flags = (*load, "--exit-interval", str(ITERATIONS))
    on_cpu = _on_cpu(context)
    reference, in_bf16 = Run("training", _REFERENCE, flags, environment=on_cpu), (*flags, "--bf16")
    if context.is_dry_run:
        return reference, Run("training", "bf16 on the CPU", in_bf16, environment=on_cpu)
    runs = (reference, Run("training", "GPU", in_bf16, has_engine=False))
    has_engine = context.has_transformer_engine
    return (*runs, Run("training", "GPU, Transformer Engine", in_bf16)) if has_engine else runs


def _on_cpu(context: Context) -> dict[str, str]:
    threads = str(max(1, context.devices.num_cores // 2))
    return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}


def read_training(context: Context) -> Findings:
    """Compare the losses of all runs with those of the CPU, iteration by iteration."""
    reference, *others = _runs(context)
    losses = {run.name: run.scalars(context, "lm loss") for run in (reference, *others)}
    facts: dict[str, Cell] = {"tolerance (nats)": TOLERANCE}
    problems = []
    backend = "gloo" if context.is_dry_run else "nccl"
    for run in others:
        difference = largest_difference(losses[_REFERENCE], losses[run.name])
        facts[f"{run.name}: largest difference of the loss (nats)"] = difference
        if not difference <= TOLERANCE:
            problems.append(f"{run.name}: losses differ by {difference:.3g} nats from the CPU's, more than {TOLERANCE}")
        if losses[_REFERENCE] == losses[run.name]:
            problems.append(f"{run.name}: all losses equal the CPU's in every bit, so both runs did the same")
        if not run.has_logged(context, "distributed_backend", backend):
            problems.append(f"{run.name}: the run did not use the backend {backend}")
    picture = context.folder("training") / "losses.png"
    draw_losses(losses, picture)
    rows = tuple((number, *(values.get(number) for values in losses.values())) for number in _SHOWN)
    return Findings(
        notes=(_NOTE,),
        facts=facts,
        tables=(Table(title="Loss in nats per token", columns=("iteration", *losses), rows=rows),),
        plots=(Plot(file=str(picture.relative_to(context.output)), caption="Losses, and differences from the CPU"),),
        problems=tuple(problems),
    )


def largest_difference(reference: Mapping[int, float], losses: Mapping[int, float]) -> float:
    """Return the largest difference over all iterations; infinite if a loss is missing or not finite."""
    missing = float("inf")
    return max(
        abs(reference.get(number, missing) - losses.get(number, -missing)) for number in range(1, ITERATIONS + 1)
    )


def draw_losses(losses: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Draw the losses of all runs, and below the differences from the first run."""
    figure = new_figure(7.5, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    (_, reference), *_ = losses.items()
    for index, (name, values) in enumerate(losses.items()):
        upper.plot(list(values), list(values.values()), label=name, color=f"C{index}")
        if values is not reference:
            common = [number for number in values if number in reference]
            lower.plot(common, [values[number] - reference[number] for number in common], color=f"C{index}")
    for limit in (-TOLERANCE, TOLERANCE):
        lower.axhline(limit, color="#8a8a8a", linewidth=1, linestyle="--")
    upper.set(ylabel="loss (nats per token)")
    lower.set(xlabel="iteration", ylabel="difference")
    upper.legend(frameon=False)
    for axes in (upper, lower):
        tidy(axes)
    figure.savefig(path, format="png")
