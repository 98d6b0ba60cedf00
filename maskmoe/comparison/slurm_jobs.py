"""The command lines that submit a phase of a comparison to Slurm: pure functions of runs and options.

An array trains the phase's runs, by `launch/slurm/submit.sh`; another one takes up each that is trained, and evaluates
it; and a job that waits for all of them goes on with the comparison.
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskmoe.comparison.runs import Run
from maskmoe.errors import UserError
from maskmoe.workflow.stage import ROOT

SUBMIT = ROOT / "launch" / "slurm" / "submit.sh"

_WITH_VALUE = {"--train-nodes", "--max-requeues", "--container", "--image", "--mount", "--port", "--address"}
_WITHOUT_VALUE = {"--no-node-check"}
_DECIDED = {
    *("--run-dir", "--chain", "--dry-run", "--array", "--dependency", "--output", "--open-mode", "--chdir", "--wrap"),
    *("--parsable", "--kill-on-invalid-dep", "-a", "-d", "-o", "-D"),
}
# Where a job may run and for how long, but not what it needs.
_FOR_ANY_JOB = ("account", "partition", "qos", "reservation", "clusters", "export", "time")
_FOR_ANY_JOB_SHORT = ("-A", "-p", "-q", "-M", "-t")

_COMPARE = ("-P", "-m", "maskmoe.comparison")

Submit = Callable[[str, Sequence[str]], str]
"""Submits a job: its name for people, and the command that does it. Returns the job's number."""


@dataclass(frozen=True)
class Container:
    """A container in which jobs run.

    Attributes:
        kind: `pyxis` or `apptainer`.
        image: of the container.
        mounts: `PATH` or `PATH:MODE`, at the same places in the container.
    """

    kind: str
    image: str
    mounts: tuple[str, ...]

    def enclose(self, words: Sequence[str], inputs: Sequence[Path], folder: Path, cwd: Path) -> tuple[str, ...]:
        """The command that runs Python in the container, with the code of this checkout.

        Args:
            words: what follows the name of the program.
            inputs: folders that are read.
            folder: that is written to.
            cwd: where it runs.
        """
        python = ("env", f"PYTHONPATH={ROOT}", "python3", *words)
        modes = {str(path): "ro" for path in (ROOT, cwd, *inputs)}
        for word in self.mounts:
            path, _, mode = word.rpartition(":")
            modes |= {path: mode} if mode in ("ro", "rw") else {word: "ro"}
        modes |= {str(folder): "rw"}
        # A folder comes before what is in it.
        mounts = [f"{path}:{path}:{modes[path]}" for path in sorted(modes)]
        if self.kind == "pyxis":
            options = (f"--container-image={self.image}", f"--container-mounts={','.join(mounts)}")
            step = ("srun", "--ntasks=1", "--cpu-bind=none", *options, "--no-container-mount-home")
            return (*step, f"--container-workdir={cwd}", *python)
        binds = [f"--bind={mount}" for mount in mounts]
        return ("apptainer", "exec", "--no-home", "--nv", "--pwd", str(cwd), *binds, self.image, *python)


@dataclass(frozen=True)
class SlurmOptions:
    """What follows `--` on the command line: options of launch/slurm/submit.sh, sbatch's among them.

    Attributes:
        words: all of them.
        sbatch: only sbatch's.
        container: that jobs run in; None for none.
    """

    words: tuple[str, ...]
    sbatch: tuple[str, ...]
    container: Container | None

    @classmethod
    def parse(cls, words: Sequence[str]) -> "SlurmOptions":
        """Read the options.

        Raises:
            UserError: one is not written as submit.sh wants it, or is decided by the comparison.
        """
        sbatch: list[str] = []
        values: dict[str, list[str]] = {}
        rest = list(words)
        while rest:
            word = rest.pop(0)
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            if name in _DECIDED:
                raise UserError(f"after `--`: {word} is decided by the comparison; leave it out")
            if word in _WITH_VALUE:
                if not rest:
                    raise UserError(f"after `--`: {word} needs a value")
                values.setdefault(word, []).append(rest.pop(0))
            elif not word.startswith("-"):
                raise UserError(f"after `--`: {word} stands alone: write sbatch's options as --option=value")
            elif word not in _WITHOUT_VALUE:
                sbatch.append(word)
        kind, image = (values.get(name, [""])[-1] for name in ("--container", "--image"))
        if kind not in ("", "none", "pyxis", "apptainer"):
            raise UserError(f"after `--`: --container is none, pyxis or apptainer, not {kind}")
        if kind in ("", "none"):
            return cls(tuple(words), tuple(sbatch), None)
        if not image:
            raise UserError(f"after `--`: --container {kind} needs an --image")
        return cls(tuple(words), tuple(sbatch), Container(kind, image, tuple(values.get("--mount", ()))))

    @property
    def for_any_job(self) -> tuple[str, ...]:
        """Those of sbatch's that do not ask for nodes, GPUs or memory."""
        long = tuple(f"--{name}=" for name in _FOR_ANY_JOB)
        return tuple(word for word in self.sbatch if word.startswith((*long, *_FOR_ANY_JOB_SHORT)))


