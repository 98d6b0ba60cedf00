"""The quickstart: a suite of one variant, trained on this machine, then exported, and a sample of its text."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo

from maskmoe.comparison.data import Dataset
from maskmoe.comparison.held_out import choose_split, opening_of_held_out_text
from maskmoe.comparison.run import OWN_TEXT, Run
from maskmoe.comparison.stage import Stage, maskmoe_command
from maskmoe.comparison.suite import Suite, Variant
from maskmoe.launch.command import entry_point, standalone_command
from maskmoe.launch.devices import Devices
from maskmoe.launch.model_file import Flags, flag_words, override

_SUITE = Path(__file__).parent / "suites" / "quickstart.yaml"
_HEAD_SIZE = 32
_PROMPT_FOR_PYTHON = 'def read_lines(path):\n    """'
_PROMPT_TOKENS = 16
_SAMPLE_TOKENS = 96
_CHECKPOINTS = 20
_EVALUATIONS = 10
_LOG_LINES = 200
_MIN_LR_RATIO = 0.05


def quickstart_suite() -> Suite:
    """Return the suite with the default settings of the quickstart."""
    return Suite.read(_SUITE, {})


def _check_input(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
    return path.absolute()


def _check_run_dir(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, not a folder")
    return path.absolute()


def _check_visible_experts(number: int, info: ValidationInfo) -> int:
    num_experts = info.data.get("num_experts", number)
    if not 2 <= number <= num_experts:
        raise ValueError(f"must be between 2 and --num-experts {num_experts}, not {number}")
    return number


class Settings(BaseModel, frozen=True):
    """The settings of a quickstart, see `maskmoe quickstart --help`. Wrong values raise a ValidationError."""

    input: tuple[Annotated[Path, AfterValidator(_check_input)], ...]
    run_dir: Annotated[Path, AfterValidator(_check_run_dir)]
    json_keys: str
    vocab_size: int
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=_HEAD_SIZE, multiple_of=_HEAD_SIZE)
    num_experts: int = Field(ge=2)
    frequent_mass: float = Field(ge=0, le=1)
    frequent_visible_experts: Annotated[int, AfterValidator(_check_visible_experts)]
    assignment: str
    seq_length: int = Field(ge=32)
    global_batch_size: int = Field(ge=1)
    train_iters: int = Field(ge=1)
    lr: float = Field(gt=0)
    seed: int
    prompt: str | None

    def variant(self, devices: Devices) -> Variant:
        """Return the variant of the suite with these settings, for a training on all devices of this machine."""
        (variant,) = quickstart_suite().variants.values()
        # Every rank processes one micro-batch, so the global batch is rounded up to a multiple of the ranks.
        micro_batch_size = -(-self.global_batch_size // devices.num_processes)
        expert_parallel = {"expert_model_parallel_size": devices.expert_model_parallel_size(self.num_experts)}
        flags = {
            **self.model_dump(include={"num_layers", "hidden_size", "num_experts", "seq_length", "train_iters", "lr"}),
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
        mask = self.model_dump(include={"frequent_mass", "frequent_visible_experts", "assignment"}) | expert_parallel
        assert variant.mask != "none"
        update = {"flags": override(variant.flags, _flags(flags)), "mask": override(variant.mask, _flags(mask))}
        return variant.model_copy(update=update)


def _flags(settings: Mapping[str, object]) -> Flags:
    return {name.replace("_", "-"): (str(value),) for name, value in settings.items()}


class Quickstart:
    """The stages of a quickstart, all in one folder.

    Args:
        settings: settings of the quickstart.
        devices: devices of this machine, all of which are used.
    """

    def __init__(self, settings: Settings, devices: Devices) -> None:
        self.settings = settings
        self.devices = devices
        folder, size = settings.run_dir, str(settings.vocab_size)
        self.data = Dataset(folder, size, settings.seq_length, settings.input, settings.json_keys)
        self.run = Run("maskmoe", settings.variant(devices), settings.seed, folder, self.data, devices)
        self.model = folder / "model"
        self.sample = folder / "sample.txt"

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
            *("--model", self.model),
            f"--prompt={self._prompt()}",  # one word, so that the prompt may begin with a dash
            *("--max-new-tokens", min(_SAMPLE_TOKENS, self.settings.seq_length - _PROMPT_TOKENS)),
            *("--seed", self.settings.seed, "--output", self.sample),
        )
        return Stage("sample", maskmoe_command("sample", *words), (self.sample,), (self.model,))

    def _prompt(self) -> str:
        """Return the user's prompt, or the start of a held-out text, or of a function if the text is Python's."""
        if self.settings.prompt is not None:
            return self.settings.prompt
        if not self.settings.input:
            return _PROMPT_FOR_PYTHON
        split = choose_split(self.data.prefix, self.settings.seq_length)
        return opening_of_held_out_text(self.data.prefix, self.data.tokenizer_model, split, _PROMPT_TOKENS)
