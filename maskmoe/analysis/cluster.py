"""Describes a cluster: the placement of expert-parallel ranks on nodes, and the links between GPUs."""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np

from maskmoe.errors import UserError


class Reach(IntEnum):
    """How far a row travels; arrays by reach have one column for each value."""

    OWN = 0
    """The row stays on its rank: a copy in memory that uses no link."""
    NODE = 1
    """The row goes to another GPU of the same node."""
    ACROSS = 2
    """The row goes to another node."""


class Link(NamedTuple):
    """A kind of network link between GPUs.

    Attributes:
        bandwidth: bytes per second of each GPU, in both directions at once.
        latency: constant part of the time of a message, in seconds.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Expert-parallel groups of contiguous ranks, one rank on each GPU, as in Megatron.

    An array of rows has the shape [ranks, ranks of a group]: what each rank sends to each rank of its own group.

    Attributes:
        num_gpus: number of ranks.
        ep_size: number of ranks in each expert-parallel group.
        gpus_per_node: number of ranks on each node.
        node_link: link to the GPUs of the same node.
        network_link: link to the GPUs of other nodes.

    Raises:
        UserError: the GPUs are not a whole number of nodes, or a group has fewer than two ranks.
    """

    num_gpus: int
    ep_size: int
    gpus_per_node: int
    node_link: Link
    network_link: Link

    def __post_init__(self) -> None:
        if self.num_gpus % self.gpus_per_node:
            raise UserError(
                f"{self.num_gpus} GPUs are not a whole number of nodes of {self.gpus_per_node}; "
                f"give a multiple of {self.gpus_per_node}"
            )
        if self.ep_size < 2:
            raise UserError(f"expert parallelism needs at least 2 ranks, not {self.ep_size}: nothing would be sent")

    @property
    def nodes_per_group(self) -> int | None:
        """Number of nodes that a group fills evenly, 1 if the group is part of a node, else None."""
        if self.gpus_per_node % self.ep_size == 0:
            return 1
        return self.ep_size // self.gpus_per_node if self.ep_size % self.gpus_per_node == 0 else None

    @cached_property
    def reach(self) -> np.ndarray:
        """The `Reach` from each rank to each rank of its group, int64 [ranks, ranks of a group]."""
        ranks = np.arange(self.num_gpus)[:, None]
        peers = ranks // self.ep_size * self.ep_size + np.arange(self.ep_size)
        on_node = ranks // self.gpus_per_node == peers // self.gpus_per_node
        return np.where(ranks == peers, Reach.OWN, np.where(on_node, Reach.NODE, Reach.ACROSS))

    def sent_by_reach(self, rows: np.ndarray) -> np.ndarray:
        """Return how many of the rows [ranks, ranks of a group] each rank sends by reach, int64 [ranks, reaches]."""
        return np.stack([np.where(self.reach == reach, rows, 0).sum(axis=1) for reach in Reach], axis=1)

    def reverse(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of the opposite direction: what each rank receives from each rank of its group."""
        groups = rows.reshape(-1, self.ep_size, self.ep_size)
        return groups.swapaxes(1, 2).reshape(rows.shape)

    def seconds(self, rows: np.ndarray, bytes_per_row: int) -> float:
        """Return the time of an all-to-all in seconds, from the common start to the end on the slowest rank.

        A message of n bytes takes `α + n/β` (R. Hockney, "The communication challenge for MPP", Parallel Computing 20,
        1994), with latency α and bandwidth β. An all-to-all sends one message to every peer, even if it is empty: the
        pairwise exchange of R. Thakur, R. Rabenseifner and W. Gropp ("Optimization of collective communication
        operations in MPICH", IJHPCA 19, 2005), which takes `(p - 1) α + n/β` on p ranks. NCCL also sends directly to
        each peer.

        Links carry both directions at once, so the larger one of the sent and received bytes of a rank counts. Both
        kinds of links work at the same time, and the slower one determines the time. Rows that stay on their rank take
        no time. The model ignores contention in the network beyond the GPUs' own links, and other traffic.

        Args:
            rows: rows from each rank to each rank of its group, integer [ranks, ranks of a group].
            bytes_per_row: size of a row in bytes.
        """
        num_peers = self.sent_by_reach(np.ones_like(rows))
        num_rows = np.maximum(self.sent_by_reach(rows), self.sent_by_reach(self.reverse(rows)))  # [ranks, reaches]
        return max(
            float((num_peers[:, reach] * link.latency + num_rows[:, reach] * bytes_per_row / link.bandwidth).max())
            for reach, link in ((Reach.NODE, self.node_link), (Reach.ACROSS, self.network_link))
        )
