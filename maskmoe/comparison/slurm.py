"""A comparison in Slurm jobs: submit the jobs of the next phase and record the trainings that jobs have completed."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.plan import RunPlan
from maskmoe.comparison.runs import Run
from maskmoe.comparison.slurm_options import SlurmOptions
from maskmoe.errors import RunFailure, UserError
from maskmoe.files.json_files import read_record, write_record
from maskmoe.files.paths import SUBMIT_SCRIPT, short_path
from maskmoe.workflow.failure import explain_failure
from maskmoe.workflow.lock import locked
from maskmoe.workflow.process import read_log
from maskmoe.workflow.progress import ProgressLine
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.runner import run_stages

_CHECKOUT = SUBMIT_SCRIPT.parents[2]
_COMPARE = ("-P", "-m", "maskmoe", "compare")


@dataclass(frozen=True)
class Submission:
    """The jobs of the newest submission, kept in a file.

    Attributes:
        jobs: numbers of the jobs; the last job continues the comparison.
        todo: names of the runs that the jobs were to train and to evaluate, by `train` and `evaluate`.
        cluster: the cluster of the jobs; empty if sbatch named none.
    """

    jobs: tuple[str, ...]
    todo: dict[str, list[str]]
    cluster: str = ""

    @classmethod
    def read(cls, comparison: Comparison) -> "Submission":
        """Read the file; return an empty submission if the file does not exist.

        Raises:
            UserError: the file is damaged.
        """
        path = _submission_file(comparison)
        if not path.exists():
            return cls((), {})
        return read_record(cls, path, "delete the file when no job of the comparison is left")

    @property
    def is_continued_here(self) -> bool:
        """Whether this process belongs to the last of the jobs."""
        return bool(self.jobs) and os.environ.get("SLURM_JOB_ID") == self.jobs[-1]

    @property
    def cluster_option(self) -> tuple[str, ...]:
        """The option that names the cluster of the jobs to Slurm's commands."""
        return (f"--clusters={self.cluster}",) if self.cluster else ()

    def scancel(self, jobs: Sequence[str]) -> str:
        """Return the command line that ends jobs, the last one first."""
        return shlex.join(("scancel", *self.cluster_option, *reversed(jobs)))


def _submission_file(comparison: Comparison) -> Path:
    return comparison.folder / "slurm" / "submission.json"


def refuse_while_jobs_are_queued(comparison: Comparison) -> None:
    """Refuse to start while jobs may train the same runs, because both would write the same checkpoints.

    The job that continues the comparison may start: all other jobs have ended by then.

    Raises:
        UserError: jobs of this comparison are queued or running.
    """
    submission = Submission.read(comparison)
    if not submission.jobs or submission.is_continued_here or shutil.which("squeue") is None:
        return
    states = "PENDING,RUNNING,SUSPENDED,CONFIGURING"
    command = ("squeue", "--noheader", "--format=%F", f"--states={states}", f"--user={os.getuid()}")
    listed = _output(*command, *submission.cluster_option, failure="cannot ask Slurm for its queue: ").split()
    if queued := [job for job in submission.jobs if job in listed]:
        raise UserError(
            "jobs of this comparison are in Slurm's queue, and go on by themselves; to end the jobs: "
            + submission.scancel(queued)
        )


def _reason(plan: RunPlan) -> str:
    """Return why the jobs of a run failed."""
    logs = sorted(plan.files.slurm.glob("*.log"), key=lambda log: log.stat().st_mtime_ns)
    if not logs:
        return "no job has started the run"
    reason = str(explain_failure(1, read_log(logs[-1])))
    # The message of a failed stage names the stage's log already.
    return reason if "(full output: " in reason else f"{reason} (full output: {short_path(logs[-1])})"


def record_training(plan: RunPlan) -> bool:
    """Record that a job has completed the training of a run; return whether the completion is new.

    Raises:
        UserError: another command works on the run.
    """
    if not (plan.is_prepared and any(plan.files.slurm.glob("*.finished"))):
        return False
    with locked(plan.files.lock):
        record, stage = RunRecord(plan.files.record), plan.train()
        if stage.name not in record or record.is_finished(stage) or record.reason_to_repeat(stage):
            return False
        record.finish(stage, plan.history().training_seconds)
    return True


def _record_run(comparison: Comparison, run: Run) -> bool:
    """Record what is new about a run: a training that a job has completed, or that all stages are finished."""
    plan = comparison.plan(run)
    has_trained = record_training(plan)
    if not plan.unfinished:
        comparison.write_part(run)
        return not comparison.unfinished([run])
    return has_trained


def next_runs(comparison: Comparison) -> tuple[Run, ...]:
    """Return the runs of the next phase, after recording the runs that other processes have advanced."""
    runs = comparison.runs_of_next_phase()
    while [run for run in runs if run.kind != "check" and _record_run(comparison, run)]:
        runs = comparison.runs_of_next_phase()
    return runs


