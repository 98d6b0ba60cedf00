"""The report of a quickstart: tables, a plot of the losses, and the generated text."""

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe.cli import atomic_output
from maskmoe.comparison.markdown import render
from maskmoe.comparison.plots import new_figure, tidy
from maskmoe.comparison.quickstart import QuickstartPlan
from maskmoe.json_files import read_json
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.workflow.progress import format_seconds
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.training_log import TrainingHistory


@dataclass(frozen=True)
class QuickstartResults:
    """The content of a report.

    Attributes:
        history: losses during training.
        evaluation: content of the file that `maskmoe evaluate` has written.
        unigram_loss: entropy of the token frequencies in nats, which is the loss of a model that knows nothing else.
        training_speed: median tokens/s of training.
        trained_tokens: number of tokens in all iterations.
        stage_seconds: duration of each stage by name.
        sample: generated text, which begins with the prompt.
        settings: settings of the model and the mask, in words.
        paths: paths by description of the file or folder.
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


def write_report(plan: QuickstartPlan, record: RunRecord) -> str:
    """Write report.md and loss.png of a finished quickstart; return the report."""
    folder = plan.files.folder
    results = collect_results(plan, record, report=folder / "report.md", loss_curve=folder / "loss.png")
    draw_loss_curve(results, folder / "loss.png")
    report = render_report(results)
    with atomic_output(folder / "report.md") as path:
        path.write_text(report, encoding="utf-8")
    return report


def collect_results(plan: QuickstartPlan, record: RunRecord, report: Path, loss_curve: Path) -> QuickstartResults:
    """Read the results of a finished quickstart from its files.

    Args:
        plan: stages of the quickstart.
        record: record of the stages.
        report: path of the report to be written.
        loss_curve: path of the plot to be written.
    """
    settings, files = plan.settings, plan.files
    history = plan.history()
    tokens = {iteration: each.batch * settings.seq_length for iteration, each in history.iterations.items()}
    # The first iteration is slow, as it includes preparations.
    measured = [iteration for iteration in tokens if iteration > 1 or len(tokens) == 1]
    occurrences = TokenFrequency.load(plan.text_files.token_frequency).occurrences
    return QuickstartResults(
        history=history,
        evaluation=read_json(files.evaluation),
        unigram_loss=entropy(occurrences),
        training_speed=statistics.median(tokens[each] / history.iterations[each].seconds for each in measured),
        trained_tokens=settings.train_iters * max(tokens.values()),
        stage_seconds={(stage := make_stage().name): record[stage].seconds for make_stage in plan.stages},
        sample=files.sample.read_text(encoding="utf-8").rstrip("\n"),
        settings=(
            f"{settings.num_layers} layers, width {settings.hidden_size}, {settings.num_experts} experts in each, "
            f"{settings.vocab_size:,} token ids; the ids that make up {settings.frequent_mass:.0%} of the text see "
            f"{settings.frequent_visible_experts} experts, all other ids see one ({settings.assignment}); "
            f"{plan.devices.num_processes} processes, "
            f"expert parallel {plan.devices.expert_model_parallel_size(settings.num_experts)}"
        ),
        paths={
            "checkpoint": files.checkpoints,
            "model for transformers": files.model,
            "routing mask": files.routing_mask,
            "loss curve": loss_curve,
            "this report": report,
            "commands": files.commands,
            "logs": files.logs,
            "TensorBoard": files.tensorboard,
        },
    )


def entropy(occurrences: np.ndarray) -> float:
    """Return the entropy in nats of the distribution that counts, `[vocab]`, describe."""
    shares = occurrences[occurrences > 0] / occurrences.sum()
    return float(-(shares * np.log(shares)).sum())


def render_report(results: QuickstartResults) -> str:
    """Return the report in Markdown, aligned so that it also reads well on a terminal."""
    evaluation = results.evaluation
    fence = "```"
    while fence in results.sample:
        fence += "`"
    return render(
        "quickstart.md.j2",
        settings=results.settings,
        bands=_band_rows(evaluation),
        unigram_perplexity=f"{math.exp(results.unigram_loss):,.1f}",
        loads=_load_rows(evaluation["expert_load"]),
        speeds=[
            ["training", f"{results.trained_tokens:,}", f"{results.training_speed:,.0f}"],
            ["evaluation", f"{evaluation['tokens']:,}", f"{evaluation['tokens_per_second']:,.0f}"],
        ],
        total=format_seconds(sum(results.stage_seconds.values())),
        stages=[f"{name} {format_seconds(seconds)}" for name, seconds in results.stage_seconds.items()],
        fence=fence,
        sample=results.sample,
        paths={what: os.fspath(path) for what, path in results.paths.items()},
    )


def _band_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    overall: dict[str, Any] = {key: evaluation[key] for key in ("tokens", "loss", "perplexity")}
    overall |= {"name": "all", "share": 1.0}
    return [
        [
            band["name"],
            f"{band['share']:.1%}",
            f"{band['tokens']:,}",
            _number(band["loss"], ".3f"),
            _number(band["perplexity"], ",.1f"),
        ]
        for band in (*evaluation["bands"], overall)
    ]


def _load_rows(expert_load: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for load in expert_load:
        tokens = load["tokens_per_expert"]
        shares = " ".join(f"{100 * count / max(1, sum(tokens)):.0f}" for count in tokens)
        rows.append([str(load["layer"]), f"{load['max_over_mean']:.2f}", shares])
    return rows


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def draw_loss_curve(results: QuickstartResults, path: Path) -> None:
    """Write a PNG with training and held-out loss over iterations; the PNG replaces an older file."""
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    trained = [(it, r.loss) for it, r in sorted(results.history.iterations.items()) if r.loss is not None]
    held_out = [(it, r.loss) for it, r in sorted(results.history.validations.items())]
    figure = new_figure(9.2, 5.5)
    axes = figure.add_subplot()
    axes.plot(*zip(*trained, strict=True), color="#9db4d6", linewidth=1.2, label="training")
    if held_out:
        style = {"color": "#1f4e9c", "linewidth": 1.8, "marker": "o", "markersize": 4.5}
        axes.plot(*zip(*held_out, strict=True), label="held-out", **style)
    axes.axhline(results.unigram_loss, color="#8a8a8a", linewidth=1, linestyle="--", label="token frequencies alone")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.set_title("MaskMoE quickstart", loc="left", fontweight="bold")
    tidy(axes)
    # A second axis on the right shows the perplexity, which is the exponential of the loss.
    perplexity = axes.secondary_yaxis("right", functions=(np.exp, lambda y: np.log(np.maximum(y, 1e-9))))
    perplexity.set_yscale("log")
    perplexity.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    perplexity.yaxis.set_major_formatter(ScalarFormatter())
    perplexity.yaxis.set_minor_locator(NullLocator())
    perplexity.set_ylabel("perplexity")
    axes.legend(frameon=False)
    with atomic_output(path) as temporary:
        figure.savefig(temporary, format="png")
