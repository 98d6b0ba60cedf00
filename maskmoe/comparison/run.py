"""The runs of a suite: one training each, and the stages that make its mask, train it and evaluate it."""

import math
from dataclasses import dataclass
from pathlib import Path

from maskmoe.arguments.flags import flag_words, flags_to_yaml
from maskmoe.comparison.data import Dataset
from maskmoe.comparison.stage import Stage, maskmoe_command
from maskmoe.comparison.suite import Suite, Variant
from maskmoe.errors import UserError
from maskmoe.files.outputs import write_text
from maskmoe.files.run_folder import CHECKPOINTS, TENSORBOARD
from maskmoe.launch.command import entry_point, standalone_command
from maskmoe.launch.machine import Devices
from maskmoe.launch.model_file import Flags
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers

OWN_TEXT = "held-out"
"""Name of the held-out documents of the training text, beside the further held-out texts of a suite."""

NARROW_MASK = "narrow_mask.safetensors"
"""The mask from which a widened mask is made, in the folder of its run."""

# These flags change what a model sees of its text. Checkpoints restore neither them nor the implementation.
_FLAGS_OF_EVALUATION = (
    *("dataloader-inter-document-masking", "reset-attention-mask", "reset-position-ids", "eod-mask-loss"),
    "transformer-impl",  # that of Transformer Engine has no masks of documents
)
# These flags change the speed of a run or the files that it keeps, and none of its results.
_FLAGS_WITHOUT_EFFECT = {"num-workers", "keep-last-checkpoints", "save-interval", "log-interval"}


