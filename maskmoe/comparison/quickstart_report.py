"""The report of a quickstart: tables, a plot of the losses, and the generated text."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskmoe.comparison.figures import new_figure, tidy
from maskmoe.comparison.markdown import markdown_table
from maskmoe.comparison.quickstart import Quickstart
from maskmoe.comparison.run import OWN_TEXT
from maskmoe.comparison.table import scalars, training_seconds
from maskmoe.files.json_files import read_json
from maskmoe.files.outputs import atomic_output, render_template
from maskmoe.routing_mask.frequency import TokenFrequency


def write_report(quickstart: Quickstart, seconds: Mapping[str, float]) -> str:
    """Write report.md and loss.png of a finished quickstart; return the report.

    Args:
        quickstart: the quickstart.
        seconds: durations of the stages by name.
    """
    from scipy.stats import entropy

    settings, run, data = quickstart.settings, quickstart.run, quickstart.data
    # The loss of a model that knows nothing but the token frequencies is their entropy.
    unigram_loss = float(entropy(TokenFrequency.load(data.token_frequency).occurrences))
    draw_loss_curve(run.tensorboard, unigram_loss, run.folder / "loss.png")
    sample = quickstart.sample.read_text(encoding="utf-8").rstrip("\n")
    fence = "```"
    while fence in sample:
        fence += "`"
    values = {
        "settings": settings,
        "processes": quickstart.devices.num_processes,
        "expert_parallel": quickstart.devices.expert_model_parallel_size(settings.num_experts),
        "evaluation": read_json(run.evaluation(OWN_TEXT)),
        "number": _number,
        "unigram_perplexity": math.exp(unigram_loss),
        "trained_tokens": run.tokens,
        "speed": run.tokens / training_seconds(run.tensorboard),
        "total": tqdm.format_interval(sum(seconds.values())),
        "stages": [f"{stage} {tqdm.format_interval(of_stage)}" for stage, of_stage in seconds.items()],
        "fence": fence,
        "sample": sample,
        "run": run,
        "model": quickstart.model,
    }
    report = render_template("maskmoe.comparison", "quickstart.md.j2", values, {"table": markdown_table})
    with atomic_output(run.folder / "report.md") as path:
        path.write_text(report, encoding="utf-8")
    return report


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def draw_loss_curve(tensorboard: Path, unigram_loss: float, path: Path) -> None:
    """Write a PNG with training and held-out loss over iterations; the PNG replaces an older file.

    Args:
        tensorboard: folder of TensorBoard's event files.
        unigram_loss: loss in nats of a model that knows only the token frequencies.
        path: the PNG.
    """
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    figure = new_figure(9.2, 5.5)
    axes = figure.add_subplot()
    axes.plot(*np.array(scalars(tensorboard, "lm loss")).T, color="#9db4d6", linewidth=1.2, label="training")
    if held_out := scalars(tensorboard, "lm loss validation"):
        style = {"color": "#1f4e9c", "linewidth": 1.8, "marker": "o", "markersize": 4.5}
        axes.plot(*np.array(held_out).T, label="held-out", **style)
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
