"""The command lines that submit a phase of a comparison to Slurm: pure functions of runs and options.

The first job array trains the phase's runs by `launch/slurm/submit.sh`. The second array evaluates each run after its
training. A last job waits for all elements and continues the comparison.
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskmoe.comparison.runs import Run
from maskmoe.errors import UserError
from maskmoe.paths import SUBMIT_SCRIPT

_CHECKOUT = SUBMIT_SCRIPT.parents[2]
_WITH_VALUE = {"--train-nodes", "--max-requeues", "--container", "--image", "--mount", "--port", "--address"}
_WITHOUT_VALUE = {"--no-node-check"}
_DECIDED = {
    *("--run-dir", "--chain", "--dry-run", "--array", "--dependency", "--output", "--open-mode", "--chdir", "--wrap"),
    *("--parsable", "--kill-on-invalid-dep", "-a", "-d", "-o", "-D"),
}
# These options say where a job may run and for how long, but not which resources the job needs.
_FOR_ANY_JOB = ("account", "partition", "qos", "reservation", "clusters", "export", "time")
_FOR_ANY_JOB_SHORT = ("-A", "-p", "-q", "-M", "-t")

_COMPARE = ("-P", "-m", "maskmoe", "compare")

Submit = Callable[[str, Sequence[str]], str]
"""Submits a job. Takes the job's name for people and the command that submits the job; returns the job's number."""


@dataclass(frozen=True)
class Container:
    """A container in which jobs run.

    Attributes:
        kind: `pyxis` or `apptainer`.
        image: image of the container.
        mounts: `PATH` or `PATH:MODE`; every path is mounted at the same path in the container.
    """

    kind: str
    image: str
    mounts: tuple[str, ...]

    def enclose(self, words: Sequence[str], inputs: Sequence[Path], folder: Path, cwd: Path) -> tuple[str, ...]:
        """Return the command that runs Python in the container, with the code of this checkout.

        Args:
            words: arguments of Python.
            inputs: folders that are read.
            folder: folder that is written.
            cwd: current folder of the command.
        """
        python = ("env", f"PYTHONPATH={_CHECKOUT}", "python3", *words)
        modes = {str(path): "ro" for path in (_CHECKOUT, cwd, *inputs)}
        for word in self.mounts:
            path, _, mode = word.rpartition(":")
            modes |= {path: mode} if mode in ("ro", "rw") else {word: "ro"}
        modes |= {str(folder): "rw"}
        # A folder must be mounted before the folders inside it.
        mounts = [f"{path}:{path}:{modes[path]}" for path in sorted(modes)]
        if self.kind == "pyxis":
            options = (f"--container-image={self.image}", f"--container-mounts={','.join(mounts)}")
            step = ("srun", "--ntasks=1", "--cpu-bind=none", *options, "--no-container-mount-home")
            return (*step, f"--container-workdir={cwd}", *python)
        binds = [f"--bind={mount}" for mount in mounts]
        return ("apptainer", "exec", "--no-home", "--nv", "--pwd", str(cwd), *binds, self.image, *python)


@dataclass(frozen=True)
class SlurmOptions:
    """The options after `--` on the command line: options of launch/slurm/submit.sh and of sbatch.

    Attributes:
        words: all options.
        sbatch: options of sbatch only.
        container: container in which jobs run; None to run without a container.
    """

    words: tuple[str, ...]
    sbatch: tuple[str, ...]
    container: Container | None

    @classmethod
    def parse(cls, words: Sequence[str]) -> "SlurmOptions":
        """Read the options.

        Raises:
            UserError: an option is not written as submit.sh requires, or the comparison decides the option.
        """
        sbatch: list[str] = []
        values: dict[str, list[str]] = {}
        remaining = list(words)
        while remaining:
            word = remaining.pop(0)
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            if name in _DECIDED:
                raise UserError(f"after `--`: {word} is decided by the comparison; leave the option out")
            if word in _WITH_VALUE:
                if not remaining:
                    raise UserError(f"after `--`: {word} needs a value")
                values.setdefault(word, []).append(remaining.pop(0))
            elif not word.startswith("-"):
                raise UserError(f"after `--`: {word} stands alone: write sbatch's options as --option=value")
            elif word not in _WITHOUT_VALUE:
                sbatch.append(word)
        return cls(tuple(words), tuple(sbatch), _parse_container(values))

    @property
    def for_any_job(self) -> tuple[str, ...]:
        """The options of sbatch that do not ask for nodes, GPUs or memory."""
        long = tuple(f"--{name}=" for name in _FOR_ANY_JOB)
        return tuple(word for word in self.sbatch if word.startswith((*long, *_FOR_ANY_JOB_SHORT)))


def _parse_container(values: Mapping[str, Sequence[str]]) -> Container | None:
    """Return the container that the values of submit.sh's options describe."""
    kind, image = (values.get(name, [""])[-1] for name in ("--container", "--image"))
    if kind in ("", "none"):
        return None
    if kind not in ("pyxis", "apptainer"):
        raise UserError(f"after `--`: --container is none, pyxis or apptainer, not {kind}")
    if not image:
        raise UserError(f"after `--`: --container {kind} needs an --image")
    return Container(kind, image, tuple(values.get("--mount", ())))


