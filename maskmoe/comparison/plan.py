"""The stages of each run: its mask, training, evaluation, and how it routes."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from maskmoe.cli import atomic_output
from maskmoe.comparison.data import Data, dataset_prefixes
from maskmoe.comparison.runs import Run, checkpoint_iterations, training_flags
from maskmoe.comparison.suite import Suite
from maskmoe.launch.devices import DEVICE_FLAGS, Devices
from maskmoe.launch.model_file import LAYOUTS, Flags, flag_words
from maskmoe.workflow.progress import TrainingHistory
from maskmoe.workflow.runner import read_log
from maskmoe.workflow.stage import Stage, StageFiles, TrainingFiles, tool_command, words


@dataclass(frozen=True)
class DataPlan:
    """The stages that all runs share."""

    data: Data
    seq_length: int

    @property
    def files(self) -> StageFiles:
        return self.data.files

    @property
    def stages(self) -> tuple[Callable[[], Stage], ...]:
        return self.data.stages


@dataclass(frozen=True)
class RunFiles(TrainingFiles):
    """Where the files of a run are."""

    @property
    def model_file(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def slurm(self) -> Path:
        """Logs of the jobs that train it, if Slurm does, and of those that evaluate it."""
        return self.folder / "slurm"

    @property
    def training_logs(self) -> tuple[Path, ...]:
        """What training has printed here and in jobs, the newest last."""
        logs = [path for path in (*self.slurm.glob("*/attempt*.log"), self.log("train")) if path.exists()]
        return tuple(sorted(logs, key=lambda path: path.stat().st_mtime_ns))

    def checkpoint(self, iteration: int) -> Path:
        """The folder of one checkpoint, as Megatron names it."""
        return self.checkpoints / f"iter_{iteration:07d}"

    @property
    def routing(self) -> Path:
        return self.folder / "routing"


class RunPlan:
    """The stages of one run.

    Args:
        suite: the suite.
        run: one of its runs.
        data: what it is trained on.
        folder: of the run.
        devices: of this machine.
    """

    def __init__(self, suite: Suite, run: Run, data: Data, folder: Path, devices: Devices):
        self.run = run
        self.files = RunFiles(folder)
        self._suite = suite
        self._data = data
        self._devices = devices
        self._flags = training_flags(suite, run)
        self._saved = checkpoint_iterations(suite, run)

    @property
    def seq_length(self) -> int:
        return int(self._flags["seq-length"][0])

    @property
    def stages(self) -> tuple[Callable[[], Stage], ...]:
        """Makers of all stages, in order."""
        mask = (self.mask,) if self.run.variant.has_experts else ()
        if self.run.kind == "check":
            return (*mask, self.check)
        if not self.run.is_analyzed:
            return (*mask, self.train)
        routing = (self.routing,) if self.run.variant.has_experts else ()
        thin = () if self._suite.keeps_checkpoints else (self.thin,)
        return (*mask, self.train, self.evaluate, *routing, *thin)

    @property
    def is_prepared(self) -> bool:
        """Whether the run's model file is there, as it shall be."""
        path = self.files.model_file
        return path.exists() and path.read_text(encoding="utf-8") == self._model_text()

    def prepare(self) -> None:
        """Write the run as a model file that launch/pretrain.sh takes; an equal one stays as it is.

        To be called when the data are made, before the stages.
        """
        if not self.is_prepared:
            self.files.folder.mkdir(parents=True, exist_ok=True)
            with atomic_output(self.files.model_file) as path:
                path.write_text(self._model_text(), encoding="utf-8")

    def history(self) -> TrainingHistory:
        """The losses, as far as it is."""
        return TrainingHistory([line for log in self.files.training_logs for line in read_log(log)])

    def mask(self) -> Stage:
        flags = {
            "token-frequency": (str(self._data.token_frequency),),
            "num-experts": self._flags["num-experts"],
            "num-layers": self._flags["num-layers"],
            "seed": (str(self.run.seed),),
            **self.run.variant.mask,
        }
        command = tool_command("build_routing_mask", *flag_words(flags), "--output", self.files.routing_mask)
        return Stage("mask", command, inputs=(self._data.token_frequency,), outputs=(self.files.routing_mask,))

    def check(self) -> Stage:
        backend = () if self._devices.num_gpus else ("--distributed-backend", "gloo")
        return Stage(
            "check",
            self._launch("--check", flags=backend),
            inputs=self._inputs_of_training(),
            outputs=(),
            machine_flags=frozenset({"--distributed-backend"}),
        )

    def train(self) -> Stage:
        files = self.files
        return Stage(
            "train",
            self._launch("--no-check"),
            inputs=self._inputs_of_training(),
            outputs=(self._last_checkpoint,),
            byproducts=(files.checkpoints, files.tensorboard, files.slurm),
            scratch=(files.dataset_cache,),
            continues=True,
        )

    def evaluate(self) -> Stage:
        files = self.files
        processes = self._devices.num_gpus or 1
        num_experts = int(self._flags.get("num-experts", ("1",))[0])
        command = words(
            *(Path(sys.executable), "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", processes, "-m", "maskmoe.training.evaluate"),
            *("--load", files.checkpoints, "--use-checkpoint-args"),
            *("--expert-model-parallel-size", math.gcd(processes, num_experts)),
            *flag_words(self._data.flags),
            *("--data-cache-path", files.dataset_cache),
            *("--micro-batch-size", *self._flags.get("micro-batch-size", ("1",))),
            *("--token-frequency", self._data.token_frequency),
            *("--eval-output", files.evaluation),
            *self._devices.megatron_flags,
        )
        return Stage(
            "evaluate",
            command,
            inputs=(self._last_checkpoint, self._data.token_frequency, *self._data.inputs),
            outputs=(files.evaluation,),
            scratch=(files.dataset_cache,),
            environment=self._devices.environment,
            machine_flags=DEVICE_FLAGS | {"--nproc-per-node", "--expert-model-parallel-size"},
        )

    def routing(self) -> Stage:
        files, data = self.files, self._data.flags
        command = tool_command(
            "analyze_routing",
            *("--load", files.checkpoints, "--ckpt-step", *self._saved),
            *("--data-path", dataset_prefixes(data["data-path"])[0], "--split", *data["split"]),
            *("--tokens", self._suite.probe_tokens),
            *("--token-frequency", self._data.token_frequency),
            *("--output-dir", files.routing),
        )
        return Stage(
            "routing",
            command,
            inputs=(self._last_checkpoint, self._data.token_frequency, *self._data.inputs),
            outputs=(files.routing,),
            environment=self._devices.environment,
        )

    def thin(self) -> Stage:
        files = self.files
        results = (files.evaluation, *((files.routing,) if self.run.variant.has_experts else ()))
        return Stage("thin", tool_command("thin_checkpoints", "--load", files.checkpoints), inputs=results, outputs=())

    @property
    def _last_checkpoint(self) -> Path:
        return self.files.checkpoint(self._saved[-1])

    def _launch(self, option: str, flags: tuple[str, ...] = ()) -> tuple[str, ...]:
        launcher = (Path(sys.executable), "-P", "-m", "maskmoe.launch", option, "--run-dir", self.files.folder)
        return words(*launcher, self.files.model_file, *flags)

    def _inputs_of_training(self) -> tuple[Path, ...]:
        mask = (self.files.routing_mask,) if self.run.variant.has_experts else ()
        return (self.files.model_file, *mask, *self._data.inputs)

    def _model_text(self) -> str:
        mask = {"routing-mask": (str(self.files.routing_mask),)} if self.run.variant.has_experts else {}
        own = {"data-cache-path": (str(self.files.dataset_cache),), **mask}
        content = _as_yaml({**self._flags, **self._data.flags, **own})
        if self.run.variant.layouts:
            content[LAYOUTS] = {ranks: _as_yaml(flags) for ranks, flags in self.run.variant.layouts.items()}
        return yaml.safe_dump(content, sort_keys=False, width=120)


def _as_yaml(flags: Flags) -> dict[str, object]:
    def value(words: tuple[str, ...]) -> object:
        escaped = [word.replace("$", "$$") for word in words]
        return True if not words else escaped[0] if len(words) == 1 else escaped

    return {name: value(words) for name, words in flags.items()}
