"""The command lines that submit a phase of a comparison to Slurm: pure functions of runs and options.

The first job array trains the phase's runs by `launch/slurm/submit.sh`. The second array evaluates each run after its
training. A last job waits for all elements and continues the comparison.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.runs import Run
from maskmoe.errors import UserError
from maskmoe.workflow.paths import SUBMIT_SCRIPT

_CHECKOUT = SUBMIT_SCRIPT.parents[2]
_WITH_VALUE = {"--train-nodes", "--max-requeues", "--container", "--image", "--mount", "--port", "--address"}
_DECIDED = {
    *("--run-dir", "--chain", "--dry-run", "--array", "--dependency", "--output", "--open-mode", "--chdir", "--wrap"),
    *("--parsable", "--kill-on-invalid-dep", "-a", "-d", "-o", "-D"),
}
# These options say where a job may run and for how long, but not which resources the job needs.
_FOR_ANY_JOB = (
    *("--account=", "--partition=", "--qos=", "--reservation=", "--clusters=", "--export=", "--time="),
    *("-A", "-p", "-q", "-M", "-t"),
)
_COMPARE = ("-P", "-m", "maskmoe", "compare")

Submit = Callable[[str, Sequence[str]], str]
"""Submits a job. Takes the job's name for people and the command that submits the job; returns the job's number."""


@dataclass(frozen=True)
class SlurmOptions:
    """The options after `--` on the command line: options of launch/slurm/submit.sh and of sbatch.

    Attributes:
        words: all options.
        sbatch: options of sbatch only.
        container: what starts the container in which jobs run: `none`, `pyxis` or `apptainer`.
        image: image of the container.
        mounts: `PATH` or `PATH:MODE`; every path is mounted at the same path in the container.
    """

    words: tuple[str, ...]
    sbatch: tuple[str, ...]
    container: str
    image: str
    mounts: tuple[str, ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> "SlurmOptions":
        """Read the options.

        Raises:
            UserError: an option is not written as submit.sh requires, or the comparison decides the option.
        """
        sbatch: list[str] = []
        values: dict[str, list[str]] = {"--container": ["none"], "--image": [""], "--mount": []}
        remaining = iter(words)
        for word in remaining:
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            if name in _DECIDED:
                raise UserError(f"after `--`: {word} is decided by the comparison; leave the option out")
            if word in _WITH_VALUE:
                if (value := next(remaining, None)) is None:
                    raise UserError(f"after `--`: {word} needs a value")
                values.setdefault(word, []).append(value)
            elif not word.startswith("-"):
                raise UserError(f"after `--`: {word} stands alone: write sbatch's options as --option=value")
            elif word != "--no-node-check":
                sbatch.append(word)
        container, image = values["--container"][-1] or "none", values["--image"][-1]
        if container not in ("none", "pyxis", "apptainer"):
            raise UserError(f"after `--`: --container is none, pyxis or apptainer, not {container}")
        if container != "none" and not image:
            raise UserError(f"after `--`: --container {container} needs an --image")
        return cls(tuple(words), tuple(sbatch), container, image, tuple(values["--mount"]))

    @property
    def for_any_job(self) -> tuple[str, ...]:
        """The options of sbatch that do not ask for nodes, GPUs or memory."""
        return tuple(word for word in self.sbatch if word.startswith(_FOR_ANY_JOB))


@dataclass(frozen=True)
class Phase:
    """Runs that can be started now. Each run is one element of the job arrays; the elements are counted from 1.

    Attributes:
        name: `tuning` or `runs`.
        folder: folder with a link to the folder of each run, named by the number of the run's element.
        runs: the runs.
        to_train: elements whose training is not complete.
        to_evaluate: elements with stages after training, whether or not their training is complete.
    """

    name: str
    folder: Path
    runs: Sequence[Run]
    to_train: list[int]
    to_evaluate: list[int]

    @property
    def todo(self) -> dict[str, list[str]]:
        """Names of the runs to train and of the runs to evaluate."""
        parts = {"train": self.to_train, "evaluate": self.to_evaluate}
        return {what: sorted(self.runs[element - 1].name for element in part) for what, part in parts.items()}


@dataclass(frozen=True)
class Jobs:
    """The command lines that submit the jobs of the phases of a comparison.

    Attributes:
        comparison: the comparison.
        options: the user's options for Slurm.
        inputs: folders that runs read, besides their own.
        arguments: arguments of `maskmoe compare`, without the arguments for Slurm.
        throttle: number of elements of an array that run at a time; None for no limit.
        cwd: current folder of the user.
    """

    comparison: Comparison
    options: SlurmOptions
    inputs: tuple[Path, ...]
    arguments: tuple[str, ...]
    throttle: int | None
    cwd: Path

    def submit(self, phase: Phase, submit: Submit) -> None:
        """Submit all jobs of a phase.

        Raises:
            UserError: Slurm refuses a job.
        """
        numbers: list[str] = []
        if phase.to_train:
            numbers.append(submit("TRAINING", self._training(phase)))
        trained_first = [element for element in phase.to_evaluate if element in phase.to_train]
        trained_already = [element for element in phase.to_evaluate if element not in phase.to_train]
        if trained_first:
            numbers.append(submit("EVALUATION", self._evaluation(phase, trained_first, numbers[0])))
        if trained_already:
            numbers.append(submit("REST", self._evaluation(phase, trained_already, None)))
        submit("NEXT", self._continuation(phase, numbers))

    def _training(self, phase: Phase) -> tuple[str, ...]:
        """Return the command that submits the array that trains."""
        inputs = () if self.options.container == "none" else self.inputs
        return (
            *(str(SUBMIT_SCRIPT), "--parsable", *self._array(phase, "train", phase.to_train)),
            *self.options.words,
            *(word for path in inputs for word in ("--mount", str(path))),
            *("--run-dir", f"{phase.folder}/%a", "--", f"{phase.folder}/%a/run.yaml"),
        )

    def _evaluation(self, phase: Phase, elements: Sequence[int], after: str | None) -> tuple[str, ...]:
        """Return the command that submits the array that runs all stages after training, each element on one node.

        Args:
            phase: the phase.
            elements: elements of the phase.
            after: number of the job that trains the elements; None if the elements are trained already.
        """
        dependency = (f"--dependency=aftercorr:{after}", "--kill-on-invalid-dep=yes") if after else ()
        # The link of the element leads to the folder of the run, whose path is the name of the run.
        link = f'{shlex.quote(str(phase.folder))}/"$SLURM_ARRAY_TASK_ID"'
        run = f'"$(realpath --relative-to={shlex.quote(str(self.comparison.folder))} {link})"'
        return (
            *("sbatch", "--parsable", *self._array(phase, "evaluate", elements), *dependency),
            *("--requeue", "--open-mode=append", f"--chdir={self.cwd}"),
            *(*self.options.sbatch, "--nodes=1", "--ntasks-per-node=1"),
            f"--wrap=exec {shlex.join(self._python(*_COMPARE, *self.arguments, '--run'))} {run}",
        )

    def _continuation(self, phase: Phase, after: Sequence[str]) -> tuple[str, ...]:
        """Return the command that submits the job that continues the comparison.

        Args:
            phase: the phase.
            after: numbers of the jobs that must have ended before, whether or not the jobs succeed.
        """
        name = f"{self.comparison.suite.name}-{phase.name}-next"
        command = (sys.executable, *_COMPARE, *self.arguments, "--slurm", "--", *self.options.words)
        return (
            *("sbatch", "--parsable", f"--job-name={name}", f"--dependency=afterany:{':'.join(after)}"),
            *("--open-mode=append", f"--output={self.comparison.folder}/slurm/%j.log", f"--chdir={self.cwd}"),
            *(*self.options.for_any_job, "--nodes=1", "--ntasks=1"),
            f"--wrap=exec {shlex.join(command)}",
        )

    def _array(self, phase: Phase, what: str, elements: Sequence[int]) -> tuple[str, ...]:
        """Return the options of a job array: its name, its elements, and the log of each element."""
        throttle = f"%{self.throttle}" if self.throttle else ""
        return (
            f"--job-name={self.comparison.suite.name}-{phase.name}-{what}",
            f"--array={','.join(map(str, elements))}{throttle}",
            f"--output={phase.folder}/%a/slurm/%j.log",
        )

    def _python(self, *words: str) -> tuple[str, ...]:
        """Return the command that runs Python with the code of this checkout, in the container if there is one."""
        options = self.options
        if options.container == "none":
            return (sys.executable, *words)
        python = ("env", f"PYTHONPATH={_CHECKOUT}", "python3", *words)
        modes = {str(path): "ro" for path in (_CHECKOUT, self.cwd, *self.inputs)}
        for word in options.mounts:
            path, _, mode = word.rpartition(":")
            modes |= {path: mode} if mode in ("ro", "rw") else {word: "ro"}
        modes |= {str(self.comparison.folder): "rw"}
        # A folder must be mounted before the folders inside it.
        mounts = [f"{path}:{path}:{modes[path]}" for path in sorted(modes)]
        if options.container == "pyxis":
            image = (f"--container-image={options.image}", f"--container-mounts={','.join(mounts)}")
            step = ("srun", "--ntasks=1", "--cpu-bind=none", *image, "--no-container-mount-home")
            return (*step, f"--container-workdir={self.cwd}", *python)
        binds = [f"--bind={mount}" for mount in mounts]
        return ("apptainer", "exec", "--no-home", "--nv", "--pwd", str(self.cwd), *binds, options.image, *python)