@dataclass(frozen=True)
class Run:
    """One training of a variant in a folder of its own.

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
        """The flags that the result depends on: of training, of the mask (`mask.…`) and of its widening (`widen.…`)."""
        flags = {flag: words for flag, words in self.variant.flags.items() if flag not in _FLAGS_WITHOUT_EFFECT}
        flags |= {f"{ranks}.{flag}": words for ranks, of in self.variant.layouts.items() for flag, words in of.items()}
        if self.variant.mask != "none":
            flags |= {f"mask.{flag}": words for flag, words in self.variant.mask.items()}
        flags |= {f"widen.{flag}": words for flag, words in self.variant.widen.items()}
        if self.variant.program:
            flags["program"] = (Path(self.variant.program).name,)
        return {flag: " ".join(words) or "true" for flag, words in sorted(flags.items())}

    @property
    def num_mask_layers(self) -> str:
        """Number of tables of the routing mask: of feed-forward layers, with and without experts."""
        if pattern := self.variant.flags.get("hybrid-layer-pattern"):
            return str(len(FeedForwardLayers.of_pattern(*pattern).has_experts))
        return self.variant.flags["num-layers"][0]

    @property
    def tokens(self) -> int:
        """Number of tokens that the run trains on."""
        return math.prod(
            int(self.variant.flags[flag][0]) for flag in ("train-iters", "global-batch-size", "seq-length")
        )

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
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.folder / TENSORBOARD

    def evaluation(self, text: str) -> Path:
        """Return the result of the evaluation on a held-out text."""
        return self.folder / f"evaluation-{text}.json"

    def flags(self) -> Flags:
        """Return all flags of training, without the folders of the run. The dataset must exist."""
        end = self.variant.flags["train-iters"]
        mask = {"routing-mask": (str(self.routing_mask),)} if self.variant.has_experts else {}
        own = {"seed": (str(self.seed),), "data-cache-path": (str(self.folder / "dataset_cache"),)}
        program = {"program": (self.variant.program,)} if self.variant.program else {}
        saving = {"save-interval": end, "keep-last-checkpoints": ("1",)}
        return {**saving, **self.variant.flags, **self.data.flags, **own, **mask, **program}

    def prepare(self) -> None:
        """Write the model file, unless an equal one exists. The dataset must exist.

        The file keeps its modification time if nothing changes, so that finished stages stay finished.
        """
        layouts = {ranks: _escape(flags) for ranks, flags in self.variant.layouts.items()}
        text = flags_to_yaml(_escape(self.flags()), layouts)
        if not self.model_file.exists() or self.model_file.read_text(encoding="utf-8") != text:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.model_file, text)

    def stages(self) -> tuple[Stage, ...]:
        """Return all stages from the mask to the evaluations."""
        further = (self.evaluation_stage(name) for name in self.data.held_out)
        return (*self.stages_before_training(), self.training_stage(), self.evaluation_stage(OWN_TEXT), *further)

    def stages_before_training(self) -> tuple[Stage, ...]:
        """Return the stages that make the mask, if the model has experts."""
        if not self.variant.has_experts:
            return ()
        if not self.variant.widen:
            return (self.mask_stage(self.routing_mask),)
        narrow = self.folder / NARROW_MASK
        return (self.mask_stage(narrow), self.widening_stage(narrow))

    def mask_stage(self, output: Path) -> Stage:
        """Build a routing mask."""
        if self.variant.mask == "none":
            raise UserError(f"the variant {self.name} has no experts, so it has no mask")
        flags = {
            "token-frequency": (str(self.data.token_frequency),),
            "num-experts": self.variant.flags["num-experts"],
            "num-layers": (self.num_mask_layers,),
            "seed": (str(self.seed),),
            **self.variant.mask,
        }
        command = maskmoe_command("mask", *flag_words(flags), "--output", output)
        return Stage("mask", command, (output,), (self.data.token_frequency,))

    def widening_stage(self, narrow: Path) -> Stage:
        """Let frequent ids of a routing mask see more experts."""
        flags = {
            "routing-mask": (str(narrow),),
            "token-frequency": (str(self.data.token_frequency),),
            "seed": (str(self.seed),),
            **self.variant.widen,
        }
        command = maskmoe_command("mask", "widen", *flag_words(flags), "--output", self.routing_mask)
        return Stage("widen", command, (self.routing_mask,), (narrow, self.data.token_frequency))

    def check_stage(self) -> Stage:
        """Check the settings, and write the report into `check_report`."""
        backend = () if self.devices.num_gpus else ("--distributed-backend", "gloo")
        command = (*self._launch("--check"), "--json", str(self.check_report), *backend)
        return Stage("check", command, (self.check_report,), self._inputs)

    def training_stage(self) -> Stage:
        """Train the model by `maskmoe pretrain`, or resume its training."""
        command = self._launch()
        byproducts = (self.checkpoints, self.tensorboard, self.folder / "slurm")
        return Stage("train", command, (self.last_checkpoint,), self._inputs, byproducts, is_resumable=True)

    def evaluation_stage(self, text: str, processes: int = 0) -> Stage:
        """Evaluate the trained model on a held-out text, with the frequency bands of the training text.

        Args:
            text: `OWN_TEXT` or the name of a further held-out text.
            processes: Number of ranks; by default one for each GPU, or one without GPUs.
        """
        processes = processes or self.devices.num_gpus or 1
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
        }
        words = (*flag_words(flags), *self.devices.megatron_flags)
        command = standalone_command(processes, entry_point("evaluate", self.variant.program), words)
        inputs = (self.last_checkpoint, *self._inputs)
        return Stage(f"evaluate-{text}", command, (self.evaluation(text),), inputs, (), self.devices.environment)

    @property
    def last_checkpoint(self) -> Path:
        """Folder of the checkpoint that completes the training, as Megatron names it."""
        return self.checkpoints / f"iter_{int(self.variant.flags['train-iters'][0]):07d}"

    @property
    def _inputs(self) -> tuple[Path, ...]:
        mask = (self.routing_mask,) if self.variant.has_experts else ()
        program = (Path(self.variant.program),) if self.variant.program else ()
        return (self.model_file, *mask, *program, *self.data.files)

    def _launch(self, *options: str) -> tuple[str, ...]:
        return maskmoe_command("pretrain", *options, "--run-dir", self.folder, self.model_file)


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
