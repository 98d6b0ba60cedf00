"""Logs how tokens are routed, layer by layer, to TensorBoard and W&B."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.core.utils import get_model_config
from megatron.training import is_last_rank
from torch import Tensor

from maskmoe.errors import counted, listed
from maskmoe.megatron_compat.globals import get_args
from maskmoe.megatron_compat.training_patches import RouterLossTracker
from maskmoe.processes.console import console
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.watch.callback import Callback
from maskmoe.training.watch.writers import log_scalars
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.routing_statistics import RoutingSums

_MOST_ROWS = "rank_rows_max"
_MOST_NAMED_EXPERTS = 16


class RoutingRecord(NamedTuple):
    """The routing of the tokens of some iterations, on all ranks.

    Attributes:
        by_layer: Values by name of the scalar and index of the layer, from 0 as in Megatron's tags. Layers of
            multi-token prediction follow the decoder's layers. Layers without a value are left out.

            - `expert_load_max_over_mean`: the most tokens of an expert, divided by the mean of all experts.
            - `rank_load_max_over_mean`: this quotient for expert-parallel ranks; with several ranks only.
            - `rank_rows_max`: the most rows of one rank's experts in one micro-batch; with several ranks only.
            - `routing_entropy`: entropy of the masked probabilities in nats, at most ln V; mean over tokens with V > 1.
            - `single_expert_token_share`: share of the tokens with V = 1.
        tokens_per_expert: The tokens that each expert got, by index of the layer.
    """

    by_layer: dict[str, dict[int, float]]
    tokens_per_expert: Mapping[int, Sequence[float]]


class IdleExperts:
    """Finds experts that get no token in several log intervals in a row, and reports each once until it gets tokens.

    Experts that no id of the mask sees are left out, because they never get tokens.

    Args:
        intervals: The number of log intervals after which an expert is reported.
        reachable: For each MoE layer, by its index, whether each expert is visible to any id.
    """

    def __init__(self, intervals: int, reachable: Mapping[int, Sequence[bool]]) -> None:
        self._intervals = intervals
        self._reachable = reachable
        self._idle = {layer: [0] * len(experts) for layer, experts in reachable.items()}  # log intervals in a row

    def take(self, tokens_per_expert: Mapping[int, Sequence[float]]) -> list[str]:
        """Take the tokens that each expert got in a log interval; return a line for each layer with new idle experts.

        `tokens_per_expert` has the index of each layer that had tokens.
        """
        lines = []
        for layer, tokens in tokens_per_expert.items():
            idle = [0 if number else before + 1 for number, before in zip(tokens, self._idle[layer], strict=True)]
            self._idle[layer] = idle
            new = [e for e, number in enumerate(idle) if number == self._intervals and self._reachable[layer][e]]
            if new:
                names = f"expert{'s' if len(new) > 1 else ''} {listed([*map(str, new)], _MOST_NAMED_EXPERTS)}"
                lines.append(f"MoE layer {layer}: {names} got no token for {counted(self._intervals, 'log interval')}")
        return lines


def reachable_experts(mask: RoutingMask, layers: FeedForwardLayers) -> dict[int, list[bool]]:
    """Return for each MoE layer of a model, by its index, whether each expert is visible to any id."""
    return {
        index: mask.visible_to_any_id(layers.table(index + 1, len(mask.row_of_id))).tolist()
        for index, has_experts in enumerate(layers.has_experts)
        if has_experts
    }


class RoutingLog(Callback):
    """Logs the routing of the last `--log-interval` iterations, and warns of idle experts, counted since the start."""

    def __init__(self, args: Namespace, mask: RoutingMask) -> None:
        self._args = args
        reachable = reachable_experts(mask, FeedForwardLayers.of_args(args))
        self._idle = IdleExperts(args.collapse_intervals, reachable) if args.collapse_intervals else None

    def on_start(self) -> None:
        """Let Megatron log the mean of each router loss over the MoE layers of the model."""
        set_moe_metrics_tracker(RouterLossTracker(self._args))

    def after_gradients(self, chunks: Sequence[DistributedDataParallel]) -> None:
        """Log and judge the routing at the end of an interval; a collective call."""
        iteration = self._args.curr_iteration + 1
        if iteration % self._args.log_interval == 0:
            record = take_record(chunks)
            if is_last_rank():
                _write(record, iteration)
                for line in self._idle.take(record.tokens_per_expert) if self._idle else ():
                    console.say(f"warning: {line}", rank=-1)


def _write(record: RoutingRecord, iteration: int) -> None:
    """Write the record of an interval that ends with an iteration to TensorBoard and W&B."""
    # The mean over the layers, as Megatron logs it, or the maximum.
    overall = {
        name: max(values.values()) if name == _MOST_ROWS else sum(values.values()) / len(values)
        for name, values in record.by_layer.items()
        if values
    }
    of_layers = {
        f"moe/{name}_layer_{layer}": value
        for name, values in record.by_layer.items()
        for layer, value in values.items()
    }
    log_scalars(overall | of_layers, iteration)


def take_record(model: Sequence[torch.nn.Module]) -> RoutingRecord:
    """Return what all ranks have counted since the last call; a collective call for which the host waits."""
    # Collect the sums and the maximum of this rank's layers; layers of other pipeline stages stay 0.
    config = get_model_config(model[0])
    num_layers = len(FeedForwardLayers.of_args(get_args()).has_experts)
    num_ep_ranks = config.expert_model_parallel_size
    device = torch.cuda.current_device()
    row_size = RoutingSums.packed_size(config.num_moe_experts)
    packed = torch.zeros(num_layers, row_size, dtype=torch.float64, device=device)
    most_rows = torch.zeros(num_layers, dtype=torch.int64, device=device)
    for chunk in model:
        for router in chunk.modules():
            if isinstance(router, MaskMoERouter):
                layer = router.number_in_model - 1
                packed[layer], most_rows[layer] = router.statistics.take()
    # Combine all ranks.
    torch.distributed.all_reduce(packed)
    if num_ep_ranks > 1:
        torch.distributed.all_reduce(most_rows, op=torch.distributed.ReduceOp.MAX)
    packed, most_rows = packed.cpu(), most_rows.cpu()
    sums = RoutingSums.unpack(packed)

    # Compute the values of each layer.
    values = {"expert_load_max_over_mean": _max_over_mean(sums.tokens_per_expert)}
    if num_ep_ranks > 1:
        # Each expert-parallel rank has an equal, contiguous share of the experts.
        tokens_per_rank = sums.tokens_per_expert.unflatten(1, (num_ep_ranks, -1)).sum(dim=-1)
        values["rank_load_max_over_mean"] = _max_over_mean(tokens_per_rank)
        values[_MOST_ROWS] = most_rows
    values["routing_entropy"] = sums.entropy / sums.num_routable
    values["single_expert_token_share"] = 1 - sums.num_routable / sums.num_tokens
    by_layer = {}
    for name, of_layers in values.items():
        has_value = sums.num_routable if name == "routing_entropy" else sums.num_tokens
        by_layer[name] = {layer: of_layers[layer].item() for layer in has_value.nonzero().flatten().tolist()}
    has_tokens = sums.num_tokens.nonzero().flatten().tolist()
    tokens_per_expert = {layer: sums.tokens_per_expert[layer].tolist() for layer in has_tokens}
    return RoutingRecord(by_layer, tokens_per_expert)


def _max_over_mean(load: Tensor) -> Tensor:
    """Return the maximum divided by the mean of each layer's parts; load: [layers, parts], result: [layers]."""
    return load.amax(dim=1) / load.mean(dim=1)
