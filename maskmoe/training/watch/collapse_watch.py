"""Warns of collapsed routing, from what the routing log counts."""

from argparse import Namespace

from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.watch.routing_collapse import LayerRouting, RoutingCollapse, reachable_experts
from maskmoe.training.watch.routing_log import RoutingRecord
from maskmoe.training.watch.run_warnings import RunWarnings


class CollapseWatch:
    """Takes the records of a routing log on the last rank, and warns of what has collapsed and recovered.

    Args:
        args: Megatron's arguments.
        mask: The routing mask.
        warnings: Takes the warnings.
    """

    def __init__(self, args: Namespace, mask: RoutingMask, warnings: RunWarnings) -> None:
        reachable = reachable_experts(mask, FeedForwardLayers.of_args(args))
        self._collapse = RoutingCollapse(args.collapse_intervals, reachable, args.expert_model_parallel_size)
        self._warnings = warnings

    def __call__(self, record: RoutingRecord, iteration: int) -> None:
        """Take a record.

        Args:
            record: The routing of the last log interval.
            iteration: The last iteration of the interval, counted from 1.
        """
        entropies = record.by_layer["routing_entropy"]
        layers = {
            layer: LayerRouting(tokens, entropies.get(layer)) for layer, tokens in record.tokens_per_expert.items()
        }
        for line in self._collapse.take(layers):
            self._warnings.warn(line, iteration)
