"""Builds the command lines of a run, and of any entry point, with their environment variables."""

import shlex
import signal
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from maskmoe.arguments.flags import override
from maskmoe.errors import UserError
from maskmoe.files.run_folder import CHECKPOINTS, RUN_FOLDER_VARIABLE, TENSORBOARD
from maskmoe.launch.machine import GPU_ENVIRONMENT, Route
from maskmoe.launch.model_file import Flags
from maskmoe.launch.options import Options
from maskmoe.processes.signals import SHUTDOWN_VARIABLE, SIGNALS_THAT_END

ENTRY_POINT_ENVIRONMENT = {
    **GPU_ENVIRONMENT,
    # `python -m` would import files of the current folder instead of the packages with the same names.
    "PYTHONSAFEPATH": "1",
    # torchrun's store outlives the ranks that torchrun restarts, with their messages. So let the first rank host one.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # The flight recorder: when a collective of NCCL times out, each rank writes its last collectives to a file.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
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


def run_flags(run_dir: Path, model_flags: Flags, user_flags: Flags) -> Flags:
    """Combine the flags of the model file and of the user, and add the run's folders.

    The user's flags override the model file's flags. By default, a run loads from the folder to which it saves, so that
    it resumes when it is started again. With `--save false`, a run has nothing to resume from, so it loads nothing.
    """
    save = {**model_flags, **user_flags}.get("save", (str(run_dir / CHECKPOINTS),))
    folders = {"save": save, "load": save, "tensorboard-dir": (str(run_dir / TENSORBOARD),)}
    return override({**folders, **model_flags}, user_flags)


def torchrun_command(options: Options, processes: int, route: Route | None, environment: Mapping[str, str]) -> Command:
    """Return the command that runs one node's ranks.

    Args:
        options: The launcher's options.
        processes: The number of ranks on this node.
        route: The network route to the rendezvous; None if the route is unknown.
        environment: The variables of this process, which are not changed.
    """
    # Under nohup, a run survives SIGHUP.
    signals = [number.name for number in SIGNALS_THAT_END if signal.getsignal(number) is not signal.SIG_IGN]
    torchrun = (
        *("--nnodes", str(options.nodes), "--nproc-per-node", str(processes)),
        *_rendezvous_words(options, route),
        *("--max-restarts", str(options.max_restarts), "--monitor-interval", "0.5"),
        *("--log-dir", str(options.log_folder), "--redirects", "3", "--tee", "3"),
        *("--signals-to-handle", ",".join(signals)),
    )
    variables = dict(RUN_ENVIRONMENT)
    if options.rendezvous and route and route.interface:
        # NCCL takes every interface whose name begins with the value, unless the value begins with `=`.
        variables |= {"GLOO_SOCKET_IFNAME": route.interface, "NCCL_SOCKET_IFNAME": f"={route.interface}"}
    own = {SHUTDOWN_VARIABLE: str(options.shutdown_timeout), RUN_FOLDER_VARIABLE: str(options.run_dir)}
    words = _torchrun_words(torchrun, ("-m", "maskmoe.launch.rank"), (str(options.model), *options.flags))
    return Command(words, {**unset_variables(variables, environment), **own})


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
    return (sys.executable, "-m", "maskmoe.launch.agent", *options, *entry, *arguments)


def _rendezvous_words(options: Options, route: Route | None) -> tuple[str, ...]:
    if options.rendezvous is None:
        return ("--standalone", "--local-addr", "127.0.0.1")
    host, port = options.rendezvous
    # Without `is_host`, torchrun guesses from host names which node is node 0.
    is_host = str(options.node_rank == 0).lower()
    timeout = options.rendezvous_timeout  # also of the wait for node 0
    return (
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", options.rendezvous_id),
        *("--rdzv-conf", f"is_host={is_host},join_timeout={timeout},read_timeout={timeout}"),
        *(("--local-addr", route.address) if route else ()),
    )