@dataclass(frozen=True)
class Phase:
    """Runs that can be taken up now, each an element of the arrays.

    Attributes:
        name: `tuning` or `runs`.
        folder: has a link to the folder of each run, named by the number of its element.
        to_train: runs whose training is not complete, by element.
        to_evaluate: runs with stages after training, be they to be trained or not.
    """

    name: str
    folder: Path
    to_train: Mapping[int, Run]
    to_evaluate: Mapping[int, Run]

    @property
    def elements(self) -> dict[int, Run]:
        """All runs."""
        return {**self.to_train, **self.to_evaluate}

    @property
    def todo(self) -> dict[str, list[str]]:
        """Names of the runs, by what there is to do."""
        runs = {"train": self.to_train, "evaluate": self.to_evaluate}
        return {name: sorted(run.name for run in these.values()) for name, these in runs.items()}


@dataclass(frozen=True)
class Jobs:
    """The command lines that submit the jobs of a phase.

    Attributes:
        phase: of the comparison.
        folder: of the comparison.
        suite: its name.
        options: of the user.
        inputs: folders that runs read, besides their own.
        arguments: of this command, without what concerns Slurm.
        throttle: how many elements of an array run at a time; None: all.
        cwd: where this command was called.
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
        """The array that trains."""
        mounts = () if self.options.container is None else [w for path in self.inputs for w in ("--mount", str(path))]
        return (
            *(str(SUBMIT), "--parsable", f"--job-name={self._name}-train", self._array(self.phase.to_train)),
            f"--output={self._element_log}",
            *self.options.words,
            *mounts,
            *("--run-dir", f"{self.phase.folder}/%a", "--", f"{self.phase.folder}/%a/run.yaml"),
        )

    def evaluation(self, elements: Sequence[int], after: str | None) -> tuple[str, ...]:
        """The array that does what comes after training, each element on one node.

        Args:
            elements: of the phase.
            after: the job that trains them; None if they are trained.
        """
        dependency = (f"--dependency=aftercorr:{after}", "--kill-on-invalid-dep=yes") if after else ()
        container = self.options.container
        words = (*_COMPARE, *self.arguments, "--run")
        command = (sys.executable, *words)
        if container is not None:
            command = container.enclose(words, self.inputs, self.folder, self.cwd)
        # An element finds its run by the link.
        run = f'"$(realpath --relative-to={shlex.quote(str(self.folder))} '
        run += f'{shlex.quote(str(self.phase.folder))}/"$SLURM_ARRAY_TASK_ID")"'
        return (
            *("sbatch", "--parsable", f"--job-name={self._name}-evaluate", self._array(elements), *dependency),
            *("--requeue", "--open-mode=append", f"--output={self._element_log}", f"--chdir={self.cwd}"),
            *(*self.options.sbatch, "--nodes=1", "--ntasks-per-node=1"),
            f"--wrap=exec {shlex.join(command)} {run}",
        )

    def continuation(self, after: Sequence[str]) -> tuple[str, ...]:
        """The job that goes on when others have ended, however they did."""
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
            UserError: Slurm refuses one.
        """
        numbers = []
        if self.phase.to_train:
            numbers.append(submit("TRAINING", self.training()))
        trained_first = [element for element in self.phase.to_evaluate if element in self.phase.to_train]
        trained = [element for element in self.phase.to_evaluate if element not in self.phase.to_train]
        if trained_first:
            numbers.append(submit("EVALUATION", self.evaluation(trained_first, numbers[0])))
        if trained:
            numbers.append(submit("REST", self.evaluation(trained, None)))
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
