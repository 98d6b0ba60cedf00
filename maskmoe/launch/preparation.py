"""Checks a run before its start, and writes what its run folder keeps about the start."""

import os
import subprocess
import sys
from pathlib import Path

from maskmoe.command_line.run_tool import EXIT_BAD_INPUT
from maskmoe.errors import UserError, counted
from maskmoe.launch.command import RUN_ENVIRONMENT, Command, entry_point, split_program, unset_variables
from maskmoe.launch.devices import Devices
from maskmoe.launch.journal import Journal, Kind
from maskmoe.launch.model_file import Flags, flag_words, override
from maskmoe.launch.options import Options
from maskmoe.processes.interruption import EXIT_HANG, EXIT_REQUEUE


def check(
    flags: Flags, ranks: int, devices: Devices | None, to_console: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run pretraining's `--check`, which prints errors to stderr and everything else that it finds to stdout.

    Args:
        flags: the flags of the run.
        ranks: the number of ranks of the run.
        devices: the devices of this machine if it will run the ranks. None assumes GPUs unless the flags say otherwise.
        to_console: print what the check finds; else print its notes only, and return its report as `stdout`.
    """
    if devices is not None and not devices.num_gpus:
        flags = override({"distributed-backend": ("gloo",)}, flags)
    program, flags = split_program(flags)
    words = (sys.executable, *entry_point("pretrain", program), "--check", str(ranks), *flag_words(flags))
    environment = {**os.environ, **unset_variables(RUN_ENVIRONMENT, os.environ)}
    stdout = None if to_console else subprocess.PIPE
    checked = subprocess.run(words, env=environment, stdout=stdout, text=True, check=False)
    for line in (checked.stdout or "").splitlines():
        if line.startswith("note: "):
            print(line, flush=True)
    return checked


def record_start(options: Options, log_folder: Path, command: Command, report: str | None) -> None:
    """Write torchrun's command line, and the report of the check, into the run folder.

    Args:
        options: the launcher's options.
        log_folder: the folder of this node's logs, which is made.
        command: torchrun's command line.
        report: the report of the check; None if there is none.

    Raises:
        UserError: the run folder cannot be written.
    """
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
        (log_folder / "command.txt").write_text(f"{command}\n", encoding="utf-8")
        if report is not None:
            (options.run_dir / "check.txt").write_text(report, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot make {log_folder}: {error.strerror}; choose another --run-dir") from error


def record_launch(journal: Journal, ranks: int, nodes: int) -> None:
    """Write into the run's journal that torchrun starts the ranks, which may fail before they write anything.

    Args:
        journal: the journal.
        ranks: the number of ranks of the run.
        nodes: the number of nodes of the run.
    """
    text = f"the launcher starts {counted(ranks, 'rank')} on {counted(nodes, 'node')}"
    journal.write(Kind.LAUNCHED, text, ranks=ranks, nodes=nodes)


def record_end(journal: Journal, exit_code: int) -> None:
    """Write the end of the ranks into the run's journal.

    Args:
        journal: the journal.
        exit_code: the exit code of the run.
    """
    texts = {
        0: "the training is complete",
        EXIT_BAD_INPUT: "the ranks refused their settings or files",
        EXIT_REQUEUE: "the run stopped on request",
        EXIT_HANG: "the run hung",
    }
    journal.write(Kind.ENDED, texts.get(exit_code, f"the run failed with exit code {exit_code}"), exit_code=exit_code)
