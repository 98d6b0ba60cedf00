"""The launcher's own options: flags in front of the model file, or environment variables."""

import argparse
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from maskmoe.arguments import ranges
from maskmoe.arguments.parser import Parser
from maskmoe.errors import UserError
from maskmoe.files.paths import RUNS, shipped_file
from maskmoe.processes.interruption import SHUTDOWN_TIMEOUT

DEFAULT_PORT = 29400


@dataclass(frozen=True)
class NodeRange:
    """On how many nodes a run may train.

    Attributes:
        least: The smallest number of nodes.
        most: The largest number of nodes.
        is_elastic: Whether the nodes may come and go during the run.
    """

    least: int
    most: int
    is_elastic: bool = False

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.is_elastic else str(self.most)


@dataclass(frozen=True)
class Meeting:
    """How this node's torchrun meets the torchruns of the other nodes.

    Attributes:
        nodes: The number of nodes.
        node_rank: The number of this node, from 0; None if the run has one node and no number was given.
        endpoint: Host and port at which the nodes meet; None for a single node without an endpoint.
        name: The name of the meeting, equal on all nodes.
        timeout: How long the nodes wait for each other, in seconds.
    """

    nodes: int
    node_rank: int | None
    endpoint: tuple[str, int] | None
    name: str
    timeout: int


class Options(argparse.Namespace):
    """The launcher's options; `maskmoe pretrain --help` describes them.

    Attributes:
        model: The model file.
        flags: The words after the model file.
        nodes: The numbers of nodes on which the run may train.
        node_rank: The number of this node, from 0; None if not given.
        address: The address of this node for the other nodes of an elastic run.
        node_timeout: How long a node of an elastic run may be silent, in seconds.
        gpus_per_node: The number of ranks on each node; None for one per GPU, or one on a machine without GPUs.
        rendezvous: Host and port at which the nodes meet; None if not given.
        rendezvous_id: The name of the job, equal on all nodes.
        rendezvous_timeout: How long the nodes wait for each other, in seconds.
        max_restarts: How often torchrun restarts failed ranks.
        shutdown_timeout: How long ranks may take for a last checkpoint, in seconds.
        run_dir: The run folder, as an absolute path.
        check_only: Whether to check only, and start nothing.
        dry_run: Whether to print torchrun's command line only.
        verbose: Whether everything that the ranks print goes to the console.
    """

    model: Path
    flags: list[str]
    nodes: NodeRange
    node_rank: int | None
    address: str
    node_timeout: int
    gpus_per_node: int | None
    rendezvous: tuple[str, int] | None
    rendezvous_id: str
    rendezvous_timeout: int
    max_restarts: int
    shutdown_timeout: int
    run_dir: Path
    check_only: bool
    dry_run: bool
    verbose: bool

    @property
    def meeting(self) -> Meeting:
        """How this node meets the other nodes, if the nodes stay the same."""
        return Meeting(self.nodes.most, self.node_rank, self.rendezvous, self.rendezvous_id, self.rendezvous_timeout)

    def log_folder(self, node_rank: int | None) -> Path:
        """Return the folder of the logs of the node with a number."""
        return self.run_dir / "logs" / f"node{node_rank or 0}"


_OPTIONS_OF_TRAINING = frozenset(("--verbose", "--help", "-h"))
"""Options of the launcher that training has, too, so that they may follow the model file."""


def launcher_options(words: Iterable[str]) -> list[str]:
    """Return the words of a command line that name options of the launcher alone, without their values."""
    own = _parser("", {}).option_names() - _OPTIONS_OF_TRAINING
    return [name for word in words if (name := word.partition("=")[0]) in own]


