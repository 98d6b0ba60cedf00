"""A comparison in Slurm jobs: submit the jobs of the next phase and record the trainings that jobs have completed."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.plan import RunPlan
from maskmoe.comparison.runs import Run, tuning_runs
from maskmoe.comparison.slurm_jobs import Jobs, Phase
from maskmoe.errors import RunFailure, UserError
from maskmoe.workflow.failure import explain_failure
from maskmoe.workflow.json_records import read_record, write_record
from maskmoe.workflow.lock import locked
from maskmoe.workflow.paths import SUBMIT_SCRIPT, short_path
from maskmoe.workflow.process import read_log
from maskmoe.workflow.progress import ProgressLine
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.runner import Runner


@dataclass(frozen=True)
class Submission:
    """The jobs of the newest submission, kept in a file.

    Attributes:
        jobs: numbers of the jobs; the last job continues the comparison.
        todo: names of the runs that the jobs were to train and to evaluate, see `Phase.todo`.
    """

    jobs: tuple[str, ...]
    todo: dict[str, list[str]]

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
    listed = _output(*command, failure="cannot ask Slurm for its queue: ").split()
    if queued := [job for job in submission.jobs if job in listed]:
        raise UserError(
            f"jobs of this comparison are in Slurm's queue, and go on by themselves; to end the jobs: "
            f"scancel {' '.join(reversed(queued))}"
        )


def _reason(plan: RunPlan) -> str:
    """Return why the jobs of a run failed."""
    logs = sorted(plan.files.slurm.glob("*.log"), key=lambda log: log.stat().st_mtime_ns)
    if not logs:
        return "no job has started the run"
    reason = explain_failure(1, read_log(logs[-1])).message
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
        if not record.is_started(stage) or record.is_finished(stage) or record.reason_to_repeat(stage):
            return False
        record.finish(stage, plan.history().training_seconds)
    return True


def next_runs(comparison: Comparison) -> tuple[Run, ...]:
    """Return the runs of the next phase, after recording the trainings that jobs have completed."""
    runs = comparison.runs_of_next_phase()
    while [run for run in runs if run.kind != "check" and record_training(comparison.plan(run))]:
        runs = comparison.runs_of_next_phase()
    return runs


def _make_phase(comparison: Comparison, runs: Sequence[Run]) -> Phase:
    """Return the phase of unfinished runs."""
    name = runs[0].name.partition("/")[0]
    plans = [comparison.plan(run) for run in runs]
    to_train = [element for element, plan in enumerate(plans, start=1) if plan.train in plan.unfinished]
    to_evaluate = [element for element, run in enumerate(runs, start=1) if run.is_analyzed]
    return Phase(name, comparison.folder / "slurm" / name, runs, to_train, to_evaluate)


def submit_phase(jobs: Jobs, runs: Sequence[Run], line: ProgressLine) -> None:
    """Submit the jobs that finish runs of the next phase, and the job that continues the comparison afterwards.

    Raises:
        RunFailure: this is the job that continues the comparison, and the other jobs have not finished any run.
        StageError: a mask cannot be made.
        UserError: Slurm refuses a job, or another command works on a run.
    """
    comparison = jobs.comparison
    phase = _make_phase(comparison, runs)
    # Refuse to submit the same jobs again and again when none of the runs makes progress.
    last = Submission.read(comparison)
    if last.is_continued_here and phase.todo == last.todo:
        reasons = "; ".join(f"{run.name}: {_reason(comparison.plan(run))}" for run in runs)
        raise RunFailure(f"the jobs {', '.join(last.jobs[:-1])} have not finished any run: {reasons}")
    _prepare_runs(comparison, phase, line)
    numbers: list[str] = []

    def submit_and_record(_name: str, command: Sequence[str]) -> str:
        numbers.append(_submit(command))
        # Every job is recorded at once: a later job may be refused.
        write_record(Submission(tuple(numbers), phase.todo), _submission_file(comparison), indent=2)
        return numbers[-1]

    jobs.submit(phase, submit_and_record)
    line.print(f"submitted jobs {', '.join(numbers)}; the last job continues when the other jobs have ended")


def _prepare_runs(comparison: Comparison, phase: Phase, line: ProgressLine) -> None:
    """Make masks, model files, and the links through which the elements of job arrays find their runs."""
    shutil.rmtree(phase.folder, ignore_errors=True)
    phase.folder.mkdir(parents=True)
    for element, run in enumerate(phase.runs, start=1):
        plan = comparison.plan(run)
        if element in phase.to_train:
            plan.prepare()
            line.print(run.name)
            with locked(plan.files.lock) as lock:
                Runner(plan, RunRecord(plan.files.record), line, lock).prepare("train")
        plan.files.slurm.mkdir(exist_ok=True)
        (phase.folder / str(element)).symlink_to(os.path.relpath(plan.files.folder, phase.folder))


def show_phase(jobs: Jobs) -> None:
    """Print sbatch's command lines of the next phase, without changing anything."""
    comparison = jobs.comparison
    runs = comparison.unfinished(tuning_runs(comparison.suite)) or comparison.unfinished(comparison.whole_runs())
    if runs:
        _check_submit_script()
        jobs.submit(_make_phase(comparison, runs), _show)


def _show(name: str, command: Sequence[str]) -> str:
    """Print sbatch's command line and return the job's name, which stands for the number of the job."""
    if command[0] == str(SUBMIT_SCRIPT):
        print(_output(command[0], "--dry-run", *command[1:]), end="")
    else:
        print(shlex.join(command))
    return name


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


def _submit(command: Sequence[str]) -> str:
    """Submit a job and return its number."""
    # The variables that Slurm has set for this job must not reach the jobs that are submitted.
    kept = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith("SLURM_")}
    # sbatch prints `NUMBER;CLUSTER` if there are several clusters.
    return _output(*command, env=kept, failure="the job was not submitted: ").strip().partition(";")[0]


def _output(*command: str, failure: str = "", env: Mapping[str, str] | None = None) -> str:
    """Return what a command prints; raise a UserError with its last words if the command fails."""
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(failure + (result.stderr.strip().splitlines() or ["no reason given"])[-1])
    return result.stdout
