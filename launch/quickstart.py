"""The parts of launch/quickstart.sh that are not commands of maskmoe: the split, the prompt and the report."""

import math
import sys
from pathlib import Path

import numpy as np
from scipy.special import entr

from maskmoe.comparison.data import choose_split
from maskmoe.comparison.report import markdown_table, new_figure, tidy
from maskmoe.comparison.table import scalars, training_seconds
from maskmoe.data.documents import read_documents
from maskmoe.files.json_files import read_json
from maskmoe.files.outputs import atomic_output, write_text
from maskmoe.processes.run_tool import run_tool
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask

SEQ_LENGTH, BATCH = 256, 8  # of launch/models/laptop.yaml
PROMPT_CHARACTERS = 32
PROMPT_FOR_PYTHON = 'def read_lines(path):\n    """'


def choose_prompt(paths: list[str]) -> str:
    """Return the start of the first document that has more than white space; a function's start for Python's text."""
    if Path(paths[0]).name == "corpus.jsonl":
        return PROMPT_FOR_PYTHON
    documents = (document.replace("\0", "").lstrip() for document in read_documents(paths))
    return next(filter(None, documents))[:PROMPT_CHARACTERS]


def write_report(run: Path, processes: int) -> str:
    """Write report.md and loss.png of a run that was trained by a number of processes; return the report."""
    frequency = TokenFrequency.load(run / "token_frequency.safetensors")
    # The loss of a model that knows nothing but the token frequencies is their entropy.
    unigram_loss = float(entr(frequency.occurrences / frequency.occurrences.sum()).sum())
    draw_loss_curve(run, unigram_loss)
    report = "\n\n".join(sections(run, processes, frequency.vocab_size, unigram_loss)) + "\n"
    write_text(run / "report.md", report)
    return report


def sections(run: Path, processes: int, vocab_size: int, unigram_loss: float) -> list[str]:
    """Return the paragraphs of the report."""
    model, evaluation = read_json(run / "model" / "config.json"), read_json(run / "evaluation-held-out.json")
    mask = RoutingMask.load(run / "routing_mask.safetensors").provenance
    bands = [*evaluation["bands"], {**evaluation, "name": "all", "share": 1.0}]
    losses = [
        (
            *(band["name"], f"{band['share']:.1%}", f"{band['tokens']:,}"),
            *(_number(band["loss"], ".3f"), _number(band["perplexity"], ",.1f")),
        )
        for band in bands
    ]
    loads = []
    for load in evaluation["expert_load"]:
        counts = np.array(load["tokens_per_expert"])
        shares = " ".join(f"{share:.0f}" for share in 100 * counts / max(1, counts.sum()))
        loads.append((str(load["layer"]), f"{load['max_over_mean']:.2f}", shares))
    iterations, seconds = scalars(run / "tensorboard", "lm loss")[-1][0], training_seconds(run / "tensorboard")
    tokens = iterations * BATCH * SEQ_LENGTH
    speeds = [
        ("training", f"{tokens:,}", _number(tokens / seconds if seconds else None, ",.0f")),
        ("evaluation", f"{evaluation['tokens']:,}", f"{evaluation['tokens_per_second']:,.0f}"),
    ]
    times = [line.split() for line in (run / "seconds.txt").read_text(encoding="utf-8").splitlines()]
    sample = (run / "sample.txt").read_text(encoding="utf-8").rstrip("\n")
    fence = "```"
    while fence in sample:
        fence += "`"
    return [
        "# MaskMoE quickstart",
        f"{model['num_hidden_layers']} layers, width {model['hidden_size']}, {model['num_experts']} experts in each, "
        f"{vocab_size:,} token ids; the ids that make up {mask.frequent_mass:.0%} of the text see "
        f"{mask.frequent_visible_experts} experts, all other ids see one ({mask.assignment}); trained by "
        f"{processes} {'process' if processes == 1 else 'processes'}.",
        "## Perplexity on held-out text, by frequency of the input token",
        markdown_table(("input tokens", "share", "tokens", "loss", "perplexity"), losses),
        f"Perplexity of knowing token frequencies only: {math.exp(unigram_loss):,.1f}. After so few tokens a model "
        "knows frequencies and common neighbours of words; nonsense in the sample is to be expected.",
        "## Load of the experts on held-out text",
        markdown_table(("layer", "max/mean", "% of the tokens, by expert"), loads),
        "## Speed",
        markdown_table(("", "tokens", "tokens/s"), speeds),
        f"Seconds: {', '.join(f'{name} {seconds}' for name, seconds in times)}.",
        "## Sample",
        f"{fence}text\n{sample}\n{fence}",
        "## Files and next steps",
        f"- loss curve: {run / 'loss.png'}; all curves: `tensorboard --logdir {run / 'tensorboard'}`\n"
        f"- checkpoint: {run / 'checkpoints'}; routing mask: {run / 'routing_mask.safetensors'}\n"
        f"- model for transformers: {run / 'model'}; `maskmoe generate --load {run / 'model'} --prompt TEXT`\n"
        "- train longer: `launch/quickstart.sh --train-iters 8000 --run-dir ANOTHER`; other methods: docs/comparing.md",
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def draw_loss_curve(run: Path, unigram_loss: float) -> None:
    """Write loss.png: training and held-out loss over iterations, and the loss of knowing token frequencies only."""
    figure = new_figure(9.2, 5.5)
    axes = figure.add_subplot()
    training, held_out = (scalars(run / "tensorboard", f"lm loss{part}") for part in ("", " validation"))
    axes.plot(*np.array(training).T, color="#9db4d6", linewidth=1.2, label="training")
    if held_out:
        style = {"color": "#1f4e9c", "linewidth": 1.8, "marker": "o", "markersize": 4.5}
        axes.plot(*np.array(held_out).T, label="held-out", **style)
    axes.axhline(unigram_loss, color="#8a8a8a", linewidth=1, linestyle="--", label="token frequencies alone")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", xlim=(0, None))
    axes.set_title("MaskMoE quickstart", loc="left", fontweight="bold")
    tidy(axes)
    axes.legend(frameon=False)
    with atomic_output(run / "loss.png") as temporary:
        figure.savefig(temporary, format="png")


def main() -> None:
    """Do the part that the first argument names: `split RUN`, `prompt FILE…` or `report RUN PROCESSES`."""
    part, *paths = sys.argv[1:]
    if part == "split":
        print(choose_split(Path(paths[0], "dataset_text_document"), SEQ_LENGTH))
    elif part == "prompt":
        print(choose_prompt(paths))
    else:
        print(write_report(Path(paths[0]), int(paths[1])))


if __name__ == "__main__":
    run_tool(main)