def parse_options(program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Parse the launcher's options.

    Args:
        program: The name of the command for its help and its errors, such as `maskmoe pretrain`.
        arguments: The command line after the program's name.
        environment: The environment variables, which stand in for flags that are not given.

    Raises:
        UserError: A value is invalid, an option follows the model file, or several nodes lack a rendezvous or a node
            rank.
    """
    options, unknown = _parser(program, environment).parse_known_args(arguments, Options())
    if unknown:
        raise UserError(
            f"unknown option {unknown[0]} of {program}: write Megatron's flags after MODEL.yaml (see {program} --help)"
        )
    if misplaced := launcher_options(options.flags):
        raise UserError(f"{misplaced[0]} is an option of {program}: write it before {options.model}")
    options.run_dir = (options.run_dir or RUNS / options.model.stem).absolute()
    options.address = options.address or socket.gethostname()
    options.rendezvous_id = options.rendezvous_id or options.run_dir.name
    if options.nodes.is_elastic:
        if options.dry_run:
            raise UserError("--dry-run prints one command line, but --nodes MIN:MAX has one for each set of nodes")
        # The nodes agree on a rendezvous and on their ranks by files of the run folder.
        options.rendezvous, options.node_rank = None, None
        return options
    if options.check_only:  # the check meets no other node
        return options
    nodes = options.nodes.most
    # Read NODE_RANK and MASTER_ADDR for several nodes only: a run on one node may inherit them from another run.
    if nodes == 1 and environment.get("NODE_RANK"):
        return parse_options(program, arguments, {**environment, "NODE_RANK": ""})
    if nodes > 1 and options.rendezvous is None and (host := environment.get("MASTER_ADDR")):
        endpoint = f"{host}:{environment.get('MASTER_PORT') or DEFAULT_PORT}"
        return parse_options(program, arguments, {**environment, "RDZV_ENDPOINT": endpoint})
    if nodes > 1 and options.rendezvous is None:
        raise UserError(f"{nodes} nodes need a rendezvous: pass --rendezvous HOST:PORT or set MASTER_ADDR")
    if nodes > 1 and options.node_rank is None:
        raise UserError(f"each of {nodes} nodes needs a rank: pass --node-rank R, from 0, or set NODE_RANK")
    if (options.node_rank or 0) >= nodes:
        raise UserError(f"--node-rank {options.node_rank}: the last of {nodes} nodes has rank {nodes - 1}")
    return options


def _parser(program: str, environment: Mapping[str, str]) -> Parser:
    is_check = program == "maskmoe check"
    report = "after MODEL.yaml, --json FILE also writes the report as JSON, and --force replaces FILE"
    purpose = (
        f"Check the settings of a YAML file, whose keys are Megatron's flags, and show what the run needs; {report}."
        if is_check
        else "Pretrain the model of a YAML file, whose keys are Megatron's flags, on one node or many: start the "
        "command on each node."
    )
    parser = Parser(
        prog=program,
        usage=f"{program} [options] MODEL.yaml [Megatron's flags…]",
        description=f"{purpose} Flags after the file override the file's flags, and `--flag false` removes a flag. "
        "Each option can be given as the environment variable in brackets instead.",
        epilog="A signal (SIGTERM, SIGUSR1, Ctrl-C and others) makes the run save a checkpoint and stop. The same "
        "command resumes the run. Exit codes: 0, the training is complete, or stopped at --exit-interval or "
        "--phase-transition-iterations; 1, the run failed, after all restarts; 2, the input is bad "
        "and nothing was done; 75, a signal stopped the run, start it again; 76, the run hung, after all restarts.",
    )

    def add(
        flag: str, metavar: str, type: Callable[[str], object], variable: str, help: str, default: object = None
    ) -> None:
        text = help if default is None else f"{help} (default: {default})"
        value = environment.get(variable) or default
        parser.add_argument(flag, metavar=metavar, type=type, default=value, help=f"{text} [{variable}]")

    ranks = "number of ranks on each node (default: one per GPU; one on a machine without GPUs)"
    address = (
        "an address of node 0 and a free port (default with several nodes: MASTER_ADDR:MASTER_PORT, with port "
        f"{DEFAULT_PORT} if MASTER_PORT is not set)"
    )
    nodes = "number of nodes; MIN:MAX lets nodes come and go during the run, which needs a shared run folder"
    add("--nodes", "N", _node_range, "NNODES", nodes, "1")
    add("--node-rank", "R", ranges.NUMBER, "NODE_RANK", "number of this node, from 0")
    add("--gpus-per-node", "G", ranges.RANKS_OF_NODE, "NPROC_PER_NODE", ranks)
    add("--rendezvous", "HOST:PORT", _address, "RDZV_ENDPOINT", f"where the nodes meet: {address}")
    own = "address of this node for the other nodes, with --nodes MIN:MAX (default: the host name)"
    add("--address", "HOST", _host, "NODE_ADDRESS", own)
    silence = "how long a node may be silent, with --nodes MIN:MAX, until the others train without it"
    add("--node-timeout", "SECONDS", ranges.NODE_TIMEOUT, "NODE_TIMEOUT", silence, 30)
    add("--rendezvous-id", "ID", str, "RDZV_ID", "name of the job, equal on all nodes (default: the run folder)")
    add(
        "--rendezvous-timeout", "SECONDS", ranges.SECONDS, "RDZV_TIMEOUT", "how long the nodes wait for each other", 600
    )
    add("--max-restarts", "M", ranges.NUMBER, "MAX_RESTARTS", "how often failed ranks are restarted", 3)
    saving = "how long ranks may take for a last checkpoint"
    add("--shutdown-timeout", "SECONDS", ranges.SECONDS, "SHUTDOWN_TIMEOUT", saving, SHUTDOWN_TIMEOUT)
    add(
        "--run-dir", "DIR", Path, "RUN_DIR", "folder for checkpoints, TensorBoard events and logs (default: runs/MODEL)"
    )
    check_help = argparse.SUPPRESS if is_check else f"only check the settings, and show what the run needs; {report}"
    parser.add_argument("--check", dest="check_only", action="store_true", help=check_help)
    parser.add_argument("--dry-run", action="store_true", help="only print torchrun's command line")
    verbose_help = "print all arguments, the memory of the run, and everything else that is usually only in files"
    parser.add_argument("--verbose", action="store_true", help=verbose_help)
    model_help = "the model file, or the name of a shipped one: laptop.yaml, mixtral-8x7b.yaml, …; see launch/models/"
    parser.add_argument("model", type=partial(shipped_file, folder="models"), metavar="MODEL.yaml", help=model_help)
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="flags", help="flags of Megatron and MaskMoE")
    return parser


def _node_range(text: str) -> NodeRange:
    least, colon, most = text.partition(":")
    if not colon:
        return NodeRange(ranges.NODES(text), ranges.NODES(text))
    nodes = NodeRange(ranges.NODES(least), ranges.NODES(most), is_elastic=True)
    if nodes.least > nodes.most:
        raise argparse.ArgumentTypeError(f"must be N, or MIN:MAX with MIN up to MAX, not {text!r}")
    return nodes


def _host(text: str) -> str:
    try:
        text.encode("idna")  # as the system's functions for addresses do
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a host") from error
    return text


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not colon:
        host, port = text, str(DEFAULT_PORT)
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    host = _host(host)
    try:
        return host, ranges.PORT(port)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT: the port {error}") from error
