"""The stages of each run: its mask, training, evaluation, and the analysis of its routing."""

import math
from functools import partial
from itertools import dropwhile
from pathlib import Path

import yaml

from maskmoe.comparison.data import Data, HeldOutSet, dataset_prefixes
from maskmoe.comparison.runs import Run, checkpoint_iterations, training_flags
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output
from maskmoe.files.paths import short_path
from maskmoe.launch.command import standalone_command
from maskmoe.launch.devices import DEVICE_FLAGS, Devices
from maskmoe.launch.model_file import LAYOUTS, Flags, flag_words
from maskmoe.workflow.files import StageFiles
from maskmoe.workflow.process import read_log
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.stage import Stage, StageMaker, maskmoe_command
from maskmoe.workflow.training_log import TrainingHistory


class RunPlan:
    """The stages of one run.

    Args:
        suite: the suite.
        run: one of the suite's runs.
        data: dataset of the suite.
        folder: folder of the run.
        devices: devices of this machine.
        processes: ranks that evaluate; by default one for each GPU, or one without GPUs.
    """

    def __init__(
        self, suite: Suite, run: Run, data: Data, folder: Path, devices: Devices, processes: int | None = None
    ) -> None:
        self.run = run
        self.files = StageFiles(folder)
        self._suite = suite
        self._data = data
        self.devices = devices
        self._processes = processes or devices.num_gpus or 1
        self._flags = training_flags(suite, run)
        self._saved = checkpoint_iterations(suite, run)

    @property
    def stages(self) -> tuple[StageMaker, ...]:
        """Makers of all stages, in order."""
        mask = (self.mask,) if self.run.variant.has_experts else ()
        if self.run.kind == "check":
            return (*mask, self.check)
        if not self.run.is_analyzed:
            return (*mask, self.train)
        routing = (self.routing,) if self.run.variant.has_experts else ()
        thin = () if self._suite.keep_checkpoints == "all" else (self.thin,)
        further = (partial(self.evaluate_on, held_out) for held_out in self._data.held_out)
        return (*mask, self.train, self.evaluate, *further, *routing, *thin)

    @property
    def unfinished(self) -> tuple[StageMaker, ...]:
        """Makers of the stages from the first on that is unfinished, or whose settings or files have changed since."""
        if not (self.files.record.exists() and self.is_prepared):
            return self.stages
        record = RunRecord(self.files.record)
        return tuple(dropwhile(lambda make_stage: record.is_finished(make_stage()), self.stages))

    @property
    def is_prepared(self) -> bool:
        """Whether the run's model file exists with the right content."""
        path = self.files.model_file
        return path.exists() and path.read_text(encoding="utf-8") == self._model_text()

    def prepare(self) -> None:
        """Write the run's model file, unless an equal file exists. Call after the data are made and before the stages.

        The file keeps its modification time if nothing changes, so that finished stages stay finished.
        """
        if not self.is_prepared:
            self.files.folder.mkdir(parents=True, exist_ok=True)
            with atomic_output(self.files.model_file) as path:
                path.write_text(self._model_text(), encoding="utf-8")

    def check_analysis(self) -> None:
        """Check that the checkpoints of the trained model exist if their routing has to be analyzed again.

        Raises:
            UserError: the analysis has changed since checkpoints were removed.
        """
        if not (self.run.is_analyzed and self.run.variant.has_experts and self.files.record.exists()):
            return
        record, routing = RunRecord(self.files.record), self.routing()
        has_all = all(self.files.checkpoint(iteration).exists() for iteration in self._saved)
        if record.is_finished(self.train()) and not has_all and not record.is_finished(routing):
            reason = record.reason_to_repeat(routing) or "it was not finished"
            raise UserError(
                f"{self.run.name}: the analysis of the routing cannot be repeated ({reason}), because only the last "
                f"checkpoint was kept: restore the setting, or remove {short_path(self.files.folder)} to train again"
            )

    def history(self) -> TrainingHistory:
        """Return the losses that the run has logged so far, here and in Slurm jobs; the newest log counts last."""
        logs = [path for path in (*self.files.slurm.glob("*/attempt*.log"), self.files.log("train")) if path.exists()]
        logs.sort(key=lambda path: path.stat().st_mtime_ns)
        return TrainingHistory(line for log in logs for line in read_log(log))

    def mask(self) -> Stage:
        """Build the run's routing mask."""
        frequency, mask = self._data.files.token_frequency, self.files.routing_mask
        flags = {
            "token-frequency": (str(frequency),),
            "num-experts": self._flags["num-experts"],
            "num-layers": self._flags["num-layers"],
            "seed": (str(self.run.seed),),
            **(self.run.variant.mask or {}),
        }
        command = maskmoe_command("mask", *flag_words(flags), "--output", mask)
        return Stage("mask", command, inputs=(frequency,), outputs=(mask,))

    def check(self) -> Stage:
        """Check the run's settings."""
        backend = () if self.devices.num_gpus else ("--distributed-backend", "gloo")
        command = (*self._launch("--check"), "--json", *backend)
        return Stage("check", command, self._inputs_of_launch, (), machine_flags=frozenset({"--distributed-backend"}))

    def train(self) -> Stage:
        """Train the run's model by launch/pretrain.sh, or resume its training."""
        return Stage(
            "train",
            self._launch("--no-check"),
            self._inputs_of_launch,
            outputs=(self.last_checkpoint,),
            byproducts=(self.files.checkpoints, self.files.tensorboard, self.files.slurm),
            scratch=(self.files.dataset_cache,),
            is_resumable=True,
            seq_length=int(self._flags["seq-length"][0]),
        )

    def evaluate(self) -> Stage:
        """Evaluate the trained model on all held-out text of the dataset."""
        return self._evaluation("evaluate", self._data.flags, self.files.evaluation, self._inputs_of_evaluation)

    def evaluate_on(self, held_out: HeldOutSet) -> Stage:
        """Evaluate the trained model on a further held-out set, with the frequency bands of the dataset."""
        inputs = (self.last_checkpoint, self._data.files.token_frequency, *held_out.dataset)
        output = self.files.evaluation_on(held_out.name)
        return self._evaluation(f"evaluate-{held_out.name}", held_out.flags, output, inputs)

    def _evaluation(self, name: str, data: Flags, output: Path, inputs: tuple[Path, ...]) -> Stage:
        """Return the stage that evaluates the last checkpoint on the data that the flags name."""
        num_experts = int(self._flags.get("num-experts", ("1",))[0])
        flags = {
            "expert-model-parallel-size": (str(math.gcd(self._processes, num_experts)),),
            **data,
            "data-cache-path": (str(self.files.dataset_cache),),
            "micro-batch-size": self._flags.get("micro-batch-size", ("1",)),
            "token-frequency": (str(self._data.files.token_frequency),),
        }
        words = (
            *("--load", str(self.files.checkpoints), "--use-checkpoint-args"),
            *flag_words(flags),
            *("--eval-output", str(output)),
            *self.devices.megatron_flags,
        )
        return Stage(
            name,
            standalone_command(self._processes, "maskmoe.training.evaluate", words),
            inputs,
            outputs=(output,),
            scratch=(self.files.dataset_cache,),
            environment=self.devices.environment,
            machine_flags=DEVICE_FLAGS | {"--nproc-per-node", "--expert-model-parallel-size"},
        )

    def routing(self) -> Stage:
        """Analyze how the run's checkpoints route held-out text."""
        data = self._data.flags
        flags = {
            "data-path": (dataset_prefixes(data["data-path"])[0],),
            "split": data["split"],
            "tokens": (str(self._suite.probe_tokens),),
            "token-frequency": (str(self._data.files.token_frequency),),
        }
        checkpoints, output = ("--load", self.files.checkpoints, "--ckpt-step", *self._saved), self.files.routing
        command = maskmoe_command("analyze", *checkpoints, *flag_words(flags), "--output-dir", output)
        environment = self.devices.environment
        return Stage("routing", command, self._inputs_of_evaluation, outputs=(output,), environment=environment)

    def thin(self) -> Stage:
        """Remove all checkpoints but the last."""
        routing = (self.files.routing,) if self.run.variant.has_experts else ()
        command = maskmoe_command("thin", "--load", self.files.checkpoints)
        return Stage("thin", command, inputs=(self.files.evaluation, *routing), outputs=())

    @property
    def further_evaluations(self) -> dict[str, Path]:
        """Results of the evaluations on the further held-out sets by the names of the sets."""
        return {held_out.name: self.files.evaluation_on(held_out.name) for held_out in self._data.held_out}

    @property
    def last_checkpoint(self) -> Path:
        """Folder of the checkpoint that completes the training."""
        return self.files.checkpoint(self._saved[-1])

    @property
    def flags(self) -> Flags:
        """All flags of training, without the folders of the run."""
        mask = {"routing-mask": (str(self.files.routing_mask),)} if self.run.variant.has_experts else {}
        cache = {"data-cache-path": (str(self.files.dataset_cache),)}
        return {**self._flags, **self._data.flags, **cache, **mask}

    @property
    def training_inputs(self) -> tuple[Path, ...]:
        """Files that training reads, besides the model file."""
        mask = (self.files.routing_mask,) if self.run.variant.has_experts else ()
        return (*mask, *self._data.inputs)

    @property
    def _inputs_of_launch(self) -> tuple[Path, ...]:
        return (self.files.model_file, *self.training_inputs)

    @property
    def _inputs_of_evaluation(self) -> tuple[Path, ...]:
        return (self.last_checkpoint, self._data.files.token_frequency, *self._data.inputs)

    def _launch(self, option: str) -> tuple[str, ...]:
        return maskmoe_command("launch", option, "--run-dir", self.files.folder, self.files.model_file)

    def _model_text(self) -> str:
        content = _as_yaml(self.flags)
        if self.run.variant.layouts:
            content[LAYOUTS] = {ranks: _as_yaml(flags) for ranks, flags in self.run.variant.layouts.items()}
        return yaml.safe_dump(content, sort_keys=False, width=120)


def _as_yaml(flags: Flags) -> dict[str, object]:
    """Return flags as a model file holds the flags, see `ModelFile`."""

    def value(words: tuple[str, ...]) -> object:
        escaped = [word.replace("$", "$$") for word in words]
        return True if not words else escaped[0] if len(words) == 1 else escaped

    return {name: value(words) for name, words in flags.items()}
