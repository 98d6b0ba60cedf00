"""The cluster for which an interval between saves is recommended. This module imports neither torch nor Megatron."""

import argparse
from dataclasses import dataclass

from maskmoe.command_line import ranges

RANKS_PER_NODE = 8
# Both figures are those of "The Llama 3 Herd of Models" (arXiv 2407.21783, sections 3.3.1 and 3.3.4): 419 unexpected
# interruptions in 54 days on 16,384 GPUs, which are 2,048 nodes; storage that sustains 2 TB/s for them.
NODE_MTBF_DAYS = 264.0
WRITE_GIGABYTES = 1.0
_COPY_GIGABYTES = 10.0  # of a rank in a second, from the GPU to host memory


@dataclass(frozen=True)
class AssumedCluster:
    """How often nodes fail and how fast they save; nothing is measured.

    Attributes:
        ranks: the number of ranks of the run.
        node_mtbf_days: the mean time between two failures of one node, in days.
        write_gigabytes: what a node writes to the file system of the checkpoints, in GB/s.
    """

    ranks: int
    node_mtbf_days: float = NODE_MTBF_DAYS
    write_gigabytes: float = WRITE_GIGABYTES

    @property
    def nodes(self) -> int:
        """Return the number of nodes, each with `RANKS_PER_NODE` ranks."""
        return -(-self.ranks // RANKS_PER_NODE)

    @property
    def mtbf_days(self) -> float:
        """Return the mean time between two failures of the run, in days: one node that fails ends all ranks."""
        return self.node_mtbf_days / self.nodes

    def seconds_of_writing(self, checkpoint_bytes: float) -> float:
        """Return the seconds in which all nodes together write a checkpoint."""
        return checkpoint_bytes / (self.nodes * self.write_gigabytes * 1e9)

    def seconds_of_copying(self, checkpoint_bytes: float) -> float:
        """Return the seconds in which all ranks copy a checkpoint to host memory, as an asynchronous save does."""
        return checkpoint_bytes / (self.ranks * _COPY_GIGABYTES * 1e9)

    def describe_save(self, checkpoint_bytes: float, is_asynchronous: bool) -> str:
        """Say from what the time of a save is estimated."""
        size = f"{checkpoint_bytes / 1e9:,.4g} GB"
        if is_asynchronous:
            return f"{size} copied to host memory at {_COPY_GIGABYTES:g} GB/s a rank, which is assumed, not measured"
        return f"{size} written at {self.write_gigabytes:g} GB/s a node, which is assumed, not measured"


def add_assumed_cluster_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags from which `assumed_cluster` is made."""
    parser.add_argument(
        "--assumed-node-mtbf",
        type=ranges.DAYS,
        default=NODE_MTBF_DAYS,
        metavar="DAYS",
        help="mean time between two failures of one node, for the recommended --save-interval: an assumption (default: "
        "%(default)s, from the 419 unexpected interruptions of 2,048 nodes in 54 days that Llama 3's report counts)",
    )
    parser.add_argument(
        "--assumed-write-bandwidth",
        type=ranges.BANDWIDTH,
        default=WRITE_GIGABYTES,
        metavar="GBPS",
        help="GB/s that a node writes to the file system of the checkpoints, for the recommended --save-interval of a "
        "run that has saved nothing yet: an assumption (default: %(default)s)",
    )


def assumed_cluster(arguments: argparse.Namespace, ranks: int) -> AssumedCluster:
    """Return the cluster that parsed arguments describe.

    Args:
        arguments: parsed arguments.
        ranks: the number of ranks of the run.
    """
    return AssumedCluster(ranks, arguments.assumed_node_mtbf, arguments.assumed_write_bandwidth)
