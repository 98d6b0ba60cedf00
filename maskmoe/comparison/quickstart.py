"""The quickstart: a suite of one variant, trained on this machine, then exported, with a sample and a report."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskmoe.arguments.flags import flag_words, override
from maskmoe.comparison.data import Dataset
from maskmoe.comparison.report import markdown_table, new_figure, tidy
from maskmoe.comparison.run import OWN_TEXT, Run
from maskmoe.comparison.stage import Stage, maskmoe_command
from maskmoe.comparison.suite import Suite, Variant
from maskmoe.comparison.table import scalars, training_seconds
from maskmoe.data.documents import read_documents
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_json
from maskmoe.files.outputs import atomic_output, render_template, write_text
from maskmoe.launch.command import entry_point, standalone_command
from maskmoe.launch.machine import Devices
from maskmoe.launch.model_file import Flags
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.frequency import TokenFrequency

_SUITE = Path(__file__).parent / "suites" / "quickstart.yaml"
_HEAD_SIZE = 32
_PROMPT_FOR_PYTHON = 'def read_lines(path):\n    """'
_PROMPT_CHARACTERS = 64
_SAMPLE_TOKENS = 96
_CHECKPOINTS = 20
_EVALUATIONS = 10
_LOG_LINES = 200
_MIN_LR_RATIO = 0.05


def quickstart_suite() -> Suite:
    """Return the suite with the default settings of the quickstart."""
    return Suite.read(_SUITE, {})


