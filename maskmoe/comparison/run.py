"""The runs of a suite: one training each, and the steps that make its mask, train it and evaluate it."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskmoe.arguments.flags import flag_words, flags_to_yaml
from maskmoe.comparison.data import Dataset
from maskmoe.comparison.steps import Step, maskmoe_command
from maskmoe.comparison.suite import PROGRAM, Suite, Variant
from maskmoe.files.run_folder import CHECKPOINTS
from maskmoe.launch.machine import Devices
from maskmoe.launch.model_file import Flags
from maskmoe.launch.torchrun_command import entry_point, standalone_command
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers

OWN_TEXT = "held-out"
"""Name of the held-out documents of the training text, beside the further held-out texts of a suite."""

# These flags change what a model sees of its text. Checkpoints restore neither them nor the implementation.
_FLAGS_OF_EVALUATION = (
    *("dataloader-inter-document-masking", "reset-attention-mask", "reset-position-ids", "eod-mask-loss"),
    "transformer-impl",  # that of Transformer Engine has no masks of documents
)
# These flags change the speed of a run or the files that it keeps, and none of its results.
_FLAGS_WITHOUT_EFFECT = {"num-workers", "keep-last-checkpoints", "save-interval", "log-interval"}


@dataclass(frozen=True)
class Run:
    """One training of a variant in its own folder.

    Attributes:
        name: Name of the variant.
        variant: The variant.
        seed: Seed of the weights, of the order of the data, and of the mask.
        folder: Folder of the run.
        data: The dataset.
        devices: Devices of this machine.
    """

    name: str
    variant: Variant
    seed: int
    folder: Path
    data: Dataset
    devices: Devices

    @property
    def title(self) -> str:
        """Name of the run's folder, which tells the run from all others of the suite."""
        return f"{self.name}.seed-{self.seed}"

    @property
    def settings(self) -> dict[str, str]:
        """The flags that the result depends on: those of training, and those of the mask (`mask.…`)."""
        flags = {flag: words for flag, words in self.variant.flags.items() if flag not in _FLAGS_WITHOUT_EFFECT}
        flags |= {f"{ranks}.{flag}": words for ranks, of in self.variant.layouts.items() for flag, words in of.items()}
        flags |= {f"mask.{flag}": words for flag, words in self.variant.mask_flags.items()}
        programs = {"program": self.variant.program, f"mask.{PROGRAM}": self.variant.mask_program}
        flags |= {key: (Path(path).name,) for key, path in programs.items() if path}
        return {flag: " ".join(words) or "true" for flag, words in sorted(flags.items())}

    @property
    def equality_key(self) -> tuple[object, ...]:
        """What is the same for two runs that have the same result on the same text."""
        return (self.seed, self.variant.program_sha256, *self.settings.items())

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that all files of the run's folder depend on. The dataset must exist."""
        digests = {"text": self.data.digests(), "program": self.variant.program_sha256}
        return {"settings": self.settings, "seed": self.seed, **digests}

    @property
    def model_file(self) -> Path:
        """Model file of the run, which launch/pretrain.sh takes."""
        return self.folder / "run.yaml"

    @property
    def check_report(self) -> Path:
        """Report of `--check` as JSON."""
        return self.folder / "check.json"

    @property
    def routing_mask(self) -> Path:
        """Routing mask of the run."""
        return self.folder / "routing_mask.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def last_checkpoint(self) -> Path:
        """Folder of the checkpoint that completes the training, as Megatron names it."""
        return self.checkpoints / f"iter_{int(self.variant.flags['train-iters'][0]):07d}"

    def evaluation(self, text: str) -> Path:
        """Return the result of the evaluation on a held-out text."""
        return self.folder / f"evaluation-{text}.json"

    def files(self) -> dict[Path, str]:
        """Return the text of the model file, by its path. The dataset must exist."""
        end = self.variant.flags["train-iters"]
        mask = {"routing-mask": (str(self.routing_mask),)} if self.variant.has_experts else {}
        own = {"seed": (str(self.seed),), "data-cache-path": (str(self.folder / "dataset_cache"),)}
        program = {PROGRAM: (self.variant.program,)} if self.variant.program else {}
        saving = {"save-interval": end, "keep-last-checkpoints": ("1",)}
        flags = {**saving, **self.variant.flags, **self.data.flags, **own, **mask, **program}
        layouts = {ranks: _escape(flags) for ranks, flags in self.variant.layouts.items()}
        return {self.model_file: flags_to_yaml(_escape(flags), layouts)}

    def steps(self) -> tuple[Step, ...]:
        """Return all steps from the mask to the evaluations."""
        texts = (OWN_TEXT, *self.data.held_out)
        return (*self.mask_steps(), self.training_step(), *map(self.evaluation_step, texts))

    @property
    def mask_flags(self) -> Flags:
        """The flags of `maskmoe mask`, or of the program that makes the mask, without the output."""
        if pattern := self.variant.flags.get("hybrid-layer-pattern"):
            # A mask has a table for each feed-forward layer, with experts or without.
            num_layers = str(len(FeedForwardLayers.of_pattern(*pattern).has_experts))
        else:
            num_layers = self.variant.flags["num-layers"][0]
        return {
            "token-frequency": (str(self.data.token_frequency),),
            "num-experts": self.variant.flags["num-experts"],
            "num-layers": (num_layers,),
            "seed": (str(self.seed),),
            **self.variant.mask_flags,
        }

    def mask_steps(self) -> tuple[Step, ...]:
        """Return the step that builds the routing mask, if the model has experts."""
        if not self.variant.has_experts:
            return ()
        words = (*flag_words(self.mask_flags), "--output", str(self.routing_mask), "--force")
        program = self.variant.mask_program
        command = (sys.executable, "-P", program, *words) if program else maskmoe_command("mask", *words)
        return (Step("mask", command, self.routing_mask),)

    def check_step(self) -> Step:
        """Check the settings, and write the report into `check_report`."""
        backend = () if self.devices.num_gpus else ("--distributed-backend", "gloo")
        words = ("--check", "--run-dir", self.folder, self.model_file, "--json", self.check_report, "--force", *backend)
        return Step("check", maskmoe_command("pretrain", *words), self.check_report)

    def training_step(self) -> Step:
        """Train the model by `maskmoe pretrain`, or resume its training."""
        command = maskmoe_command("pretrain", "--run-dir", self.folder, self.model_file)
        return Step("train", command, self.last_checkpoint)

    def evaluation_step(self, text: str) -> Step:
        """Evaluate the trained model on a held-out text, with the frequency bands of the training text.

        Args:
            text: `OWN_TEXT` or the name of a further held-out text.
        """
        processes = self.devices.num_gpus or 1
        num_experts = int(self.variant.flags.get("num-experts", ("1",))[0])
        flags = {
            "load": (str(self.checkpoints),),
            "use-checkpoint-args": (),
            "expert-model-parallel-size": (str(math.gcd(processes, num_experts)),),
            **(self.data.flags if text == OWN_TEXT else self.data.held_out_flags(text)),
            "data-cache-path": (str(self.folder / "dataset_cache"),),
            "micro-batch-size": self.variant.flags.get("micro-batch-size", ("1",)),
            **{flag: self.variant.flags[flag] for flag in _FLAGS_OF_EVALUATION if flag in self.variant.flags},
            "token-frequency": (str(self.data.token_frequency),),
            "output": (str(self.evaluation(text)),),
            "force": (),
        }
        words = (*flag_words(flags), *self.devices.megatron_flags)
        command = standalone_command(processes, entry_point("evaluate", self.variant.program), words)
        return Step(f"evaluate-{text}", command, self.evaluation(text), self.devices.environment)


def runs_of(suite: Suite, folder: Path, data: Dataset, devices: Devices) -> tuple[Run, ...]:
    """Return all runs of a suite seed by seed, so that all variants have one run before any variant has two.

    Args:
        suite: The suite.
        folder: Folder of all files of the comparison.
        data: The dataset of all runs.
        devices: Devices of this machine.
    """
    runs = []
    for name, variant in suite.variants.items():
        for number, seed in enumerate(variant.seeds):
            runs.append((number, Run(name, variant, seed, folder / "runs" / f"{name}.seed-{seed}", data, devices)))
    return tuple(run for _, run in sorted(runs, key=lambda item: item[0]))


def _escape(flags: Flags) -> Flags:
    """Return flags whose dollar signs are no variables in a model file."""
    return {name: tuple(word.replace("$", "$$") for word in words) for name, words in flags.items()}
