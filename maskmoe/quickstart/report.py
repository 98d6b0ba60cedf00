"""The results of a run: tables and a plot of the losses."""

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe.cli import atomic_output
from maskmoe.quickstart.plan import Plan
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.workflow.markdown import markdown_table
from maskmoe.workflow.progress import TrainingHistory, format_seconds
from maskmoe.workflow.record import RunRecord


@dataclass(frozen=True)
class Results:
    """All that a report shows.

    Attributes:
        history: losses during training.
        evaluation: what `maskmoe.training.evaluate` wrote.
        unigram_loss: entropy of the token frequencies, in nats: the loss of knowing nothing else.
        training_speed: tokens/s, the median over training.
        trained_tokens: tokens in all iterations.
        stage_seconds: by name of the stage.
        sample: generated text, which begins with the prompt.
        settings: of the model and the mask, in words.
        paths: what the files are, and where.
    """

    history: TrainingHistory
    evaluation: dict[str, Any]
    unigram_loss: float
    training_speed: float
    trained_tokens: int
    stage_seconds: dict[str, float]
    sample: str
    settings: str
    paths: dict[str, Path]


def collect_results(plan: Plan, record: RunRecord, training_log: Sequence[str]) -> Results:
    """Gather the results of a finished run from its files."""
    settings, files = plan.settings, plan.files
    history = TrainingHistory(training_log)
    tokens = {it: r.batch * settings.seq_length for it, r in history.iterations.items()}
    speeds = [tokens[it] / r.seconds for it, r in history.iterations.items() if it > 1 or len(tokens) == 1]
    return Results(
        history=history,
        evaluation=json.loads(files.evaluation.read_text(encoding="utf-8")),
        unigram_loss=entropy(TokenFrequency.load(files.token_frequency).occurrences),
        training_speed=statistics.median(speeds),
        trained_tokens=settings.train_iters * max(tokens.values()),
        stage_seconds={(stage := make().name): record[stage].seconds for make in plan.stages},
        sample=files.sample.read_text(encoding="utf-8").rstrip("\n"),
        settings=(
            f"{settings.num_layers} layers, width {settings.hidden_size}, {settings.num_experts} experts in each, "
            f"{settings.vocab_size:,} token ids; the ids that make up {settings.frequent_mass:.0%} of the text see "
            f"{settings.frequent_visible_experts} experts, all others one ({settings.assignment}); "
            f"{plan.devices.num_processes} processes, expert parallel {plan.expert_model_parallel_size}"
        ),
        paths={
            "checkpoint": files.checkpoints,
            "model for transformers": files.model,
            "routing mask": files.routing_mask,
            "loss curve": files.loss_curve,
            "this report": files.report,
            "commands": files.commands,
            "logs": files.logs,
            "TensorBoard": files.tensorboard,
        },
    )


def entropy(occurrences: np.ndarray) -> float:
    """Of the distribution that the counts, `[vocab]`, describe; in nats."""
    shares = occurrences[occurrences > 0] / occurrences.sum()
    return float(-(shares * np.log(shares)).sum())


def render_report(results: Results) -> str:
    """The report in Markdown, aligned so that it also reads well on a terminal."""
    unigram = f"knowing token frequencies only: {math.exp(results.unigram_loss):,.1f}"
    fence = "```"
    while fence in results.sample:
        fence += "`"
    sections = [
        "# MaskMoE quickstart",
        f"{results.settings}.",
        "## Perplexity on held-out text, by frequency of the input token",
        _bands_table(results.evaluation),
        f"Perplexity of {unigram}.",
        "## Load of the experts on held-out text",
        _load_table(results.evaluation["expert_load"]),
        "## Speed",
        _speed_table(results),
        "## Sample",
        f"{fence}text\n{results.sample}\n{fence}",
        "## Files",
        "\n".join(f"- {what}: {os.fspath(path)}" for what, path in results.paths.items()),
    ]
    return "\n\n".join(sections) + "\n"


def _bands_table(evaluation: dict[str, Any]) -> str:
    overall = {"name": "all", "share": 1.0} | {key: evaluation[key] for key in ("tokens", "loss", "perplexity")}
    rows = [
        [
            band["name"],
            f"{band['share']:.1%}",
            f"{band['tokens']:,}",
            _number(band["loss"], ".3f"),
            _number(band["perplexity"], ",.1f"),
        ]
        for band in (*evaluation["bands"], overall)
    ]
    return markdown_table(["input tokens", "share", "tokens", "loss", "perplexity"], rows)


def _load_table(expert_load: Sequence[dict[str, Any]]) -> str:
    rows = []
    for load in expert_load:
        tokens = load["tokens_per_expert"]
        shares = " ".join(f"{100 * count / max(1, sum(tokens)):.0f}" for count in tokens)
        rows.append([str(load["layer"]), f"{load['max_over_mean']:.2f}", shares])
    return markdown_table(["layer", "max/mean", "% of the tokens, by expert"], rows)


def _speed_table(results: Results) -> str:
    rows = [
        ["training", f"{results.trained_tokens:,}", f"{results.training_speed:,.0f}"],
        ["evaluation", f"{results.evaluation['tokens']:,}", f"{results.evaluation['tokens_per_second']:,.0f}"],
    ]
    stages = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in results.stage_seconds.items())
    total = format_seconds(sum(results.stage_seconds.values()))
    return f"{markdown_table(['', 'tokens', 'tokens/s'], rows)}\n\nTime: {total} ({stages})."


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def draw_loss_curve(results: Results, path: Path) -> None:
    """Write a PNG of training and held-out loss over iterations, in place of an older one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    trained = [(it, r.loss) for it, r in sorted(results.history.iterations.items()) if r.loss is not None]
    held_out = [(it, r.loss) for it, r in sorted(results.history.validations.items())]
    figure = Figure(figsize=(7.5, 4.5), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*trained, strict=True), color="#9db4d6", linewidth=1.2, label="training")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color="#1f4e9c", linewidth=1.8, marker="o", markersize=4.5, label="held-out"
        )
    axes.axhline(results.unigram_loss, color="#8a8a8a", linewidth=1, linestyle="--", label="token frequencies alone")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.set_title("MaskMoE quickstart", loc="left", fontweight="bold")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)
    perplexity = axes.secondary_yaxis("right", functions=(np.exp, lambda y: np.log(np.maximum(y, 1e-9))))
    perplexity.set_yscale("log")
    perplexity.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    perplexity.yaxis.set_major_formatter(ScalarFormatter())
    perplexity.yaxis.set_minor_locator(NullLocator())
    perplexity.set_ylabel("perplexity")
    axes.legend(frameon=False)
    with atomic_output(path) as temporary:
        figure.savefig(temporary, format="png")
