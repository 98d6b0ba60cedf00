"""Torchrun's command line for a run: a pure function of options, flags and what is known of the machine."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from maskmoe.interruption import SIGNALS_THAT_END
from maskmoe.launch.model_file import Flags, flag_words, override
from maskmoe.launch.network import Route
from maskmoe.launch.options import Options

# Megatron wants a single connection for tensor and context parallelism on GPUs before Blackwell. One thread a process:
# there are many on a node. What ranks write is seen at once, also in a file.
_DEFAULT_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_ENTRY_POINT = "maskmoe.training.pretrain"


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        words: program and arguments.
        environment: variables that are set in addition to those of this process.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """One line for a shell."""
        variables = (f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return " ".join([*variables, shlex.join(self.words)])


def run_flags(options: Options, model_flags: Flags, user_flags: Flags) -> Flags:
    """The flags of a run: those of the model file, with the user's in place of its own, and folders of the run.

    A run goes on from where it saves, unless it is told to load from elsewhere.
    """
    flags = override(model_flags, user_flags)
    save = flags.get("save", (str(options.run_dir / "checkpoints"),))
    folders = {"save": save, "load": save, "tensorboard-dir": (str(options.run_dir / "tensorboard"),)}
    return {**{name: words for name, words in folders.items() if name not in {**model_flags, **user_flags}}, **flags}


def torchrun_command(
    options: Options, flags: Flags, processes: int, route: Route | None, environment: Mapping[str, str]
) -> Command:
    """The command that runs one node's ranks.

    Args:
        options: of the launcher.
        flags: of the run.
        processes: ranks on this node.
        route: the way to where the nodes meet; None if it cannot be told.
        environment: this process's variables, which are kept.
    """
    words = (
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(options.nodes), "--nproc-per-node", str(processes)),
        *_rendezvous_words(options, route),
        *("--max-restarts", str(options.max_restarts), "--monitor-interval", "0.5"),
        *("--log-dir", str(options.run_dir / "logs" / options.node_name), "--redirects", "3", "--tee", "3"),
        *("--log-line-prefix-template", "[rank${rank}]: "),
        *("--signals-to-handle", ",".join(number.name for number in SIGNALS_THAT_END)),
        *("--shutdown-timeout", str(options.shutdown_timeout)),
        *("-m", _ENTRY_POINT),
        *flag_words(flags),
    )
    return Command(words, _new_variables(options, route, environment))


def check_command(flags: Flags, ranks: int, environment: Mapping[str, str]) -> Command:
    """The command that checks the flags for a run of so many ranks."""
    words = (sys.executable, "-m", _ENTRY_POINT, "--check", str(ranks), *flag_words(flags))
    return Command(words, _without(environment, _DEFAULT_ENVIRONMENT))


def _rendezvous_words(options: Options, route: Route | None) -> tuple[str, ...]:
    if options.nodes == 1 and options.rendezvous is None:
        return ("--standalone", "--local-addr", "127.0.0.1")
    host, port = options.rendezvous
    # Torchrun guesses by host names which node it is that the others connect to.
    is_host = str(not options.node_rank).lower()
    return (
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", options.rendezvous_id),
        *("--rdzv-conf", f"is_host={is_host},join_timeout={options.rendezvous_timeout}"),
        *(("--local-addr", route.address) if route else ()),
    )


def _new_variables(options: Options, route: Route | None, environment: Mapping[str, str]) -> Mapping[str, str]:
    variables = dict(_DEFAULT_ENVIRONMENT)
    if options.nodes > 1 and route and route.interface:
        variables |= dict.fromkeys(_INTERFACE_VARIABLES, route.interface)
    return _without(environment, variables)


def _without(environment: Mapping[str, str], variables: Mapping[str, str]) -> Mapping[str, str]:
    """The variables that the environment does not set."""
    return {name: value for name, value in variables.items() if not environment.get(name)}
