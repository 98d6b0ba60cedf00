"""Runs one node's ranks of a training run, and keeps what the run folder says about the start."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from maskmoe.command_line.run_tool import EXIT_BAD_INPUT
from maskmoe.errors import UserError, counted
from maskmoe.files.run_folder import Journal, Kind
from maskmoe.launch.command import (
    RUN_ENVIRONMENT,
    Command,
    entry_point,
    split_program,
    torchrun_command,
    unset_variables,
)
from maskmoe.launch.model_file import Flags, flag_words
from maskmoe.launch.network import route_to
from maskmoe.launch.options import Meeting, Options
from maskmoe.launch.supervisor import Supervisor
from maskmoe.processes.interruption import EXIT_HANG, EXIT_REQUEUE

_ENDS = {
    0: "the training is complete",
    EXIT_BAD_INPUT: "the ranks refused their settings or files",
    EXIT_REQUEUE: "the run stopped on request",
    EXIT_HANG: "the run hung",
}


@dataclass(frozen=True)
class NodeRun:
    """One node's part of one start of the ranks.

    Attributes:
        options: the launcher's options.
        meeting: how this node meets the other nodes.
        flags: the flags of the ranks.
        processes: the number of ranks of this node.
        ranks: the number of ranks of all nodes.
        environment: variables of the ranks, beside those that all runs have.
    """

    options: Options
    meeting: Meeting
    flags: Flags
    processes: int
    ranks: int
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> Command:
        """Torchrun's command line."""
        route = route_to(*self.meeting.endpoint) if self.meeting.endpoint else None
        command = torchrun_command(self.options, self.meeting, self.flags, self.processes, route, os.environ)
        return Command(command.words, {**command.environment, **self.environment})

    def train(self, supervisor: Supervisor, must_end: Callable[[], bool] = lambda: False) -> int:
        """Run the ranks to their end, and return the exit code of the run.

        Args:
            supervisor: runs torchrun.
            must_end: see `Supervisor.run`.

        Raises:
            UserError: the run folder cannot be written.
        """
        command = self.command
        folder = self.options.log_folder(self.meeting.node_rank)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "command.txt").write_text(f"{command}\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error.strerror}; choose another --run-dir") from error
        ranks = counted(self.processes, "rank")
        say(str(command) if "verbose" in self.flags else f"starting {ranks}; everything is in {self.options.run_dir}")
        nodes = self.meeting.nodes
        text = f"the launcher starts {counted(self.ranks, 'rank')} on {counted(nodes, 'node')}"
        self._journal.write(Kind.LAUNCHED, text, ranks=self.ranks, nodes=nodes)
        return supervisor.run(command, must_end)

    def record_end(self, exit_code: int) -> None:
        """Write into the run's journal that the run has ended with an exit code."""
        text = _ENDS.get(exit_code, f"the run failed with exit code {exit_code}")
        self._journal.write(Kind.ENDED, text, exit_code=exit_code)

    @property
    def _journal(self) -> Journal:
        """The journal, in which the first node writes for all nodes, so that it has each start once."""
        return Journal(None if self.meeting.node_rank else self.options.run_dir)


def check(flags: Flags, ranks: int, shows_report: bool = True) -> int:
    """Check the run, which prints errors to stderr and a report to stdout; return the exit code.

    Args:
        flags: the flags of the run.
        ranks: the number of ranks of the run.
        shows_report: whether to print the report, or only the errors.
    """
    program, flags = split_program(flags)
    words = (sys.executable, *entry_point("check", program), "--check", str(ranks), *flag_words(flags))
    environment = {**os.environ, **unset_variables(RUN_ENVIRONMENT, os.environ)}
    stdout = None if shows_report else subprocess.DEVNULL
    return subprocess.run(words, env=environment, stdout=stdout, check=False).returncode


def say(text: str) -> None:
    """Print a line of the launcher at once, also into a log file."""
    print(f"launch: {text}", flush=True)
