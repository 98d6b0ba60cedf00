"""A comparison as Slurm jobs: submits those of the next phase, and notes what jobs have done."""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from maskmoe.cli import atomic_output
from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.plan import RunPlan
from maskmoe.comparison.runs import Run, tuning_runs
from maskmoe.comparison.slurm_jobs import SUBMIT, Jobs, Phase, Submit
from maskmoe.errors import RunFailure, UserError
from maskmoe.workflow.failure import explain_failure
from maskmoe.workflow.lock import locked
from maskmoe.workflow.progress import ProgressLine
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.runner import Runner, read_log
from maskmoe.workflow.stage import short_path


@dataclass(frozen=True)
class Submission:
    """The jobs that were submitted last, kept in a file.

    Attributes:
        jobs: their numbers; the last is the one that goes on.
        todo: what there was to do, see `Phase`.
    """

    jobs: tuple[str, ...]
    todo: dict[str, list[str]]

    @classmethod
    def read(cls, path: Path) -> "Submission":
        """Read the file; without one, nothing was submitted.

        Raises:
            UserError: it is damaged.
        """
        if not path.exists():
            return cls((), {})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(content["jobs"]), content["todo"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it when no job of the comparison is left") from error

    def write(self, path: Path) -> None:
        """Write the file."""
        with atomic_output(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def submission_file(comparison: Comparison) -> Path:
    """Where the numbers of the comparison's jobs are."""
    return comparison.folder / "slurm" / "submission.json"


def refuse_while_jobs_work(comparison: Comparison) -> None:
    """Two that train one run would spoil each other's checkpoints.

    Raises:
        UserError: jobs of this comparison are in the queue; the job that goes on from the others is not counted.
    """
    jobs = Submission.read(submission_file(comparison)).jobs
    if not jobs or is_continuation(jobs) or shutil.which("squeue") is None:
        return
    states = "PENDING,RUNNING,SUSPENDED,CONFIGURING"
    command = ("squeue", "--noheader", "--format=%F", f"--states={states}", f"--user={os.getuid()}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"cannot ask Slurm for its queue: {_last_line(result.stderr)}")
    if at_work := [job for job in jobs if job in result.stdout.split()]:
        raise UserError(
            f"jobs of this comparison are in Slurm's queue, and go on by themselves; to end them: "
            f"scancel {' '.join(reversed(at_work))}"
        )


def is_continuation(jobs: Sequence[str]) -> bool:
    """Whether this process belongs to the last of the jobs."""
    return bool(jobs) and os.environ.get("SLURM_JOB_ID") == jobs[-1]


def refuse_without_progress(comparison: Comparison, phase: Phase) -> None:
    """What has failed once as a whole would be submitted again and again.

    Raises:
        RunFailure: this is the job that goes on, and none of what was to do was done.
    """
    last = Submission.read(submission_file(comparison))
    if not is_continuation(last.jobs) or phase.todo != last.todo:
        return
    reasons = "; ".join(f"{run.name}: {_reason(comparison.plan(run))}" for run in phase.elements.values())
    raise RunFailure(f"the jobs {', '.join(last.jobs[:-1])} have finished nothing: {reasons}")


def _reason(plan: RunPlan) -> str:
    logs = sorted(plan.files.slurm.glob("*.log"), key=lambda log: log.stat().st_mtime_ns)
    if not logs:
        return "no job has begun it"
    reason = explain_failure(1, read_log(logs[-1])).message
    # What a stage says already names its own log.
    return reason if "(full output: " in reason else f"{reason} (full output: {short_path(logs[-1])})"


def note_training(plan: RunPlan) -> bool:
    """Note in the run's record that a job has completed its training; whether that is news.

    Raises:
        UserError: another command is at work on the run.
    """
    if not (plan.is_prepared and any(plan.files.slurm.glob("*.finished"))):
        return False
    with locked(plan.files.lock):
        record, stage = RunRecord(plan.files.record), plan.train()
        if not record.is_started(stage) or record.is_finished(stage) or record.reason_to_redo(stage):
            return False
        record.finish(stage, plan.history().training_seconds)
    return True


def next_runs(comparison: Comparison) -> tuple[Run, ...]:
    """The runs that can be taken up now, when it is noted what jobs have trained."""
    runs = comparison.runs_of_next_phase()
    while [run for run in runs if run.kind != "check" and note_training(comparison.plan(run))]:
        runs = comparison.runs_of_next_phase()
    return runs


def make_phase(comparison: Comparison, runs: Sequence[Run]) -> Phase:
    """The phase of unfinished runs."""
    name = runs[0].name.partition("/")[0]
    elements = dict(enumerate(runs, start=1))
    to_train = {element: run for element, run in elements.items() if _needs_training(comparison.plan(run))}
    to_evaluate = {element: run for element, run in elements.items() if run.is_analyzed}
    return Phase(name, comparison.folder / "slurm" / name, to_train, to_evaluate)


def _needs_training(plan: RunPlan) -> bool:
    if not (plan.files.record.exists() and plan.is_prepared):
        return True
    record = RunRecord(plan.files.record)
    first = next(stage.name for stage in (make_stage() for make_stage in plan.stages) if not record.is_finished(stage))
    return first in ("mask", "train")


def prepare(comparison: Comparison, phase: Phase, line: ProgressLine) -> None:
    """Make all that jobs need: masks, model files, the links that elements of arrays find their runs by.

    Raises:
        StageError: a mask cannot be made.
        UserError: another command is at work on a run.
    """
    if phase.folder.exists():
        shutil.rmtree(phase.folder)
    phase.folder.mkdir(parents=True)
    for element, run in phase.elements.items():
        plan = comparison.plan(run)
        if element in phase.to_train:
            plan.prepare()
            line.print(run.name)
            with locked(plan.files.lock) as lock:
                Runner(plan, RunRecord(plan.files.record), line, lock).prepare("train")
        plan.files.slurm.mkdir(exist_ok=True)
        link = phase.folder / str(element)
        link.symlink_to(os.path.relpath(plan.files.folder, phase.folder))


def _recording(path: Path, phase: Phase) -> Submit:
    """Submits jobs, each of which is noted at once.

    Args:
        path: of the submission file.
        phase: that the jobs are for.
    """
    jobs: list[str] = []

    def submit(_name: str, command: Sequence[str]) -> str:
        jobs.append(_submit(command))
        Submission(tuple(jobs), phase.todo).write(path)
        return jobs[-1]

    return submit


def _show(name: str, command: Sequence[str]) -> str:
    """Print sbatch's command line instead of submitting the job."""
    if command[0] == str(SUBMIT):
        result = subprocess.run([command[0], "--dry-run", *command[1:]], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise UserError(_last_line(result.stderr))
        print(result.stdout, end="")
    else:
        print(shlex.join(command))
    return name


def submit_phase(
    comparison: Comparison, runs: Sequence[Run], jobs: Callable[[Phase], Jobs], line: ProgressLine
) -> None:
    """Submit all that brings runs to their ends, and the job that goes on after that.

    Args:
        comparison: that the runs belong to.
        runs: of the next phase.
        jobs: makes the command lines.
        line: shows how far it is.

    Raises:
        RunFailure: this is the job that goes on, and none of what was to do was done.
        StageError: a mask cannot be made.
        UserError: Slurm refuses a job, or another command is at work on a run.
    """
    phase = make_phase(comparison, runs)
    refuse_without_progress(comparison, phase)
    prepare(comparison, phase, line)
    path = submission_file(comparison)
    jobs(phase).submit(_recording(path, phase))
    line.print(f"submitted jobs {', '.join(Submission.read(path).jobs)}; the last goes on when the others have ended")


def show_phase(comparison: Comparison, jobs: Callable[[Phase], Jobs]) -> None:
    """Print the command lines of sbatch that would be next, and do nothing."""
    runs = comparison.unfinished(tuning_runs(comparison.suite)) or comparison.unfinished(comparison.whole_runs())
    if runs:
        jobs(make_phase(comparison, runs)).submit(_show)


def check_sbatch() -> None:
    """Refuse to start where nothing can be submitted.

    Raises:
        UserError: there is no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: there is no sbatch here: start this on a node of a Slurm cluster")


def _submit(command: Sequence[str]) -> str:
    # What Slurm has set for this job is not for those that it submits.
    kept = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith("SLURM_")}
    result = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"the job was not submitted: {_last_line(result.stderr)}")
    # `NUMBER;CLUSTER` where there are several clusters.
    return result.stdout.strip().partition(";")[0]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
