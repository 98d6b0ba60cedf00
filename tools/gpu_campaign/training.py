"""The steps that make data and train the laptop model, on the CPU and on a GPU."""

import math
from collections.abc import Mapping
from pathlib import Path

from gpu_campaign.results import Cell, Findings, Plot, Table
from gpu_campaign.step import Command, Context
from maskmoe.comparison.data import Dataset
from maskmoe.comparison.report import new_figure, tidy
from maskmoe.comparison.stage import maskmoe_command
from maskmoe.comparison.table import scalars, training_seconds

ITERATIONS = 30
TOLERANCE = 0.03
_NOTE = (
    f"All runs start from one checkpoint and read the same data. Losses may differ by {TOLERANCE} nats from the CPU's: "
    "bf16 keeps 8 significant bits where the CPU computes in float32, and tokens whose best experts are almost level "
    "may choose another one. On a CPU, bf16 changes the loss by up to 0.01 nats."
)
_REFERENCE = "float32 on the CPU"
_WITHOUT_PACKAGES = (
    *("--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"),
    *("--no-masked-softmax-fusion", "--no-gradient-accumulation-fusion", "--no-moe-permute-fusion"),
)
"""Flags that need neither Transformer Engine nor Apex."""
_CORPUS_BYTES, _VOCAB_SIZE, _SEQ_LENGTH = 3_000_000, 4096, 256
_SHOWN = (1, 5, 10, 15, 20, 25, 30)


def data_commands(context: Context) -> list[Command]:
    """Return the commands from the sources of the installed Python to a dataset and a routing mask."""
    data = _data(context)
    tokenizer = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", data.tokenizer_model)
    masking = ("--frequent-mass", "0.4", "--frequent-visible-experts", "4", "--assignment", "balanced")
    lines = (
        ("corpus", "--output", data.corpus, "--max-bytes", _CORPUS_BYTES),
        (
            "tokenizer",
            "--input",
            data.corpus,
            "--vocab-size",
            _VOCAB_SIZE,
            "--output-prefix",
            data.folder / "tokenizer",
        ),
        ("preprocess", "--input", data.corpus, "--append-eod", *tokenizer, "--output-prefix", data.folder / "dataset"),
        ("count", "--data-path", data.prefix, "--vocab-size", _VOCAB_SIZE, "--output", data.token_frequency),
        (
            *("mask", "--token-frequency", data.token_frequency, "--num-experts", 8, "--num-layers", 4),
            *(*masking, "--seed", 1, "--output", _mask(context)),
        ),
    )
    return [Command(maskmoe_command(*line, "--force")) for line in lines]  # a step may be repeated


def read_data(context: Context) -> Findings:
    """Return the sizes of dataset and mask."""
    files = (*_data(context).files, _mask(context))
    return Findings(facts={path.name: f"{path.stat().st_size:,} bytes" for path in files})


def _data(context: Context) -> Dataset:
    return Dataset(context.folder("data"), str(_VOCAB_SIZE), _SEQ_LENGTH)


def _mask(context: Context) -> Path:
    return context.folder("data") / "routing_mask.safetensors"


def training_commands(context: Context) -> list[Command]:
    """Return the commands that train on the CPU in float32, and on each implementation of the GPU in bf16.

    Initial weights depend on the device, so all runs start from one checkpoint.
    """
    folder = context.folder("training")
    threads = str(max(1, context.devices.num_cores // 2))
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(context.root / "tools"), "OMP_NUM_THREADS": threads}

    start = _train(context, "start", ("--exit-interval", "1"), on_cpu)
    continues = (
        *("--load", str(folder / "start" / "checkpoints"), "--finetune", "--save", "false"),
        *("--exit-interval", str(ITERATIONS)),
    )
    commands = [start, _train(context, _REFERENCE, continues, on_cpu)]
    for name, flags in _runs_to_compare(context).items():
        commands.append(_train(context, name, (*continues, *flags), on_cpu if context.is_dry_run else {}))
    return commands


def _runs_to_compare(context: Context) -> dict[str, list[str]]:
    """Return the flags of the runs in bf16, by name."""
    if context.is_dry_run:
        return {"bf16 on the CPU": ["--bf16"]}
    runs = {"GPU": ["--bf16", *_WITHOUT_PACKAGES]}
    if context.has_transformer_engine:
        runs["GPU, Transformer Engine"] = ["--bf16"]
    return runs


def _train(context: Context, name: str, flags: tuple[str, ...], environment: Mapping[str, str]) -> Command:
    """Return the command that trains the laptop model on one rank, as a user does."""
    data, folder = _data(context), context.folder("training")
    words = (
        *(str(context.root / "launch" / "pretrain.sh"), "--gpus-per-node", "1", "--max-restarts", "0"),
        *("--run-dir", str(_run_dir(context, name)), str(context.root / "launch" / "models" / "laptop.yaml")),
        *("--data-path", str(data.prefix), "--split", "90,10,0", "--data-cache-path", str(folder / "cache")),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(data.tokenizer_model)),
        *("--routing-mask", str(_mask(context)), "--log-interval", "1", *flags),
    )
    return Command(words, environment)


def _run_dir(context: Context, name: str) -> Path:
    return context.folder("training") / name.replace(",", "").replace(" ", "-")


def read_training(context: Context) -> Findings:
    """Compare the losses of all runs with those of the CPU, iteration by iteration."""
    folders = {name: _run_dir(context, name) / "tensorboard" for name in (_REFERENCE, *_runs_to_compare(context))}
    losses = {name: _losses(folder) for name, folder in folders.items()}
    facts: dict[str, Cell] = {"tolerance (nats)": TOLERANCE}
    problems = []
    backend = "gloo" if context.is_dry_run else "nccl"
    for name in _runs_to_compare(context):
        difference = largest_difference(losses[_REFERENCE], losses[name])
        facts[f"{name}: largest difference of the loss (nats)"] = difference
        if not difference <= TOLERANCE:
            problems.append(f"{name}: losses differ by {difference:.3g} nats from the CPU's, more than {TOLERANCE}")
        # The console shows the arguments with `--verbose` only; otherwise the rank's own log has them.
        arguments = [*_lines(context, name), *_lines(context, name, "logs/rank0.log")]
        if not any("distributed_backend" in line and line.endswith(f" {backend}") for line in arguments):
            problems.append(f"{name}: the run did not use the backend {backend}")
    for name, folder in folders.items():
        iterations = max(losses[name], default=0)
        seconds = training_seconds(folder) / iterations if iterations else None
        facts[f"{name}: seconds an iteration (median)"] = seconds
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


def _lines(context: Context, name: str, logs_of_run: str = "logs/node0/**/stdout.log") -> list[str]:
    """Return the lines in the logs of a run; by default those that the console shows."""
    logs = sorted(_run_dir(context, name).glob(logs_of_run))
    return [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]


def _losses(tensorboard: Path) -> dict[int, float]:
    """Return finite losses by iteration."""
    return {step: loss for step, loss in scalars(tensorboard, "lm loss") if math.isfinite(loss)}


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
