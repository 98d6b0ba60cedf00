"""Model the time of a collective exchange on a cluster."""

import math
from dataclasses import dataclass

import numpy as np

from maskmoe.errors import UserError
from maskmoe.simulation.layout import Layout, Reach
from maskmoe.simulation.traffic import Traffic


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

    def seconds(self, layout: Layout, traffic: Traffic, bytes_per_row: float) -> float:
        """Return the time of an exchange in seconds, from the common start to the end on the slowest rank.

        A message of n bytes takes `α + n/β` (R. Hockney, "The communication challenge for MPP", Parallel Computing 20,
        1994), with latency α and bandwidth β. An all-to-all sends one message to every peer, even if it is empty: the
        pairwise exchange of R. Thakur, R. Rabenseifner and W. Gropp ("Optimization of collective communication
        operations in MPICH", IJHPCA 19, 2005), which takes `(p - 1) α + n/β` on p ranks. NCCL also sends directly to
        each peer.

        Links carry both directions at once, so the larger one of the sent and received bytes of a rank counts. Both
        kinds of links work at the same time, and the slower one determines the time. Rows that stay on their rank take
        no time. The model ignores contention in the network beyond the GPUs' own links, and other traffic.

        Args:
            layout: The ranks.
            traffic: Rows of the exchange.
            bytes_per_row: Size of a row in bytes.
        """
        rows = np.maximum(traffic.sent, traffic.received)  # [ranks, reaches]
        return max(
            float((layout.num_peers[:, reach] * link.latency + rows[:, reach] * bytes_per_row / link.bandwidth).max())
            for reach, link in ((Reach.NODE, self.within), (Reach.ACROSS, self.across))
        )
