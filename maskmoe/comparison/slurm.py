"""A comparison in Slurm jobs: submit the jobs of the next phase and record the trainings that jobs have completed."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.plan import RunPlan
from maskmoe.comparison.runs import Run, tuning_runs
from maskmoe.comparison.slurm_jobs import Jobs, Phase
from maskmoe.errors import RunFailure, UserError
from maskmoe.json_files import read_record, write_record
from maskmoe.paths import SUBMIT_SCRIPT, short_path
from maskmoe.workflow.failure import explain_failure
from maskmoe.workflow.lock import locked
from maskmoe.workflow.process import read_log
from maskmoe.workflow.progress import ProgressLine
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.runner import run_stages


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
    def read(cls, path: Path) -> "Submission":
        """Read the file; return an empty submission if the file does not exist.

        Raises:
            UserError: the file is damaged.
        """
        if not path.exists():
            return cls((), {})
        return read_record(cls, path, "delete the file when no job of the comparison is left")


def submission_file(comparison: Comparison) -> Path:
    """Return the file with the numbers of the comparison's jobs."""
    return comparison.folder / "slurm" / "submission.json"


def refuse_while_jobs_are_queued(comparison: Comparison) -> None:
    """Refuse to start while jobs may train the same runs, because both would write the same checkpoints.

    The job that continues the comparison may start: all other jobs have ended by then.

    Raises:
        UserError: jobs of this comparison are queued or running.
    """
    jobs = Submission.read(submission_file(comparison)).jobs
    if not jobs or _is_continuation(jobs) or shutil.which("squeue") is None:
        return
    states = "PENDING,RUNNING,SUSPENDED,CONFIGURING"
    command = ("squeue", "--noheader", "--format=%F", f"--states={states}", f"--user={os.getuid()}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"cannot ask Slurm for its queue: {_last_line(result.stderr)}")
    if queued := [job for job in jobs if job in result.stdout.split()]:
        raise UserError(
            f"jobs of this comparison are in Slurm's queue, and go on by themselves; to end the jobs: "
            f"scancel {' '.join(reversed(queued))}"
        )


def _is_continuation(jobs: Sequence[str]) -> bool:
    """Return whether this process belongs to the last of the jobs."""
    return bool(jobs) and os.environ.get("SLURM_JOB_ID") == jobs[-1]


def _refuse_without_progress(comparison: Comparison, phase: Phase) -> None:
    """Refuse to submit the same jobs again and again when none of the runs makes progress.

    Raises:
        RunFailure: this is the job that continues the comparison, and the other jobs have not finished any run.
    """
    last = Submission.read(submission_file(comparison))
    if not _is_continuation(last.jobs) or phase.todo != last.todo:
        return
    reasons = "; ".join(f"{run.name}: {_reason(comparison.plan(run))}" for run in phase.elements.values())
    raise RunFailure(f"the jobs {', '.join(last.jobs[:-1])} have not finished any run: {reasons}")


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


def next_runs(comparison: Comparison) -> tuple[Run, ...]:
    """Return the runs of the next phase, after recording the trainings that jobs have completed."""
    runs = comparison.runs_of_next_phase()
    while [run for run in runs if run.kind != "check" and record_training(comparison.plan(run))]:
        runs = comparison.runs_of_next_phase()
    return runs


def make_phase(comparison: Comparison, runs: Sequence[Run]) -> Phase:
    """Return the phase of unfinished runs."""
    name = runs[0].name.partition("/")[0]
    elements = dict(enumerate(runs, start=1))
    to_train = {element: run for element, run in elements.items() if _needs_training(comparison.plan(run))}
    to_evaluate = {element: run for element, run in elements.items() if run.is_analyzed}
    return Phase(name, comparison.folder / "slurm" / name, to_train, to_evaluate)


def _needs_training(plan: RunPlan) -> bool:
    """Return whether training, or a stage before it, is the first unfinished stage."""
    if not (plan.files.record.exists() and plan.is_prepared):
        return True
    record = RunRecord(plan.files.record)
    first = next(stage.name for stage in (make_stage() for make_stage in plan.stages) if not record.is_finished(stage))
    return first in ("mask", "train")


def _prepare_runs(comparison: Comparison, phase: Phase, line: ProgressLine) -> None:
    """Make masks, model files, and the links through which the elements of job arrays find their runs.

    Raises:
        RunFailure: a mask cannot be made.
        UserError: another command works on a run.
    """
    if phase.folder.exists():
        shutil.rmtree(phase.folder)
    phase.folder.mkdir(parents=True)
    for element, run in phase.elements.items():
        plan = comparison.plan(run)
        if element in phase.to_train:
            plan.prepare()
            line.print(run.name)
            run_stages(plan, line, before="train")
        plan.files.slurm.mkdir(exist_ok=True)
        link = phase.folder / str(element)
        link.symlink_to(os.path.relpath(plan.files.folder, phase.folder))


def submit_phase(
    comparison: Comparison, runs: Sequence[Run], jobs: Callable[[Phase], Jobs], line: ProgressLine
) -> None:
    """Submit the jobs that finish runs, and the job that continues the comparison afterwards.

    Args:
        comparison: the comparison to which the runs belong.
        runs: runs of the next phase.
        jobs: makes the command lines.
        line: shows the progress.

    Raises:
        RunFailure: a mask cannot be made, or this is the job that continues the comparison, and the other jobs have not
            finished any run.
        UserError: Slurm refuses a job, or another command works on a run.
    """
    phase = make_phase(comparison, runs)
    _refuse_without_progress(comparison, phase)
    _prepare_runs(comparison, phase, line)
    numbers: list[str] = []

    def submit_and_record(_name: str, command: Sequence[str]) -> str:
        numbers.append(_submit(command))
        # Every job is recorded at once: a later job may be refused.
        write_record(Submission(tuple(numbers), phase.todo), submission_file(comparison), indent=2)
        return numbers[-1]

    jobs(phase).submit(submit_and_record)
    line.print(f"submitted jobs {', '.join(numbers)}; the last job continues when the other jobs have ended")


def show_phase(comparison: Comparison, jobs: Callable[[Phase], Jobs]) -> None:
    """Print sbatch's command lines of the next phase, without changing anything."""
    runs = comparison.unfinished(tuning_runs(comparison.suite)) or comparison.unfinished(comparison.whole_runs())
    if runs:
        _check_submit_script()
        jobs(make_phase(comparison, runs)).submit(_show)


def _show(name: str, command: Sequence[str]) -> str:
    """Print sbatch's command line and return the job's name, which stands for the number of the job."""
    if command[0] == str(SUBMIT_SCRIPT):
        result = subprocess.run([command[0], "--dry-run", *command[1:]], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise UserError(_last_line(result.stderr))
        print(result.stdout, end="")
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
    result = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"the job was not submitted: {_last_line(result.stderr)}")
    # sbatch prints `NUMBER;CLUSTER` if there are several clusters.
    return result.stdout.strip().partition(";")[0]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
