"""Runs steps one after the other, each with a time limit, and writes results and page after each step."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psutil
from pydantic import ValidationError

from gpu_campaign.page import render_page
from gpu_campaign.results import Campaign, Findings, Status, StepResult
from gpu_campaign.step import Command, Context, Step
from maskmoe.files.outputs import write_text
from maskmoe.processes.interruption import end_with_parent

_LINES_OF_END, _CHARACTERS_OF_END = 60, 6000
_SECONDS_TO_REPORT = 10
# Each process computes with one thread, because several steps start several processes.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}

Say = Callable[[str], None]


class StepError(Exception):
    """A command of a step failed; the text says why."""


def run_campaign(
    steps: Sequence[Step], context: Context, seconds: float, say: Say, only: Collection[str] | None = None
) -> Campaign:
    """Run steps, and return what they and earlier calls found. A failed step does not stop the others.

    Args:
        steps: the steps of a whole campaign.
        context: where the campaign runs.
        seconds: the time for all steps, which the steps share. A step may also use the time that steps before it left.
            The last step may take about 20 s more, to report and to be read.
        say: prints a line of progress.
        only: the names of the steps to run; None for all. For the other steps, `campaign.json` keeps the results of
            earlier calls with the same commit and GPUs.
    """
    started, start = datetime.now(UTC), time.monotonic()
    chosen = [step for step in steps if only is None or step.name in only]
    results = _earlier_results(context)
    for step in chosen:
        results.pop(step.name, None)
    total, deadline = sum(step.share for step in chosen), start

    def campaign() -> Campaign:
        ended = tuple(results[step.name] for step in steps if step.name in results)
        return Campaign(
            ran_on_gpu=not context.is_dry_run,
            statement=_statement(context),
            commit=_commit(context.root),
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - start, 1),
            is_complete=len(ended) == len(steps),
            steps=ended,
        )

    for number, step in enumerate(chosen, start=1):
        title = f"[{number}/{len(chosen)}] {step.name}"
        say(f"{title}: {step.title}")
        deadline += seconds * step.share / total
        result = _run_step(step, context, deadline - time.monotonic())
        say(f"{title}: {result.status} in {result.seconds:.0f} s" + (f": {result.problem}" if result.problem else ""))
        results[step.name] = result
        _write(campaign(), context.output)
    return campaign()


def _earlier_results(context: Context) -> dict[str, StepResult]:
    """Return the results in `campaign.json` by name; none if they are of another commit or of other GPUs."""
    try:
        earlier = Campaign.model_validate_json((context.output / "campaign.json").read_text())
    except (FileNotFoundError, ValidationError):
        return {}
    is_same = (earlier.commit, earlier.statement) == (_commit(context.root), _statement(context))
    return {step.name: step for step in earlier.steps} if is_same else {}


def _run_step(step: Step, context: Context, limit: float) -> StepResult:
    """Run the commands of a step, and read what they found."""
    log = context.folder("logs") / f"{step.name}.log"
    log.write_bytes(b"")
    start, findings, problems = time.monotonic(), Findings(), list[str]()
    commands: Sequence[Command] = ()
    try:
        shutil.rmtree(context.folder(step.name))  # of an earlier campaign
        commands = step.commands(context)
        for command in commands:
            # A failed command does not stop the others, and what the others found is read.
            try:
                _run(command, context.root, log, start + limit - time.monotonic())
            except StepError as error:
                problems.append(str(error))
        findings = step.read(context)
        problems += findings.problems
    # An error in the code of a step must not stop the other steps. After a failed command, it is a consequence.
    except Exception as error:
        problems = problems or [f"{type(error).__name__}: {error}"]
    problem = "; ".join(problems) or None
    status = Status.FAILED if problem else Status.PASSED
    if step.measures and context.is_dry_run:
        status, findings = Status.FAILED if problem else Status.TRIED, Findings()
    return StepResult(
        name=step.name,
        title=step.title,
        status=status,
        seconds=round(time.monotonic() - start, 1),
        limit=round(max(0.0, limit), 1),
        problem=problem,
        commands=tuple(map(str, commands)),
        log=str(log.relative_to(context.output)),
        output_end=_end_of(log) if problem else "",
        findings=findings,
    )


def _run(command: Command, folder: Path, log: Path, limit: float) -> None:
    """Run a command in a folder, with its output appended to a log.

    Raises:
        StepError: the command failed, or ran longer than the limit in seconds.
    """
    if limit <= 0:
        raise StepError(f"no time was left for: {command}")
    with open(log, "ab") as output:
        output.write(f"$ {command}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command.words,
            cwd=folder,
            env={**os.environ, **_ENVIRONMENT, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
        )
        try:
            exit_code = process.wait(limit)
        except subprocess.TimeoutExpired:
            _interrupt(process)
            raise StepError(f"the time limit was reached after {limit:.0f} s in: {command}") from None
        finally:
            _kill(process)
    if exit_code:
        raise StepError(f"exit code {exit_code} of: {command}")


def _interrupt(process: subprocess.Popen) -> None:
    """Let a process report: when pytest is interrupted, it reports on the tests that have run. Kill its children."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_REPORT)
    _kill_all(children)


def _kill(process: subprocess.Popen) -> None:
    """Kill a process with all processes that it has started."""
    if process.poll() is None:
        family = psutil.Process(process.pid)
        _kill_all([family, *family.children(recursive=True)])
        process.wait()


def _kill_all(processes: Sequence[psutil.Process]) -> None:
    """Kill those of the processes that still exist."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _end_of(log: Path) -> str:
    """Return the last lines of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_OF_END:]
    return "\n".join(lines)[-_CHARACTERS_OF_END:]


def _write(campaign: Campaign, output: Path) -> None:
    """Write `campaign.json` and `campaign.md`, which replace those of the step before."""
    for name, text in (("campaign.json", campaign.model_dump_json(indent=2)), ("campaign.md", render_page(campaign))):
        write_text(output / name, text + "\n")


def _statement(context: Context) -> str:
    if context.is_dry_run:
        return "Dry run on the CPU: nothing ran on a GPU, and nothing was measured."
    return f"Ran on {context.devices.num_gpus} GPU(s)."


def _commit(root: Path) -> str | None:
    """Return the commit of the checkout, with `+` if files were changed."""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return completed.stdout.strip() or None