@dataclass(frozen=True)
class Phase:
    """Runs that can be started now. Each run is one element of the job arrays.

    Attributes:
        name: `tuning` or `runs`.
        folder: folder with a link to the folder of each run, named by the number of the run's element.
        to_train: runs whose training is not complete, by element.
        to_evaluate: runs with stages after training, by element, whether or not their training is complete.
    """

    name: str
    folder: Path
    to_train: Mapping[int, Run]
    to_evaluate: Mapping[int, Run]

    @property
    def elements(self) -> dict[int, Run]:
        """All runs by element."""
        return {**self.to_train, **self.to_evaluate}

    @property
    def todo(self) -> dict[str, list[str]]:
        """Names of the runs to train and of the runs to evaluate."""
        return {
            "train": sorted(run.name for run in self.to_train.values()),
            "evaluate": sorted(run.name for run in self.to_evaluate.values()),
        }


@dataclass(frozen=True)
class Jobs:
    """The command lines that submit the jobs of a phase.

    Attributes:
        phase: the phase.
        folder: folder of the comparison.
        suite: name of the suite.
        options: the user's options for Slurm.
        inputs: folders that runs read, besides their own.
        arguments: arguments of `maskmoe compare`, without the arguments for Slurm.
        throttle: number of elements of an array that run at a time; None for no limit.
        cwd: current folder of the user.
    """

    phase: Phase
    folder: Path
    suite: str
    options: SlurmOptions
    inputs: tuple[Path, ...]
    arguments: tuple[str, ...]
    throttle: int | None
    cwd: Path

    def training(self) -> tuple[str, ...]:
        """Return the command that submits the array that trains."""
        inputs = () if self.options.container is None else self.inputs
        return (
            *(str(SUBMIT_SCRIPT), "--parsable", f"--job-name={self._name}-train", self._array(self.phase.to_train)),
            f"--output={self._element_log}",
            *self.options.words,
            *(word for path in inputs for word in ("--mount", str(path))),
            *("--run-dir", f"{self.phase.folder}/%a", "--", f"{self.phase.folder}/%a/run.yaml"),
        )

    def evaluation(self, elements: Sequence[int], after: str | None) -> tuple[str, ...]:
        """Return the command that submits the array that runs all stages after training, each element on one node.

        Args:
            elements: elements of the phase.
            after: number of the job that trains the elements; None if the elements are trained already.
        """
        dependency = (f"--dependency=aftercorr:{after}", "--kill-on-invalid-dep=yes") if after else ()
        words = (*_COMPARE, *self.arguments, "--run")
        container = self.options.container
        if container is None:
            command = (sys.executable, *words)
        else:
            command = container.enclose(words, self.inputs, self.folder, self.cwd)
        # The link of the element leads to the folder of the run, whose path is the name of the run.
        link = f'{shlex.quote(str(self.phase.folder))}/"$SLURM_ARRAY_TASK_ID"'
        run = f'"$(realpath --relative-to={shlex.quote(str(self.folder))} {link})"'
        return (
            *("sbatch", "--parsable", f"--job-name={self._name}-evaluate", self._array(elements), *dependency),
            *("--requeue", "--open-mode=append", f"--output={self._element_log}", f"--chdir={self.cwd}"),
            *(*self.options.sbatch, "--nodes=1", "--ntasks-per-node=1"),
            f"--wrap=exec {shlex.join(command)} {run}",
        )

    def continuation(self, after: Sequence[str]) -> tuple[str, ...]:
        """Return the command that submits the job that continues the comparison.

        Args:
            after: numbers of the jobs that must have ended before, whether or not the jobs succeed.
        """
        command = (sys.executable, *_COMPARE, *self.arguments, "--slurm", "--", *self.options.words)
        return (
            *("sbatch", "--parsable", f"--job-name={self._name}-next", f"--dependency=afterany:{':'.join(after)}"),
            *("--open-mode=append", f"--output={self.folder}/slurm/%j.log", f"--chdir={self.cwd}"),
            *(*self.options.for_any_job, "--nodes=1", "--ntasks=1"),
            f"--wrap=exec {shlex.join(command)}",
        )

    def submit(self, submit: Submit) -> None:
        """Submit all jobs.

        Raises:
            UserError: Slurm refuses a job.
        """
        numbers: list[str] = []
        if self.phase.to_train:
            numbers.append(submit("TRAINING", self.training()))
        trained_first = [element for element in self.phase.to_evaluate if element in self.phase.to_train]
        trained_already = [element for element in self.phase.to_evaluate if element not in self.phase.to_train]
        if trained_first:
            numbers.append(submit("EVALUATION", self.evaluation(trained_first, numbers[0])))
        if trained_already:
            numbers.append(submit("REST", self.evaluation(trained_already, None)))
        submit("NEXT", self.continuation(numbers))

    @property
    def _name(self) -> str:
        return f"{self.suite}-{self.phase.name}"

    @property
    def _element_log(self) -> str:
        return f"{self.phase.folder}/%a/slurm/%j.log"

    def _array(self, elements: Sequence[int] | Mapping[int, Run]) -> str:
        throttle = f"%{self.throttle}" if self.throttle else ""
        return f"--array={','.join(map(str, elements))}{throttle}"
