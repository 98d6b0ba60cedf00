"""Makes small routing masks, clusters and datasets."""

from pathlib import Path

import numpy as np
from dispatch_traffic import Cluster, Link
from support.datasets import build_mask, count_ids, write_documents

from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask

VOCAB_SIZE = 100


def make_cluster(num_gpus: int, ep_size: int, gpus_per_node: int) -> Cluster:
    """Return a cluster whose links have 400 and 50 GB/s, and 1 and 3 µs."""
    return Cluster(num_gpus, ep_size, gpus_per_node, Link(400e9, 1e-6), Link(50e9, 3e-6))


def write_data(folder: Path, num_tokens: int = 3000) -> Path:
    """Write a dataset of Zipf-distributed ids in several documents and return its prefix."""
    probabilities = 1 / np.arange(1, VOCAB_SIZE + 1)
    token_ids = np.random.default_rng(0).choice(VOCAB_SIZE, num_tokens, p=probabilities / probabilities.sum())
    return write_documents(folder / "text", np.split(token_ids, 4))


def count(prefix: Path) -> TokenFrequency:
    """Count the ids of a dataset."""
    return count_ids(prefix, VOCAB_SIZE)


def make_mask(frequency: TokenFrequency, num_experts: int, frequent_visible: int, num_layers: int = 1) -> RoutingMask:
    """Build a balanced mask in which frequent ids cover 40 % of all occurrences."""
    return build_mask(frequency, num_experts, num_layers, frequent_visible_experts=frequent_visible)
