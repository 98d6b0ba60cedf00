"""The report of a quickstart: tables, a plot of the losses, and the generated text."""

import math
import statistics
from pathlib import Path

import numpy as np

from maskmoe.comparison.markdown import render
from maskmoe.comparison.plots import new_figure, tidy
from maskmoe.comparison.quickstart import QuickstartPlan
from maskmoe.files.json_files import read_json
from maskmoe.files.outputs import atomic_output
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.workflow.progress import format_seconds
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.training_log import TrainingHistory


def write_report(plan: QuickstartPlan, record: RunRecord) -> str:
    """Write report.md and loss.png of a finished quickstart; return the report."""
    from scipy.stats import entropy

    settings, devices, files = plan.settings, plan.devices, plan.files
    history, evaluation = plan.history(), read_json(files.evaluation)
    # The loss of a model that knows nothing but the token frequencies is their entropy.
    unigram_loss = float(entropy(TokenFrequency.load(files.token_frequency).occurrences))
    draw_loss_curve(history, unigram_loss, files.folder / "loss.png")

    tokens = {number: iteration.batch * settings.seq_length for number, iteration in history.iterations.items()}
    # The first iteration is slow, as it includes preparations.
    measured = [number for number in tokens if number > 1 or len(tokens) == 1]
    speed = statistics.median(tokens[number] / history.iterations[number].seconds for number in measured)
    trained_tokens = settings.train_iters * max(tokens.values())
    seconds = {(stage := make_stage().name): record[stage].seconds for make_stage in plan.stages}
    sample = files.sample.read_text(encoding="utf-8").rstrip("\n")
    fence = "```"
    while fence in sample:
        fence += "`"
    report = render(
        "quickstart.md.j2",
        settings=settings,
        processes=devices.num_processes,
        expert_parallel=devices.expert_model_parallel_size(settings.num_experts),
        evaluation=evaluation,
        number=_number,
        unigram_perplexity=math.exp(unigram_loss),
        trained_tokens=trained_tokens,
        speed=speed,
        total=format_seconds(sum(seconds.values())),
        stages=[f"{stage} {format_seconds(seconds[stage])}" for stage in seconds],
        fence=fence,
        sample=sample,
        files=files,
    )
    with atomic_output(files.folder / "report.md") as path:
        path.write_text(report, encoding="utf-8")
    return report


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def draw_loss_curve(history: TrainingHistory, unigram_loss: float, path: Path) -> None:
    """Write a PNG with training and held-out loss over iterations; the PNG replaces an older file.

    Args:
        history: losses during training.
        unigram_loss: loss in nats of a model that knows only the token frequencies.
        path: the PNG.
    """
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    trained = [(it, r.loss) for it, r in sorted(history.iterations.items()) if r.loss is not None]
    held_out = [(it, r.loss) for it, r in sorted(history.validations.items())]
    figure = new_figure(9.2, 5.5)
    axes = figure.add_subplot()
    axes.plot(*zip(*trained, strict=True), color="#9db4d6", linewidth=1.2, label="training")
    if held_out:
        style = {"color": "#1f4e9c", "linewidth": 1.8, "marker": "o", "markersize": 4.5}
        axes.plot(*zip(*held_out, strict=True), label="held-out", **style)
    axes.axhline(unigram_loss, color="#8a8a8a", linewidth=1, linestyle="--", label="token frequencies alone")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", xlim=(0, None))
    axes.set_title("MaskMoE quickstart", loc="left", fontweight="bold")
    tidy(axes)
    # A second axis on the right shows the perplexity, which is the exponential of the loss.
    perplexity = axes.secondary_yaxis("right", functions=(np.exp, lambda y: np.log(np.maximum(y, 1e-9))))
    perplexity.set(ylabel="perplexity", yscale="log")
    perplexity.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    perplexity.yaxis.set_major_formatter(ScalarFormatter())
    perplexity.yaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False)
    with atomic_output(path) as temporary:
        figure.savefig(temporary, format="png")