@dataclass(frozen=True)
class Settings:
    """The settings of a quickstart, see `maskmoe quickstart --help`.

    Raises:
        UserError: Two settings do not fit together.
    """

    input: tuple[Path, ...]
    json_keys: str
    run_dir: Path
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_experts: int
    frequent_mass: float
    frequent_visible_experts: int
    assignment: str
    seq_length: int
    global_batch_size: int
    train_iters: int
    lr: float
    seed: int
    prompt: str | None

    def __post_init__(self) -> None:
        if self.prompt == "":
            raise UserError("--prompt is empty: a sample needs at least one character")
        if self.hidden_size % _HEAD_SIZE:
            raise UserError(f"--hidden-size must be a multiple of {_HEAD_SIZE}, not {self.hidden_size}")
        visible = self.frequent_visible_experts
        if not 2 <= visible <= self.num_experts:
            raise UserError(
                f"--frequent-visible-experts must be between 2 and --num-experts {self.num_experts}, not {visible}"
            )

    def variant(self, devices: Devices) -> Variant:
        """Return the variant of the suite with these settings, for a training on all devices of this machine."""
        (variant,) = quickstart_suite().variants.values()
        # Every rank processes one micro-batch, so the global batch is rounded up to a multiple of the ranks.
        micro_batch_size = -(-self.global_batch_size // devices.num_processes)
        expert_parallel = {"expert_model_parallel_size": math.gcd(devices.num_processes, self.num_experts)}
        flags = {
            "hybrid_layer_pattern": FeedForwardLayers((True,) * self.num_layers).pattern("*"),
            **self._values("hidden_size", "num_experts", "seq_length", "train_iters", "lr"),
            **expert_parallel,
            "min_lr": f"{_MIN_LR_RATIO * self.lr:.6g}",
            "num_attention_heads": self.hidden_size // _HEAD_SIZE,
            "init_method_std": f"{0.6 / math.sqrt(self.hidden_size):.3g}",
            "moe_ffn_hidden_size": 2 * self.hidden_size,
            "max_position_embeddings": self.seq_length,
            "micro_batch_size": micro_batch_size,
            "global_batch_size": micro_batch_size * devices.num_processes,
            "eval_interval": max(1, self.train_iters // _EVALUATIONS),
            "log_interval": max(1, self.train_iters // _LOG_LINES),
            "save_interval": max(1, self.train_iters // _CHECKPOINTS),
        }
        mask = self._values("frequent_mass", "frequent_visible_experts", "assignment") | expert_parallel
        assert variant.mask != "none"
        update = {"flags": override(variant.flags, _flags(flags)), "mask": override(variant.mask, _flags(mask))}
        return variant.model_copy(update=update)

    def _values(self, *names: str) -> dict[str, object]:
        return {name: getattr(self, name) for name in names}


def _flags(settings: Mapping[str, object]) -> Flags:
    return {name.replace("_", "-"): (str(value),) for name, value in settings.items()}


class Quickstart:
    """The stages of a quickstart, all in one folder.

    Args:
        settings: Settings of the quickstart.
        devices: Devices of this machine, all of which are used.
    """

    def __init__(self, settings: Settings, devices: Devices) -> None:
        self.settings = settings
        self.devices = devices
        folder, size = settings.run_dir.absolute(), str(settings.vocab_size)
        # A link keeps its name, whose suffix is the format; only its folder is resolved.
        text = tuple(Path(os.path.realpath(path.parent), path.name) for path in settings.input)
        self.data = Dataset(folder, size, settings.seq_length, text, settings.json_keys)
        self.run = Run("maskmoe", settings.variant(devices), settings.seed, folder, self.data, devices)
        self.model = folder / "model"
        self.sample = folder / "sample.txt"
        self.report, self.loss_curve = folder / "report.md", folder / "loss.png"

    def model_stages(self) -> tuple[Stage, ...]:
        """Return the stages after those of the data. The dataset must exist."""
        evaluation = self.run.evaluation_stage(OWN_TEXT, self.devices.num_processes)
        return (
            *self.run.stages_before_training(),
            self.training_stage(),
            evaluation,
            self.export_stage(),
            self.sample_stage(),
        )

    def training_stage(self) -> Stage:
        """Train the model on all devices of this machine, or resume its training."""
        run = self.run
        folders = {"save": run.checkpoints, "load": run.checkpoints, "tensorboard_dir": run.tensorboard}
        words = (*flag_words({**run.flags(), **_flags(folders)}), *self.devices.megatron_flags)
        command = standalone_command(self.devices.num_processes, entry_point("pretrain"), words)
        inputs = (run.routing_mask, *self.data.files)
        return replace(run.training_stage(), command=command, inputs=inputs, environment=self.devices.environment)

    def export_stage(self) -> Stage:
        """Export the trained model, with its tokenizer, to the format of transformers."""
        command = maskmoe_command("convert", "megatron-to-hf", "--load", self.run.checkpoints, "--save", self.model)
        return Stage("export", command, (self.model,), (self.run.last_checkpoint, self.data.tokenizer_model))

    def sample_stage(self) -> Stage:
        """Let the exported model continue the prompt."""
        words = (
            *("--load", self.model),
            f"--prompt={self._prompt()}",  # one word, so that the prompt may begin with a dash
            *("--max-new-tokens", min(_SAMPLE_TOKENS, self.settings.seq_length // 2)),
            *("--seed", self.settings.seed, "--output", self.sample),
        )
        return Stage("sample", maskmoe_command("generate", *words), (self.sample,), (self.model,))

    def _prompt(self) -> str:
        """Return the user's prompt, or the start of the user's text, or of a function if the text is Python's."""
        if self.settings.prompt is not None:
            return self.settings.prompt
        if not self.settings.input:
            return _PROMPT_FOR_PYTHON
        # A prompt needs more than white space, and a word of a command line cannot have a null character.
        documents = read_documents(self.settings.input, self.settings.json_keys)
        first = next(filter(None, (document.replace("\0", "").lstrip() for document in documents)))
        # A character is at most four tokens, so the prompt has at most half of the tokens of a sample.
        return first[: min(_PROMPT_CHARACTERS, self.settings.seq_length // 8)]


def write_report(quickstart: Quickstart, seconds: Mapping[str, float]) -> str:
    """Write report.md and loss.png of a finished quickstart; return the report.

    Args:
        quickstart: The quickstart.
        seconds: Durations of the stages by name.
    """
    from scipy.stats import entropy

    settings, run, data = quickstart.settings, quickstart.run, quickstart.data
    # The loss of a model that knows nothing but the token frequencies is their entropy.
    unigram_loss = float(entropy(TokenFrequency.load(data.token_frequency).occurrences))
    draw_loss_curve(run.tensorboard, unigram_loss, quickstart.loss_curve)
    sample = quickstart.sample.read_text(encoding="utf-8").rstrip("\n")
    fence = "```"
    while fence in sample:
        fence += "`"
    seconds_of_training = training_seconds(run.tensorboard)
    values = {
        "settings": settings,
        "processes": quickstart.devices.num_processes,
        "expert_parallel": quickstart.run.variant.flags["expert-model-parallel-size"][0],
        "evaluation": read_json(run.evaluation(OWN_TEXT)),
        "number": _number,
        "unigram_perplexity": math.exp(unigram_loss),
        "trained_tokens": run.tokens,
        "speed": run.tokens / seconds_of_training if seconds_of_training else math.nan,
        "total": tqdm.format_interval(sum(seconds.values())),
        "stages": [f"{stage} {tqdm.format_interval(of_stage)}" for stage, of_stage in seconds.items()],
        "fence": fence,
        "sample": sample,
        "run": run,
        "model": quickstart.model,
    }
    report = render_template("maskmoe.comparison", "quickstart.md.j2", values, {"table": markdown_table})
    write_text(quickstart.report, report)
    return report


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def draw_loss_curve(tensorboard: Path, unigram_loss: float, path: Path) -> None:
    """Write a PNG with training and held-out loss over iterations; the PNG replaces an older file.

    Args:
        tensorboard: Folder of TensorBoard's event files.
        unigram_loss: Loss in nats of a model that knows only the token frequencies.
        path: The PNG.
    """
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
    axes.legend(frameon=False)
    with atomic_output(path) as temporary:
        figure.savefig(temporary, format="png")
