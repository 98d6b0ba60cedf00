"""Runs a training entry point on this machine: as the rank that this process is, or under torchrun."""

import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import NoReturn

from maskmoe.command_line import ranges
from maskmoe.errors import UserError
from maskmoe.launch.command import ENTRY_POINT_ENVIRONMENT, Command, standalone_command, unset_variables
from maskmoe.launch.devices import find_devices
from maskmoe.launch.supervisor import Supervisor

_PROCESSES_FLAG = "--nproc-per-node"
_SINGLE_PROCESS_FLAGS = ("-h", "--help", "--help-all", "--check")
_SHUTDOWN_TIMEOUT = 600  # seconds for a last checkpoint after a signal


def run_entry_point(entry: Sequence[str], saves_checkpoints: bool) -> NoReturn:
    """Run an entry point with the arguments of `sys.argv`, and exit with its exit code.

    If torchrun started this process, the process becomes the rank. Otherwise torchrun is started with one rank for each
    GPU, or one rank without GPUs; `--nproc-per-node N` as the first argument sets another number. `--help` and
    `--check` need no ranks, so torchrun is not started for them.

    Args:
        entry: what every rank runs, see `maskmoe.launch.command.entry_point`.
        saves_checkpoints: whether the entry point saves a checkpoint when a signal stops it.

    Raises:
        UserError: `--nproc-per-node` has no valid value.
    """
    processes, arguments = split_processes(sys.argv[1:])
    if "RANK" in os.environ or any(word.partition("=")[0] in _SINGLE_PROCESS_FLAGS for word in arguments):
        # Replace this program: Megatron's helper processes import the main module, which must be the entry point.
        os.execv(sys.executable, [sys.executable, "-P", "-u", *entry, *arguments])
    options = ("--local-addr", "127.0.0.1", "--shutdown-timeout", str(_SHUTDOWN_TIMEOUT))
    words = standalone_command(processes or find_devices().num_gpus or 1, entry, arguments, options)
    supervisor = Supervisor(_SHUTDOWN_TIMEOUT, saves_checkpoints)
    sys.exit(supervisor.run(Command(words, unset_variables(ENTRY_POINT_ENVIRONMENT, os.environ))))


def split_processes(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """Split a command line into the value of a leading `--nproc-per-node` and the remaining arguments.

    Returns:
        The number of processes, None if the first argument is another one; and the remaining arguments.

    Raises:
        UserError: the value is missing or is not a positive whole number.
    """
    flag, equals, value = words[0].partition("=") if words else ("", "", "")
    if flag != _PROCESSES_FLAG:
        return None, list(words)
    remaining = list(words[1:])
    if not equals:
        value = remaining.pop(0) if remaining else ""
    try:
        return ranges.RANKS_OF_NODE(value), remaining
    except ArgumentTypeError as error:
        raise UserError(f"{_PROCESSES_FLAG} needs a positive whole number, not {value!r}") from error
