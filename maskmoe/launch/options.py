"""The launcher's own options: flags before the model file, or environment variables."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from maskmoe.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

DEFAULT_PORT = 29400


@dataclass(frozen=True)
class Options:
    """How a run is started; see `launch/pretrain.sh --help`."""

    model: Path
    flags: tuple[str, ...]
    nodes: int
    node_rank: int | None
    processes_per_node: int | None
    """None: one for each GPU, or one on a machine without"""
    rendezvous: tuple[str, int] | None
    """host and port at which the nodes meet"""
    rendezvous_id: str
    rendezvous_timeout: int
    """seconds"""
    max_restarts: int
    shutdown_timeout: int
    """seconds"""
    run_dir: Path
    checks: bool
    """whether settings and files are checked before the start"""
    check_only: bool
    dry_run: bool

    @property
    def node_name(self) -> str:
        """Names this node's log folder."""
        return f"node{self.node_rank or 0}"


def parse_options(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Read the options.

    Args:
        arguments: those of the script.
        environment: for what no flag says.

    Raises:
        UserError: a value that is none, or several nodes without a place to meet.
    """
    values = _parser(environment).parse_args(arguments)
    run_dir = values.run_dir or ROOT / "runs" / values.model.stem
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
        raise UserError(f"{options.nodes} nodes need a place to meet: pass --rendezvous HOST:PORT or set MASTER_ADDR")
    if options.nodes > 1 and options.node_rank is None:
        raise UserError(f"{options.nodes} nodes need a number each: pass --node-rank R, from 0, or set NODE_RANK")
    if (options.node_rank or 0) >= options.nodes:
        raise UserError(
            f"--node-rank {options.node_rank}: the ranks of {options.nodes} nodes end at {options.nodes - 1}"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see launch/pretrain.sh --help)")


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launch/pretrain.sh",
        usage="launch/pretrain.sh [options] MODEL.yaml [Megatron's flags…]",
        allow_abbrev=False,
        description="Pretrain the model of a YAML file, whose keys are Megatron's flags, on one node or, started on "
        "each of them, on many. Flags after the file win over the file's; `--flag false` takes one away. Each option "
        "can be given as the environment variable in brackets instead.",
        epilog="Asked to stop by a signal (SIGTERM, SIGUSR1, Ctrl-C and others) the run saves a checkpoint. Started "
        "again with the same run folder it goes on. Exit codes: 0 the training is complete; 2 bad input, nothing was "
        "done; 75 the run was asked to stop, start it again; 76 it stood still, and 1 it failed, after all restarts.",
    )

    def add(flag: str, type: Callable, default: object, variable: str, help: str, metavar: str) -> None:
        parser.add_argument(
            flag, type=type, default=environment.get(variable) or default, metavar=metavar, help=f"{help} [{variable}]"
        )

    add("--nodes", _count, 1, "NNODES", "number of nodes; 1", "N")
    add("--node-rank", _number, None, "NODE_RANK", "which of the nodes this is, from 0", "R")
    add("--gpus-per-node", _count, None, "NPROC_PER_NODE", "processes on a node; one a GPU, one without any", "G")
    add("--rendezvous", _address, _master(environment), "RDZV_ENDPOINT", _RENDEZVOUS, "HOST:PORT")
    add("--rendezvous-id", str, None, "RDZV_ID", "names the job to its nodes; the run folder's name", "ID")
    add("--rendezvous-timeout", _count, 600, "RDZV_TIMEOUT", "how long nodes wait for each other; 600", "SECONDS")
    add("--max-restarts", _number, 3, "MAX_RESTARTS", "how often torchrun restarts ranks that failed; 3", "M")
    add("--shutdown-timeout", _count, 600, "SHUTDOWN_TIMEOUT", "time for a last checkpoint; 600", "SECONDS")
    add("--run-dir", Path, None, "RUN_DIR", "checkpoints, TensorBoard's events and logs; runs/MODEL", "DIR")
    parser.add_argument("--no-check", dest="checks", action="store_false", help="start without checking the settings")
    parser.add_argument("--check", action="store_true", help="only check the settings, and show what the run needs")
    parser.add_argument("--dry-run", action="store_true", help="only print torchrun's command line")
    parser.add_argument("model", type=Path, metavar="MODEL.yaml", help="the model file, as in launch/models/")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="flags", help="Megatron's and MaskMoE's")
    return parser


_RENDEZVOUS = f"where the nodes meet: an address of node 0 and a free port; MASTER_ADDR:MASTER_PORT, {DEFAULT_PORT}"


def _master(environment: Mapping[str, str]) -> str | None:
    host = environment.get("MASTER_ADDR")
    return f"{host}:{environment.get('MASTER_PORT') or DEFAULT_PORT}" if host else None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not colon:
        host, port = text, str(DEFAULT_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT")
    return host, int(port)
