"""The quickstart: a suite of one variant, trained on this machine, then exported, and a sample of its text."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from maskmoe.comparison.data import TextData
from maskmoe.comparison.plan import RunPlan
from maskmoe.comparison.runs import Run
from maskmoe.comparison.suite import Suite
from maskmoe.launch.command import standalone_command
from maskmoe.launch.devices import Devices
from maskmoe.launch.model_file import Flags, flag_words, override
from maskmoe.workflow import stages
from maskmoe.workflow.files import TextFiles
from maskmoe.workflow.split import choose_split, opening_of_held_out_text
from maskmoe.workflow.stage import Stage, StageMaker

_SUITE = Path(__file__).parent / "suites" / "quickstart.yaml"
_HEAD_SIZE = 32
_PROMPT_FOR_PYTHON = 'def read_lines(path):\n    """'
_PROMPT_TOKENS = 16
_SAMPLE_TOKENS = 96
_EVALUATIONS = 10
_LOG_LINES = 200


def quickstart_suite() -> Suite:
    """Return the suite with the default settings of the quickstart."""
    return Suite.read(_SUITE, {})


class Settings(BaseModel):
    """The settings of a quickstart, see `maskmoe quickstart --help`. Wrong values raise a ValidationError."""

    model_config = ConfigDict(frozen=True)

    input: tuple[Path, ...]
    run_dir: Path
    json_key: str
    vocab_size: int
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=_HEAD_SIZE, multiple_of=_HEAD_SIZE)
    num_experts: int = Field(ge=2)
    frequent_mass: float = Field(ge=0, le=1)
    frequent_visible_experts: int
    assignment: str
    seq_length: int = Field(ge=32)
    global_batch_size: int = Field(ge=1)
    train_iters: int = Field(ge=1)
    lr: float = Field(gt=0)
    seed: int
    prompt: str | None

    @field_validator("input")
    @classmethod
    def _check_input(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
        return tuple(path.absolute() for path in paths)

    @field_validator("run_dir")
    @classmethod
    def _check_run_dir(cls, path: Path) -> Path:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file, not a folder")
        return path.absolute()

    @field_validator("frequent_visible_experts")
    @classmethod
    def _check_visible_experts(cls, number: int, info: ValidationInfo) -> int:
        num_experts = info.data.get("num_experts", number)
        if not 2 <= number <= num_experts:
            raise ValueError(f"must be between 2 and --num-experts {num_experts}, not {number}")
        return number

    def suite(self, devices: Devices) -> Suite:
        """Return the suite with these settings, for a training on all devices of this machine."""
        suite = quickstart_suite()
        (variant,) = suite.variants
        # Every rank processes one micro-batch, so the global batch is rounded up to a multiple of the ranks.
        micro_batch_size = -(-self.global_batch_size // devices.num_processes)
        expert_model_parallel_size = devices.expert_model_parallel_size(self.num_experts)
        flags = {
            "num-layers": self.num_layers,
            "hidden-size": self.hidden_size,
            "num-attention-heads": self.hidden_size // _HEAD_SIZE,
            "init-method-std": f"{0.6 / math.sqrt(self.hidden_size):.3g}",
            "num-experts": self.num_experts,
            "moe-ffn-hidden-size": 2 * self.hidden_size,
            "expert-model-parallel-size": expert_model_parallel_size,
            "seq-length": self.seq_length,
            "max-position-embeddings": self.seq_length,
            "micro-batch-size": micro_batch_size,
            "global-batch-size": micro_batch_size * devices.num_processes,
            "train-iters": self.train_iters,
            "eval-interval": max(1, self.train_iters // _EVALUATIONS),
            "log-interval": max(1, self.train_iters // _LOG_LINES),
        }
        mask = {
            "frequent-mass": self.frequent_mass,
            "frequent-visible-experts": self.frequent_visible_experts,
            "assignment": self.assignment,
            "expert-model-parallel-size": expert_model_parallel_size,
        }
        variant = replace(
            variant,
            flags=override(variant.flags, _words(flags)),
            mask=override(variant.mask or {}, _words(mask)),
            seeds=(self.seed,),
        )
        return replace(suite, variants=(variant,), learning_rates=(str(self.lr),))


def _words(values: Mapping[str, object]) -> Flags:
    return {name: (str(value),) for name, value in values.items()}


class QuickstartPlan(RunPlan):
    """The stages of a quickstart, all in one folder.

    Args:
        settings: settings of the quickstart.
        devices: devices of this machine, all of which are used.
    """

    def __init__(self, settings: Settings, devices: Devices) -> None:
        suite = settings.suite(devices)
        (variant,) = suite.variants
        files = TextFiles(settings.run_dir, settings.json_key)
        text = stages.TextStages(files, settings.input, settings.vocab_size)
        data = TextData(files, text, settings.seq_length)
        run = Run(variant, settings.seed, suite.learning_rates[0], "whole")
        super().__init__(suite, run, data, settings.run_dir, devices, devices.num_processes)
        self.settings = settings
        self.devices = devices
        self.text_files = files

    @property
    def stages(self) -> tuple[StageMaker, ...]:
        """Makers of all stages, in order."""
        return (*self._data.stages, self.mask, self.train, self.evaluate, self.export, self.sample)

    def train(self) -> Stage:
        """Train the model on all devices of this machine."""
        files = self.files
        folders = {"save": files.checkpoints, "load": files.checkpoints, "tensorboard-dir": files.tensorboard}
        flags = {**self.flags, **_words(folders), "keep-last-checkpoints": ("1",)}
        arguments = (*flag_words(flags), *self.devices.megatron_flags)
        return stages.train(
            files,
            standalone_command(self.devices.num_processes, "maskmoe.training.pretrain", arguments),
            inputs=self.training_inputs,
            last_checkpoint=self.last_checkpoint,
            devices=self.devices,
        )

    def export(self) -> Stage:
        """Export the trained model to transformers."""
        return stages.export(self.files, self.last_checkpoint, self.text_files.tokenizer_model)

    def sample(self) -> Stage:
        """Let the exported model continue the prompt."""
        num_tokens = min(_SAMPLE_TOKENS, self.settings.seq_length - _PROMPT_TOKENS)
        return stages.sample(self.files, self._prompt, num_tokens, self.settings.seed)

    @property
    def _prompt(self) -> str:
        """The user's prompt, or the start of a held-out text, or the start of a function for the text of Python."""
        if self.settings.prompt is not None:
            return self.settings.prompt
        if not self.settings.input:
            return _PROMPT_FOR_PYTHON
        files = self.text_files
        split = choose_split(files.dataset_prefix, self.settings.seq_length)
        return opening_of_held_out_text(files.dataset_prefix, files.tokenizer_model, split, _PROMPT_TOKENS)