@dataclass(frozen=True)
class _Phase:
    """Runs that can be started now. Each run is one element of the job arrays; the elements are counted from 1.

    Attributes:
        name: `tuning` or `runs`.
        folder: folder with a link to the folder of each run, named by the number of the run's element. Every submission
            has its own folder, because elements of an earlier array may still be there.
        to_train: elements whose training is not complete.
        to_evaluate: elements with stages after training, whether or not their training is complete.
    """

    name: str
    folder: Path
    to_train: list[int]
    to_evaluate: list[int]


@dataclass(frozen=True)
class _Job:
    """A job that is yet to be submitted.

    Attributes:
        name: name of the job for people.
        command: the command that submits the job.
        script: the shell script of the job, which `command` reads from standard input, because Linux limits the length
            of a word of a command; None if `command` names a file.
        condition: the condition of the job's dependency, such as `afterany`.
        after: names of the jobs that the condition is about.
    """

    name: str
    command: tuple[str, ...]
    script: str | None = None
    condition: str = ""
    after: tuple[str, ...] = ()

    def words(self, numbers: Mapping[str, str]) -> tuple[str, ...]:
        """Return the command with the dependency on other jobs, whose numbers are given by their names."""
        if not self.after:
            return self.command
        return (*self.command, f"--dependency={':'.join((self.condition, *(numbers[name] for name in self.after)))}")


@dataclass(frozen=True)
class SlurmJobs:
    """The Slurm jobs that train and evaluate the runs of a comparison, phase by phase.

    The first job array trains the phase's runs by `launch/slurm/submit.sh`. The second array evaluates each run after
    its training. A last job waits for all elements and continues the comparison.

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

    def submit(self, runs: Sequence[Run], line: ProgressLine) -> None:
        """Submit the jobs that finish runs of the next phase, and the job that continues the comparison afterwards.

        Raises:
            RunFailure: a mask cannot be made, or this is the job that continues the comparison, and the other jobs have
                not finished any run.
            UserError: Slurm refuses a job, or another command works on a run. The message names the jobs that were
                submitted before.
        """
        phase = self._phase(runs)
        parts = {"train": phase.to_train, "evaluate": phase.to_evaluate}
        todo = {what: sorted(runs[element - 1].name for element in part) for what, part in parts.items()}
        # Refuse to submit the same jobs again and again when none of the runs makes progress.
        last = Submission.read(self.comparison)
        if last.is_continued_here and todo == last.todo:
            reasons = "; ".join(f"{run.name}: {_reason(self.comparison.plan(run))}" for run in runs)
            raise RunFailure(f"the jobs {', '.join(last.jobs[:-1])} have not finished any run: {reasons}")
        self._prepare(phase, runs, line)
        # The variables that Slurm has set for this job must not reach the jobs that are submitted.
        kept = [name for name in os.environ if name == "SLURM_CONF" or not name.startswith("SLURM_")]
        environment = {name: os.environ[name] for name in kept}
        submission = Submission((), todo)
        numbers: dict[str, str] = {}
        for job in self._jobs(phase):
            # Jobs that depend on each other must be on the same cluster.
            command = (*job.words(numbers), *submission.cluster_option)
            try:
                printed = _output(*command, script=job.script, env=environment, failure="the job was not submitted: ")
            except UserError as error:
                if not submission.jobs:
                    raise
                hint = f"to end the jobs that were submitted before: {submission.scancel(submission.jobs)}"
                raise UserError(f"{error}; {hint}") from error
            # sbatch prints `NUMBER;CLUSTER` if there are several clusters.
            numbers[job.name], _, cluster = printed.strip().partition(";")
            submission = Submission(tuple(numbers.values()), todo, cluster)
            # Every job is recorded at once: a later job may be refused.
            write_record(submission, _submission_file(self.comparison), indent=2)
        listed = ", ".join(submission.jobs)
        line.print(f"submitted jobs {listed}; the last job continues when the other jobs have ended")

    def show(self) -> None:
        """Print sbatch's command lines and scripts of the next phase, without changing anything."""
        comparison = self.comparison
        runs = comparison.unfinished(comparison.tuning_runs()) or comparison.unfinished(comparison.whole_runs())
        if runs:
            _check_submit_script()
            for job in self._jobs(self._phase(runs)):
                _show(job)

    def _phase(self, runs: Sequence[Run]) -> _Phase:
        """Return the phase of unfinished runs."""
        name = runs[0].name.partition("/")[0]
        plans = [self.comparison.plan(run) for run in runs]
        to_train = [element for element, plan in enumerate(plans, start=1) if plan.train in plan.unfinished]
        to_evaluate = [element for element, run in enumerate(runs, start=1) if run.is_analyzed]
        folders = (self.comparison.folder / "slurm" / f"{name}-{number}" for number in count(1))
        return _Phase(name, next(folder for folder in folders if not folder.exists()), to_train, to_evaluate)

    def _prepare(self, phase: _Phase, runs: Sequence[Run], line: ProgressLine) -> None:
        """Make masks, model files, and the links through which the elements of job arrays find their runs."""
        phase.folder.mkdir(parents=True)
        for element, run in enumerate(runs, start=1):
            plan = self.comparison.plan(run)
            if element in phase.to_train:
                plan.prepare()
                line.print(run.name)
                run_stages(plan, line, before="train")
            plan.files.slurm.mkdir(exist_ok=True)
            (phase.folder / str(element)).symlink_to(os.path.relpath(plan.files.folder, phase.folder))

    def _jobs(self, phase: _Phase) -> list[_Job]:
        """Return all jobs of a phase, in the order in which they are submitted."""
        trained_first = [element for element in phase.to_evaluate if element in phase.to_train]
        trained_already = [element for element in phase.to_evaluate if element not in phase.to_train]
        jobs = []
        if phase.to_train:
            jobs.append(_Job("TRAINING", self._training(phase)))
        if trained_first:
            command = (*self._evaluation(phase, trained_first), "--kill-on-invalid-dep=yes")
            jobs.append(_Job("EVALUATION", command, self._evaluation_script(phase), "aftercorr", ("TRAINING",)))
        if trained_already:
            jobs.append(_Job("REST", self._evaluation(phase, trained_already), self._evaluation_script(phase)))
        # The last job runs whether or not the jobs before it succeed.
        command, script = self._continuation(phase), self._continuation_script()
        return [*jobs, _Job("NEXT", command, script, "afterany", tuple(job.name for job in jobs))]

    def _training(self, phase: _Phase) -> tuple[str, ...]:
        """Return the command that submits the array that trains."""
        inputs = () if self.options.container == "none" else self.inputs
        return (
            *(str(SUBMIT_SCRIPT), "--parsable", *self._array(phase, "train", phase.to_train)),
            *self.options.words,
            *(word for path in inputs for word in ("--mount", str(path))),
            *("--run-dir", f"{phase.folder}/%a", "--", f"{phase.folder}/%a/run.yaml"),
        )

    def _evaluation(self, phase: _Phase, elements: Sequence[int]) -> tuple[str, ...]:
        """Return the command that submits an array that runs all stages after training, each element on one node."""
        return (
            *("sbatch", "--parsable", *self._array(phase, "evaluate", elements)),
            *("--requeue", "--open-mode=append", f"--chdir={self.cwd}"),
            *(*self.options.sbatch, "--nodes=1", "--ntasks-per-node=1"),
        )

    def _evaluation_script(self, phase: _Phase) -> str:
        """Return the script of the array that runs all stages after training."""
        # The link of the element leads to the folder of the run, whose path is the name of the run.
        link = f'{shlex.quote(str(phase.folder))}/"$SLURM_ARRAY_TASK_ID"'
        run = f'"$(realpath --relative-to={shlex.quote(str(self.comparison.folder))} {link})"'
        return _script(f"{shlex.join(self._python(*_COMPARE, *self.arguments, '--run'))} {run}")

    def _continuation(self, phase: _Phase) -> tuple[str, ...]:
        """Return the command that submits the job that continues the comparison."""
        return (
            *("sbatch", "--parsable", f"--job-name={self.comparison.suite.name}-{phase.name}-next"),
            *("--open-mode=append", f"--output={self.comparison.folder}/slurm/%j.log", f"--chdir={self.cwd}"),
            *(*self.options.for_any_job, "--nodes=1", "--ntasks=1"),
        )

    def _continuation_script(self) -> str:
        """Return the script of the job that continues the comparison."""
        return _script(shlex.join((sys.executable, *_COMPARE, *self.arguments, "--slurm", "--", *self.options.words)))

    def _array(self, phase: _Phase, what: str, elements: Sequence[int]) -> tuple[str, ...]:
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


