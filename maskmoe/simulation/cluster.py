"""How long an exchange takes on a cluster."""

import math
from dataclasses import dataclass

import numpy as np

from maskmoe.errors import UserError
from maskmoe.simulation.layout import Layout, Reach
from maskmoe.simulation.traffic import Traffic


@dataclass(frozen=True)
class Link:
    """What connects a GPU with others.

    Attributes:
        bandwidth: bytes per second of each GPU, in both directions at once.
        latency: seconds that each message takes beside its bytes.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """The links of every GPU.

    Attributes:
        within: to the GPUs of its node.
        across: to those of other nodes.

    Raises:
        UserError: a bandwidth is not positive, or a latency is negative.
    """

    within: Link
    across: Link

    def __post_init__(self) -> None:
        for where, link in (("within a node", self.within), ("between nodes", self.across)):
            if not 0 < link.bandwidth < math.inf:
                raise UserError(
                    f"the bandwidth {where} must be a positive number of GB/s, not {link.bandwidth / 1e9:g}"
                )
            if not 0 <= link.latency < math.inf:
                raise UserError(f"the latency {where} must be 0 or a positive number of µs, not {link.latency * 1e6:g}")

    def seconds(self, layout: Layout, traffic: Traffic, bytes_per_row: float) -> float:
        """How long an exchange takes, from its start on all ranks to its end on the slowest.

        A message of n bytes takes `α + n/β` (R. Hockney, "The communication challenge for MPP", Parallel Computing 20,
        1994). An all-to-all is one message to every peer, empty or not: the pairwise exchange of R. Thakur,
        R. Rabenseifner and W. Gropp ("Optimization of collective communication operations in MPICH", IJHPCA 19, 2005)
        on p ranks, `(p - 1) α + n/β`. NCCL's sends to each peer directly, too.

        Links carry both directions at once: of what a rank sends and what it receives, the larger counts. The two kinds
        of links work side by side, and the slower one decides. Rows that stay on their rank take no time. Not modelled:
        contention in the network beyond the GPUs' own links, and other traffic.

        Args:
            layout: the ranks.
            traffic: rows of the exchange.
            bytes_per_row: of each.
        """
        rows = np.maximum(traffic.sent, traffic.received)  # [ranks, reaches]
        return max(
            float((layout.num_peers[:, reach] * link.latency + rows[:, reach] * bytes_per_row / link.bandwidth).max())
            for reach, link in ((Reach.NODE, self.within), (Reach.ACROSS, self.across))
        )
