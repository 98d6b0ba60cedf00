"""The launcher's own options: flags in front of the model file, or environment variables."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from maskmoe.errors import UserError
from maskmoe.paths import runs_folder

DEFAULT_PORT = 29400


@dataclass(frozen=True)
class Options:
    """The launcher's options; `launch/pretrain.sh --help` describes them.

    Attributes:
        model: the model file.
        flags: the words after the model file.
        nodes: the number of nodes.
        node_rank: the number of this node, from 0; None if not given.
        processes_per_node: the number of ranks on each node; None for one per GPU, or one on a machine without GPUs.
        rendezvous: host and port at which the nodes meet; None if not given.
        rendezvous_id: the name of the job, equal on all nodes.
        rendezvous_timeout: how long the nodes wait for each other, in seconds.
        max_restarts: how often torchrun restarts failed ranks.
        shutdown_timeout: how long ranks may take for a last checkpoint, in seconds.
        run_dir: the run folder, as an absolute path.
        checks: whether settings and files are checked before the start.
        check_only: whether to check only, and start nothing.
        dry_run: whether to print torchrun's command line only.
    """

    model: Path
    flags: tuple[str, ...]
    nodes: int
    node_rank: int | None
    processes_per_node: int | None
    rendezvous: tuple[str, int] | None
    rendezvous_id: str
    rendezvous_timeout: int
    max_restarts: int
    shutdown_timeout: int
    run_dir: Path
    checks: bool
    check_only: bool
    dry_run: bool

    @property
    def node_name(self) -> str:
        """The name of this node's log folder."""
        return f"node{self.node_rank or 0}"


def parse_options(program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Parse the launcher's options.

    Args:
        program: the name of the command for its help and its errors, such as `launch/pretrain.sh`.
        arguments: the command line after the program's name.
        environment: the environment variables, which stand in for flags that are not given.

    Raises:
        UserError: a value is invalid, or several nodes lack a rendezvous or a node rank.
    """
    values = _parser(program, environment).parse_args(arguments)
    run_dir = values.run_dir or runs_folder() / values.model.stem
    options = Options(
        model=values.model,
        flags=tuple(values.flags),
        nodes=values.nodes,
        node_rank=values.node_rank,
        processes_per_node=values.gpus_per_node,
        rendezvous=values.rendezvous,
        rendezvous_id=values.rendezvous_id or run_dir.name,
        rendezvous_timeout=values.rendezvous_timeout,
        max_restarts=values.max_restarts,
        shutdown_timeout=values.shutdown_timeout,
        run_dir=run_dir.absolute(),
        checks=values.checks,
        check_only=values.check,
        dry_run=values.dry_run,
    )
    _check_nodes(options)
    return options


def _check_nodes(options: Options) -> None:
    if options.nodes > 1 and options.rendezvous is None:
        raise UserError(f"{options.nodes} nodes need a rendezvous: pass --rendezvous HOST:PORT or set MASTER_ADDR")
    if options.nodes > 1 and options.node_rank is None:
        raise UserError(f"each of {options.nodes} nodes needs a rank: pass --node-rank R, from 0, or set NODE_RANK")
    if (options.node_rank or 0) >= options.nodes:
        raise UserError(
            f"--node-rank {options.node_rank}: the last of {options.nodes} nodes has rank {options.nodes - 1}"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser(program: str, environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        usage=f"{program} [options] MODEL.yaml [Megatron's flags…]",
        allow_abbrev=False,
        description="Pretrain the model of a YAML file, whose keys are Megatron's flags, on one node or many: start "
        "the command on each node. Flags after the file override the file's flags, and `--flag false` removes a flag. "
        "Each option can be given as the environment variable in brackets instead.",
        epilog="A signal (SIGTERM, SIGUSR1, Ctrl-C and others) makes the run save a checkpoint and stop. The same "
        "command resumes the run. Exit codes: 0, the training is complete; 1, the run failed, after all restarts; "
        "2, the input is bad and nothing was done; 75, a signal stopped the run, start it again; 76, the run hung, "
        "after all restarts.",
    )

    def add(flag: str, type: Callable[[str], object], default: object, variable: str, help: str, metavar: str) -> None:
        parser.add_argument(
            flag, type=type, default=environment.get(variable) or default, metavar=metavar, help=f"{help} [{variable}]"
        )

    add("--nodes", _positive_number, 1, "NNODES", "number of nodes (default: 1)", "N")
    add("--node-rank", _number, None, "NODE_RANK", "number of this node, from 0", "R")
    add(
        *("--gpus-per-node", _positive_number, None, "NPROC_PER_NODE"),
        "number of ranks on each node (default: one per GPU; one on a machine without GPUs)",
        "G",
    )
    add(
        *("--rendezvous", _address, _master(environment), "RDZV_ENDPOINT"),
        "where the nodes meet: an address of node 0 and a free port "
        f"(default: MASTER_ADDR:MASTER_PORT, with port {DEFAULT_PORT})",
        "HOST:PORT",
    )
    add("--rendezvous-id", str, None, "RDZV_ID", "name of the job, equal on all nodes (default: the run folder)", "ID")
    add(
        *("--rendezvous-timeout", _positive_number, 600, "RDZV_TIMEOUT"),
        "how long the nodes wait for each other (default: 600)",
        "SECONDS",
    )
    add("--max-restarts", _number, 3, "MAX_RESTARTS", "how often failed ranks are restarted (default: 3)", "M")
    add(
        *("--shutdown-timeout", _positive_number, 600, "SHUTDOWN_TIMEOUT"),
        "how long ranks may take for a last checkpoint (default: 600)",
        "SECONDS",
    )
    add(
        *("--run-dir", Path, None, "RUN_DIR"),
        "folder for checkpoints, TensorBoard events and logs (default: runs/MODEL)",
        "DIR",
    )
    parser.add_argument("--no-check", dest="checks", action="store_false", help="start without checking the settings")
    parser.add_argument("--check", action="store_true", help="only check the settings, and show what the run needs")
    parser.add_argument("--dry-run", action="store_true", help="only print torchrun's command line")
    parser.add_argument("model", type=Path, metavar="MODEL.yaml", help="the model file; launch/models/ has examples")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="flags", help="flags of Megatron and MaskMoE")
    return parser


def _master(environment: Mapping[str, str]) -> str | None:
    host = environment.get("MASTER_ADDR")
    return f"{host}:{environment.get('MASTER_PORT') or DEFAULT_PORT}" if host else None


def _positive_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not colon:
        host, port = text, str(DEFAULT_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host, int(port)