def _script(command: str) -> str:
    """Return the shell script of a job that runs a command line."""
    return f"#!/bin/sh\nexec {command}\n"


def _show(job: _Job) -> None:
    """Print the command line that submits a job; names of other jobs stand for their numbers."""
    words = job.words({name: name for name in job.after})
    if job.script is None:
        print(_output(words[0], "--dry-run", *words[1:]), end="")
    else:
        print(f"{shlex.join(words)} <<'END'\n{job.script}END")


def check_slurm() -> None:
    """Check that jobs can be submitted from here.

    Raises:
        UserError: sbatch or the script that submits training is missing.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: sbatch is missing: start the command on a node of a Slurm cluster")
    _check_submit_script()


def _check_submit_script() -> None:
    if not SUBMIT_SCRIPT.is_file():
        raise UserError(f"--slurm: {SUBMIT_SCRIPT} is missing: start launch/compare.sh of a checkout of the repository")


def _output(*command: str, failure: str = "", script: str | None = None, env: Mapping[str, str] | None = None) -> str:
    """Return what a command prints.

    Args:
        command: the command.
        failure: what has failed, the beginning of the error.
        script: standard input of the command; by default the standard input of this process.
        env: environment of the command; by default the environment of this process.

    Raises:
        UserError: the command cannot be started, or fails. The message ends with the command's last words.
    """
    try:
        result = subprocess.run(command, input=script, env=env, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"{failure}cannot start {command[0]}: {error.strerror}") from error
    if result.returncode != 0:
        raise UserError(failure + (result.stderr.strip().splitlines() or ["no reason given"])[-1])
    return result.stdout
