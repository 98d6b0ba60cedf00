"""Builds the command lines of a run, and of any entry point, with their environment variables."""

import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from maskmoe.arguments.flags import flag_words, override
from maskmoe.errors import UserError
from maskmoe.files.run_folder import CHECKPOINTS, RUN_FOLDER_VARIABLE, TENSORBOARD
from maskmoe.launch.machine import GPU_ENVIRONMENT, Route
from maskmoe.launch.model_file import Flags
from maskmoe.launch.options import Meeting, Options
from maskmoe.processes.interruption import SIGNALS_THAT_END

# `python -m` would import files of the current folder instead of the packages with the same names.
ENTRY_POINT_ENVIRONMENT = {**GPU_ENVIRONMENT, "PYTHONSAFEPATH": "1"}
"""The environment variables of all processes of an entry point."""

# A node runs many processes, so each process computes with one thread. Unbuffered output appears at once, also in log
# files.
RUN_ENVIRONMENT = {**ENTRY_POINT_ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
"""The environment variables of all processes of a run."""


@dataclass(frozen=True)
class Command:
    """A command line with its environment variables.

    Attributes:
        words: The program and its arguments.
        environment: Variables that are set in addition to those of this process.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """Return one line that can be pasted into a shell."""
        variables = (f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return " ".join([*variables, shlex.join(self.words)])


def run_flags(options: Options, model_flags: Flags, user_flags: Flags) -> Flags:
    """Combine the flags of the model file and of the user, and add the run's folders.

    The user's flags override the model file's flags. By default, a run loads from the folder to which it saves, so that
    it resumes when it is started again. With `--save false`, a run has nothing to resume from, so it loads nothing.
    """
    save = {**model_flags, **user_flags}.get("save", (str(options.run_dir / CHECKPOINTS),))
    folders = {"save": save, "load": save, "tensorboard-dir": (str(options.run_dir / TENSORBOARD),)}
    verbose = {"verbose": ()} if options.verbose else {}
    return override({**folders, **model_flags, **verbose}, user_flags)


def torchrun_command(
    options: Options,
    meeting: Meeting,
    flags: Flags,
    processes: int,
    route: Route | None,
    environment: Mapping[str, str],
) -> Command:
    """Return the command that runs one node's ranks.

    Args:
        options: The launcher's options.
        meeting: How this node meets the other nodes.
        flags: The flags of the run.
        processes: The number of ranks on this node.
        route: The network route to the rendezvous; None if the route is unknown.
        environment: The variables of this process, which are not changed.
    """
    launcher_words = (
        *("--nnodes", str(meeting.nodes), "--nproc-per-node", str(processes)),
        *_rendezvous_words(meeting, route),
        *("--max-restarts", str(options.max_restarts), "--monitor-interval", "0.5"),
        *("--log-dir", str(options.log_folder(meeting.node_rank)), "--redirects", "3", "--tee", "3"),
        *("--signals-to-handle", ",".join(number.name for number in SIGNALS_THAT_END)),
        *("--shutdown-timeout", str(options.shutdown_timeout)),
    )
    variables = dict(RUN_ENVIRONMENT)
    if meeting.nodes > 1 and route and route.interface:
        # NCCL takes every interface whose name begins with the value, unless the value begins with `=`.
        variables |= {"GLOO_SOCKET_IFNAME": route.interface, "NCCL_SOCKET_IFNAME": f"={route.interface}"}
    program, flags = split_program(flags)
    words = _torchrun_words(launcher_words, entry_point("pretrain", program), flag_words(flags))
    return Command(words, {**unset_variables(variables, environment), RUN_FOLDER_VARIABLE: str(options.run_dir)})


def standalone_command(
    processes: int, entry: Iterable[str], arguments: Iterable[str] = (), options: Iterable[str] = ()
) -> tuple[str, ...]:
    """Return the words that run an entry point as ranks on this machine alone.

    Args:
        processes: The number of ranks.
        entry: What every rank runs, see `entry_point`.
        arguments: The entry point's arguments.
        options: Further options of torchrun.
    """
    return _torchrun_words(("--standalone", "--nproc-per-node", str(processes), *options), entry, arguments)


def entry_point(task: str, program: str = "") -> tuple[str, ...]:
    """Return the words that name what every rank runs.

    Args:
        task: `pretrain`, `check` or `evaluate`.
        program: A Python file that runs instead of MaskMoE's entry point, with the task as its first argument; empty
            for MaskMoE's entry point.
    """
    return (program, task) if program else ("-m", f"maskmoe.training.{task}")


def split_program(flags: Flags) -> tuple[str, Flags]:
    """Return the program that the key `program` of a model file names, empty if it names none, and all other flags.

    Raises:
        UserError: The key has no value, or several.
    """
    words = flags.get("program", ("",))
    if len(words) != 1:
        raise UserError(f"`program` must name one Python file, not {' '.join(words) or 'none'}")
    return words[0], {name: words for name, words in flags.items() if name != "program"}


def unset_variables(defaults: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return those default variables that the environment leaves unset or empty."""
    return {name: value for name, value in defaults.items() if not environment.get(name)}


def _torchrun_words(options: Iterable[str], entry: Iterable[str], arguments: Iterable[str]) -> tuple[str, ...]:
    return (sys.executable, "-m", "maskmoe.launch.ranks", *options, *entry, *arguments)


def _rendezvous_words(meeting: Meeting, route: Route | None) -> tuple[str, ...]:
    if meeting.endpoint is None:
        return ("--standalone", "--local-addr", "127.0.0.1")
    host, port = meeting.endpoint
    # Without `is_host`, torchrun guesses from host names which node is node 0.
    is_host = str(not meeting.node_rank).lower()
    return (
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", meeting.name),
        *("--rdzv-conf", f"is_host={is_host},join_timeout={meeting.timeout}"),
        *(("--local-addr", route.address) if route else ()),
    )
