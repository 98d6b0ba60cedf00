"""Where expert-parallel ranks are."""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from maskmoe.errors import UserError


class Reach(IntEnum):
    """How far a row goes; the columns of whatever is counted by reach."""

    OWN = 0
    """To the rank that it is on: a copy in memory, which no link carries."""
    NODE = 1
    """To another GPU of the node."""
    ACROSS = 2
    """To another node."""


@dataclass(frozen=True)
class Layout:
    """Expert-parallel groups of contiguous ranks, one rank on each GPU, as Megatron has them.

    Attributes:
        num_gpus: ranks in all.
        ep_size: ranks of a group.
        gpus_per_node: ranks of a node.

    Raises:
        UserError: the GPUs are no whole nodes, or a group has no two ranks.
    """

    num_gpus: int
    ep_size: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise UserError(f"a node has at least 1 GPU, not {self.gpus_per_node}")
        if self.num_gpus < 1 or self.num_gpus % self.gpus_per_node:
            raise UserError(
                f"{self.num_gpus} GPUs are not a whole number of nodes of {self.gpus_per_node}; give a multiple of that"
            )
        if self.ep_size < 2:
            raise UserError(f"expert parallelism needs at least 2 ranks, not {self.ep_size}: nothing would be sent")

    @property
    def nodes_per_group(self) -> int | None:
        """Nodes that a group is spread evenly over; None if it has a part of a node."""
        if self.gpus_per_node % self.ep_size == 0:
            return 1
        return self.ep_size // self.gpus_per_node if self.ep_size % self.gpus_per_node == 0 else None

    @cached_property
    def num_peers(self) -> np.ndarray:
        """Other ranks of each rank's group, int64 [ranks, reaches]."""
        ranks = np.arange(self.num_gpus)
        node, group = ranks // self.gpus_per_node, ranks // self.ep_size
        first = np.maximum(node * self.gpus_per_node, group * self.ep_size)
        end = np.minimum((node + 1) * self.gpus_per_node, (group + 1) * self.ep_size)
        near = end - first - 1
        return np.stack([np.zeros_like(near), near, self.ep_size - 1 - near], axis=1)
