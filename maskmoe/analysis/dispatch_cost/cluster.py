"""Describe the cluster: the placement of expert-parallel ranks on nodes, and the links between GPUs."""

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from maskmoe.errors import UserError


class Reach(IntEnum):
    """How far a row travels; arrays of counts by reach have one column for each value."""

    OWN = 0
    """The row stays on its rank: a copy in memory that uses no link."""
    NODE = 1
    """The row goes to another GPU of the same node."""
    ACROSS = 2
    """The row goes to another node."""


@dataclass(frozen=True)
class Layout:
    """Expert-parallel groups of contiguous ranks, one rank on each GPU, as in Megatron.

    Attributes:
        num_gpus: Number of ranks.
        ep_size: Number of ranks in each expert-parallel group.
        gpus_per_node: Number of ranks on each node.

    Raises:
        UserError: The GPUs are not a whole number of nodes, or a group has fewer than two ranks.
    """

    num_gpus: int
    ep_size: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise UserError(f"a node has at least 1 GPU, not {self.gpus_per_node}")
        if self.num_gpus < 1 or self.num_gpus % self.gpus_per_node:
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
    def num_peers(self) -> np.ndarray:
        """Number of other ranks in each rank's group by reach, int64 [ranks, reaches]."""
        ranks = np.arange(self.num_gpus)
        node, group = ranks // self.gpus_per_node, ranks // self.ep_size
        first = np.maximum(node * self.gpus_per_node, group * self.ep_size)
        end = np.minimum((node + 1) * self.gpus_per_node, (group + 1) * self.ep_size)
        on_node = end - first - 1
        return np.stack([np.zeros_like(on_node), on_node, self.ep_size - 1 - on_node], axis=1)


@dataclass(frozen=True)
class Link:
    """A kind of network link between GPUs.

    Attributes:
        bandwidth: Bytes per second of each GPU, in both directions at once.
        latency: Constant part of the time of a message, in seconds.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """The links of every GPU.

    Attributes:
        within: Link to the GPUs of the same node.
        across: Link to the GPUs of other nodes.

    Raises:
        UserError: A bandwidth is not positive, or a latency is negative.
    """

    within: Link
    across: Link

    def __post_init__(self) -> None:
        for place, link in (("within a node", self.within), ("between nodes", self.across)):
            if not 0 < link.bandwidth < math.inf:
                raise UserError(
                    f"the bandwidth {place} must be a positive number of GB/s, not {link.bandwidth / 1e9:g}"
                )
            if not 0 <= link.latency < math.inf:
                raise UserError(f"the latency {place} must be 0 or a positive number of µs, not {link.latency * 1e6:g}")
