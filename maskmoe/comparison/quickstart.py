"""The quickstart: a suite of one variant, trained on this machine, then exported, and a sample of its text."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo

from maskmoe.comparison.data import Dataset
from maskmoe.comparison.plan import RunPlan
from maskmoe.comparison.runs import Run
from maskmoe.comparison.suite import Suite
from maskmoe.launch.command import standalone_command
from maskmoe.launch.devices import Devices
from maskmoe.launch.model_file import Flags, flag_words, override
from maskmoe.workflow.files import StageFiles
from maskmoe.workflow.split import choose_split, opening_of_held_out_text
from maskmoe.workflow.stage import Stage, StageMaker, maskmoe_command

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
    json_key: str
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

    def suite(self, devices: Devices) -> Suite:
        """Return the suite with these settings, for a training on all devices of this machine."""
        suite = quickstart_suite()
        (variant,) = suite.variants.values()
        # Every rank processes one micro-batch, so the global batch is rounded up to a multiple of the ranks.
        micro_batch_size = -(-self.global_batch_size // devices.num_processes)
        expert_parallel = {"expert_model_parallel_size": devices.expert_model_parallel_size(self.num_experts)}
        flags = {
            **self.model_dump(include={"num_layers", "hidden_size", "num_experts", "seq_length", "train_iters"}),
            **expert_parallel,
            "num_attention_heads": self.hidden_size // _HEAD_SIZE,
            "init_method_std": f"{0.6 / math.sqrt(self.hidden_size):.3g}",
            "moe_ffn_hidden_size": 2 * self.hidden_size,
            "max_position_embeddings": self.seq_length,
            "micro_batch_size": micro_batch_size,
            "global_batch_size": micro_batch_size * devices.num_processes,
            "eval_interval": max(1, self.train_iters // _EVALUATIONS),
            "log_interval": max(1, self.train_iters // _LOG_LINES),
        }
        mask = self.model_dump(include={"frequent_mass", "frequent_visible_experts", "assignment"}) | expert_parallel
        update = {
            "flags": override(variant.flags, _flags(flags)),
            "mask": override(variant.mask or {}, _flags(mask)),
            "seeds": (self.seed,),
        }
        variants = {variant.name: variant.model_copy(update=update)}
        learning_rates = suite.learning_rates.model_copy(update={"values": (str(self.lr),)})
        return suite.model_copy(update={"variants": variants, "learning_rates": learning_rates})


def _flags(settings: Mapping[str, object]) -> Flags:
    return {name.replace("_", "-"): (str(value),) for name, value in settings.items()}


class QuickstartPlan(RunPlan):
    """The stages of a quickstart, all in one folder.

    Args:
        settings: settings of the quickstart.
        devices: devices of this machine, all of which are used.
    """

    def __init__(self, settings: Settings, devices: Devices) -> None:
        suite = settings.suite(devices)
        (variant,) = suite.variants.values()
        self.settings = settings
        files = StageFiles(settings.run_dir, settings.json_key)
        data = Dataset(files, str(settings.vocab_size), None, settings.input, settings.seq_length)
        run = Run(variant, settings.seed, suite.learning_rates.values[0], "whole")
        super().__init__(suite, run, data, settings.run_dir, devices, devices.num_processes)

    @property
    def stages(self) -> tuple[StageMaker, ...]:
        """Makers of all stages, in order."""
        return (*self._data.stages, self.mask, self.train, self.evaluate, self.export, self.sample)

    def train(self) -> Stage:
        """Train the model on all devices of this machine, or resume its training."""
        files = self.files
        folders = {"save": files.checkpoints, "load": files.checkpoints, "tensorboard_dir": files.tensorboard}
        flags = {**self.flags, **_flags(folders), "keep-last-checkpoints": ("1",)}
        words = (*flag_words(flags), *self.devices.megatron_flags)
        command = standalone_command(self.devices.num_processes, "maskmoe.training.pretrain", words)
        environment = self.devices.environment
        return replace(super().train(), command=command, inputs=self.training_inputs, environment=environment)

    def export(self) -> Stage:
        """Export the trained model, with its tokenizer, to the format of transformers."""
        folders = ("--load", self.files.checkpoints, "--save", self.files.model)
        command = maskmoe_command("convert", "megatron-to-hf", *folders)
        inputs = (self.last_checkpoint, self.files.tokenizer_model)
        return Stage("export", command, inputs, outputs=(self.files.model,))

    def sample(self) -> Stage:
        """Let the exported model continue the prompt."""
        model, sample = self.files.model, self.files.sample
        words = (
            *("--model", model),
            f"--prompt={self._prompt}",  # one word, so that the prompt may begin with a dash
            *("--max-new-tokens", min(_SAMPLE_TOKENS, self.settings.seq_length - _PROMPT_TOKENS)),
            *("--seed", self.settings.seed, "--output", sample),
        )
        return Stage("sample", maskmoe_command("sample", *words), inputs=(model,), outputs=(sample,))

    @property
    def _prompt(self) -> str:
        """The user's prompt, or the start of a held-out text, or the start of a function for the text of Python."""
        if self.settings.prompt is not None:
            return self.settings.prompt
        if not self.settings.input:
            return _PROMPT_FOR_PYTHON
        files = self._data.files
        split = choose_split(files.dataset_prefix, self.settings.seq_length)
        return opening_of_held_out_text(files.dataset_prefix, files.tokenizer_model, split, _PROMPT_TOKENS)
