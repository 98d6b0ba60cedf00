"""The launcher's own options: flags in front of the model file, or environment variables."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import Parser
from maskmoe.errors import UserError
from maskmoe.files.paths import RUNS, shipped_file
from maskmoe.processes.signals import SHUTDOWN_TIMEOUT

DEFAULT_PORT = 29400


@dataclass(frozen=True)
class NodeRange:
    """The smallest and the largest number of nodes of a run; if they differ, nodes may come and go during the run."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least}:{self.most}"


class Options(argparse.Namespace):
    """The launcher's options; `maskmoe pretrain --help` describes them.

    Attributes:
        model: The model file.
        flags: The words after the model file.
        nodes: The numbers of nodes on which the run may train.
        node_rank: The number of this node, from 0; None if not given.
        nproc_per_node: The number of ranks on each node; None for one per GPU, or one on a machine without GPUs.
        rendezvous: Host and port at which the nodes meet; None for a single node.
        rendezvous_id: The name of the job, equal on all nodes.
        rendezvous_timeout: How long the nodes wait for each other, in seconds.
        max_restarts: How often torchrun restarts failed ranks.
        shutdown_timeout: How long ranks may take for a last checkpoint, in seconds.
        run_dir: The run folder, as an absolute path.
        check_only: Whether to check only, and start nothing.
        dry_run: Whether to print torchrun's command line only.
    """

    model: Path
    flags: list[str]
    nodes: NodeRange
    node_rank: int | None
    nproc_per_node: int | None
    rendezvous: tuple[str, int] | None
    rendezvous_id: str
    rendezvous_timeout: int
    max_restarts: int
    shutdown_timeout: int
    run_dir: Path
    check_only: bool
    dry_run: bool

    @property
    def log_folder(self) -> Path:
        """The folder of this node's logs."""
        return self.run_dir / "logs" / f"node{self.node_rank}"


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
    parser = options_parser(program, environment)
    options = parser.parse_args(arguments, Options())
    own = parser.option_names() - {"--help", "-h"}
    if misplaced := [word for word in options.flags if word.partition("=")[0] in own]:
        raise UserError(f"{misplaced[0]} is an option of {program}: write it before {options.model}")
    options.run_dir = (options.run_dir or RUNS / options.model.stem).absolute()
    options.rendezvous_id = options.rendezvous_id or options.run_dir.name
    if options.nodes.most == 1 or options.check_only:
        # One node may inherit the variables of a run on many nodes, and a check meets no other node.
        options.node_rank, options.rendezvous = 0, None
        return options
    if options.rendezvous is None:
        raise UserError(f"--nodes {options.nodes} needs a rendezvous: pass --rendezvous HOST:PORT")
    if options.node_rank is None or options.node_rank >= options.nodes.most:
        raise UserError(
            f"--nodes {options.nodes}: pass --node-rank 0 to {options.nodes.most - 1} on the nodes, or set NODE_RANK"
        )
    return options


def options_parser(program: str, environment: Mapping[str, str]) -> Parser:
    """Return the parser of the launcher's options; the arguments are those of `parse_options`."""
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
        "and nothing was done; 75, a signal stopped the run, start it again.",
    )

    def add(
        flag: str, metavar: str, type: Callable[[str], object], variable: str, help: str, default: object = None
    ) -> None:
        text = help if default is None else f"{help} (default: {default})"
        value = environment.get(variable) or default
        parser.add_argument(flag, metavar=metavar, type=type, default=value, help=f"{text} [{variable}]")

    ranks = "number of ranks on each node (default: one per GPU; one on a machine without GPUs)"
    address = f"where the nodes meet: an address of node 0 and a free port (default port: {DEFAULT_PORT})"
    nodes = "number of nodes; with MIN:MAX, torchrun restarts all ranks when a node is lost, returns or joins"
    add("--nodes", "N", _node_range, "NNODES", nodes, "1")
    add("--node-rank", "R", ranges.NUMBER, "NODE_RANK", "number of this node, from 0")
    add("--nproc-per-node", "N", ranges.PROCESSES, "NPROC_PER_NODE", ranks)
    add("--rendezvous", "HOST:PORT", _address, "RDZV_ENDPOINT", address)
    add("--rendezvous-id", "ID", str, "RDZV_ID", "name of the job, equal on all nodes (default: the run folder)")
    add("--rendezvous-timeout", "SECONDS", ranges.COUNT, "RDZV_TIMEOUT", "how long the nodes wait for each other", 600)
    add("--max-restarts", "M", ranges.NUMBER, "MAX_RESTARTS", "how often failed ranks are restarted", 3)
    saving = "how long ranks may take for a last checkpoint"
    add("--shutdown-timeout", "SECONDS", ranges.COUNT, "SHUTDOWN_TIMEOUT", saving, SHUTDOWN_TIMEOUT)
    add(
        "--run-dir", "DIR", Path, "RUN_DIR", "folder for checkpoints, TensorBoard events and logs (default: runs/MODEL)"
    )
    check_help = argparse.SUPPRESS if is_check else f"only check the settings, and show what the run needs; {report}"
    parser.add_argument("--check", dest="check_only", action="store_true", help=check_help)
    parser.add_argument("--dry-run", action="store_true", help="only print torchrun's command line")
    model_help = "the model file, or the name of a shipped one: laptop.yaml, mixtral-8x7b.yaml, …; see launch/models/"
    parser.add_argument("model", type=partial(shipped_file, folder="models"), metavar="MODEL.yaml", help=model_help)
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="flags", help="flags of Megatron and MaskMoE")
    return parser


def _node_range(text: str) -> NodeRange:
    least, _, most = text.partition(":")
    nodes = NodeRange(ranges.RANKS(least), ranges.RANKS(most or least))
    if nodes.least > nodes.most or text.endswith(":"):
        raise argparse.ArgumentTypeError(f"must be N, or MIN:MAX with MIN up to MAX, not {text!r}")
    return nodes


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not colon:
        host, port = text, str(DEFAULT_PORT)
    try:
        host.encode("idna")  # as the system's functions for addresses do
        return host, ranges.PORT(port)
    except (UnicodeError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT ({error})") from error
