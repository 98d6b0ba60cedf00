"""Logs how tokens are routed, layer by layer, to the training log, TensorBoard and W&B."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.utils import get_model_config
from megatron.training import get_tensorboard_writer, get_wandb_writer, is_last_rank
from torch import Tensor
from torch.distributed.tensor import DTensor

from maskmoe.megatron_compat.globals import get_args
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.routing_statistics import RoutingSums

_MOST_ROWS = "rank_rows_max"

# Ratio of the most rows of a rank to the mean, from which the run warns: expert activations take this much more memory
# than with even routing.
_UNEVEN = 1.5


class RoutingRecord(NamedTuple):
    """The routing of the tokens of some iterations, on all ranks.

    Attributes:
        by_layer: Values by name of the scalar and index of the layer, from 0 as in Megatron's tags. Layers of
            multi-token prediction follow the decoder's layers. Layers without a value are left out.

            - `expert_load_max_over_mean`: tokens of the expert with the most tokens, divided by the mean of all
              experts.
            - `rank_load_max_over_mean`: tokens of the expert-parallel rank with the most tokens, divided by the mean of
              all ranks; with several ranks only.
            - `rank_rows_max`: the most rows that the experts of one rank got in one micro-batch; with several ranks
              only.
            - `routing_entropy`: entropy of the masked probabilities in nats, at most ln V; mean over tokens with V >=
              2.
            - `single_expert_token_share`: share of the tokens with V = 1.
            - `router_grad_norm`: norm of the gradient of the router's weight in the last iteration, before clipping.
        uneven: Index of the layer whose `rank_rows_max` exceeds the mean rows of a rank the most, and the ratio of the
            two; None with one expert-parallel rank.
        tokens_per_expert: The tokens that each expert got, by index of the layer.
    """

    by_layer: dict[str, dict[int, float]]
    uneven: tuple[int, float] | None
    tokens_per_expert: Mapping[int, Sequence[float]]


class RoutingLog:
    """Finalizes gradients as Megatron-Core does, and logs the routing of the last `interval` iterations.

    An instance is a model's `finalize_model_grads_func`, which the pipeline schedules call on all ranks once in every
    iteration, when gradients are summed over micro-batches and not yet clipped. Counts are not saved in checkpoints:
    after a restart, the first logged interval covers only the iterations since the restart.

    Args:
        interval: Number of iterations between two records.
        watch: Takes each record and its iteration on the last rank; None if nothing watches the routing.
    """

    def __init__(self, interval: int, watch: Callable[[RoutingRecord, int], None] | None = None) -> None:
        self._interval = interval
        self._watch = watch
        self._has_warned = False

    def __call__(self, model: Sequence[DistributedDataParallel], *arguments: Any, **options: Any) -> None:
        """Finalize the gradients of this rank's model chunks; a collective call with Megatron-Core's arguments."""
        # Megatron-Core annotates a list of modules of which it uses the methods of `DistributedDataParallel`.
        finalize_model_grads(cast(Any, model), *arguments, **options)
        iteration = get_args().curr_iteration + 1
        if iteration % self._interval == 0:
            record = take_record(model)
            if is_last_rank():
                self._write(record, iteration)
                if self._watch is not None:
                    self._watch(record, iteration)

    def _write(self, record: RoutingRecord, iteration: int) -> None:
        # The mean over the layers, as Megatron logs it, or the maximum; and each layer, with tags like Megatron's.
        overall = {
            name: max(values.values()) if name == _MOST_ROWS else sum(values.values()) / len(values)
            for name, values in record.by_layer.items()
            if values
        }
        scalars = overall | {
            f"moe/{name}_layer_{layer}": value
            for name, values in record.by_layer.items()
            for layer, value in values.items()
        }
        texts = (f"{name.replace('_', ' ')}: {value:.4g} |" for name, value in overall.items())
        print(" routing |", *texts, flush=True)
        if writer := get_tensorboard_writer():
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, iteration)
        if wandb_writer := get_wandb_writer():
            wandb_writer.log(scalars, iteration)
        if record.uneven is not None and record.uneven[1] > _UNEVEN and not self._has_warned:
            self._has_warned = True
            layer, ratio = record.uneven
            print(
                f"warning: uneven routing, whose memory grows with the rows of a rank: in MoE layer {layer}, a rank's "
                f"experts got {record.by_layer[_MOST_ROWS][layer]:.0f} rows in one micro-batch, {ratio:.2f} times the "
                f"mean. This warning comes once; see `{_MOST_ROWS}` in TensorBoard. A balanced mask or a larger "
                "--moe-aux-loss-coeff evens it out",
                file=sys.stderr,
                flush=True,
            )


def take_record(model: Sequence[DistributedDataParallel]) -> RoutingRecord:
    """Return what all ranks have counted since the last call; a collective call for which the host waits.

    Args:
        model: This rank's model chunks with finalized gradients.
    """
    # Collect the sums and the maximum of this rank's layers; layers of other pipeline stages stay 0.
    config = get_model_config(model[0])
    num_layers = len(FeedForwardLayers.of_args(get_args()).has_experts)
    num_ep_ranks = config.expert_model_parallel_size
    device = torch.cuda.current_device()
    row_size = 1 + RoutingSums.packed_size(config.num_moe_experts)
    packed = torch.zeros(num_layers, row_size, dtype=torch.float64, device=device)
    most_rows = torch.zeros(num_layers, dtype=torch.int64, device=device)
    for chunk in model:
        for router in chunk.modules():
            if isinstance(router, MaskMoERouter):
                layer = router.number_in_model - 1
                packed[layer, 0] = _part_of_squared_gradient(chunk, router.weight)
                packed[layer, 1:], most_rows[layer] = router.statistics.take()
    # Combine all ranks.
    torch.distributed.all_reduce(packed)
    if num_ep_ranks > 1:
        torch.distributed.all_reduce(most_rows, op=torch.distributed.ReduceOp.MAX)
    packed, most_rows = packed.cpu(), most_rows.cpu()
    sums = RoutingSums.unpack(packed[:, 1:])
    # With the loss scale of fp16, gradients are multiplied by it.
    loss_scale = 1.0 if config.grad_scale_func is None else config.grad_scale_func(1.0)

    # Compute the values of each layer.
    values = {"expert_load_max_over_mean": _max_over_mean(sums.tokens_per_expert)}
    uneven = None
    if num_ep_ranks > 1:
        # Each expert-parallel rank has an equal, contiguous share of the experts.
        tokens_per_rank = sums.tokens_per_expert.unflatten(1, (num_ep_ranks, -1)).sum(dim=-1)
        values["rank_load_max_over_mean"] = _max_over_mean(tokens_per_rank)
        values[_MOST_ROWS] = most_rows
        ratios = (most_rows * sums.num_micro_batches / sums.num_rows).nan_to_num()
        uneven = int(ratios.argmax()), ratios.max().item()
    values["routing_entropy"] = sums.entropy / sums.num_routable
    values["single_expert_token_share"] = 1 - sums.num_routable / sums.num_tokens
    values["router_grad_norm"] = packed[:, 0].sqrt() / float(loss_scale)
    by_layer = {}
    for name, of_layers in values.items():
        has_value = sums.num_routable if name == "routing_entropy" else sums.num_tokens
        by_layer[name] = {layer: of_layers[layer].item() for layer in has_value.nonzero().flatten().tolist()}
    has_tokens = sums.num_tokens.nonzero().flatten().tolist()
    tokens_per_expert = {layer: sums.tokens_per_expert[layer].tolist() for layer in has_tokens}
    return RoutingRecord(by_layer, uneven, tokens_per_expert)


def _max_over_mean(load: Tensor) -> Tensor:
    """Return the maximum divided by the mean of each layer's parts; load: [layers, parts], result: [layers]."""
    return load.amax(dim=1) / load.mean(dim=1)


def _part_of_squared_gradient(chunk: DistributedDataParallel, weight: torch.nn.Parameter) -> Tensor | float:
    """Return this rank's part of the squared norm of a scaled gradient; the sum over all ranks is the squared norm.

    With a distributed optimizer, a data-parallel rank holds the summed gradient of its own share of a bucket only. So
    each rank contributes its share, even if it holds the whole gradient.

    Args:
        chunk: Model chunk with finalized gradients.
        weight: Parameter of the chunk.
    """
    if not weight.requires_grad:
        return 0.0
    tp_group = cast(Any, chunk.tp_group)  # Megatron-Core annotates None, too
    if isinstance(weight, DTensor):
        # With Megatron-FSDP, finalized parameters and gradients are shards. An empty shard has no gradient.
        own = torch.empty(0) if weight.grad is None else cast(DTensor, weight.grad).to_local()
    else:
        bucket = chunk.param_to_bucket_group[weight].param_to_bucket[weight]
        group = cast(Any, chunk.intra_dp_cp_group)
        share = -(-bucket.grad_data.numel() // group.size())
        start, end = bucket.param_to_index[weight]
        own = bucket.grad_data[max(start, group.rank() * share) : min(end, (group.rank() + 1) * share)]
    # All ranks of a tensor-parallel group, and all instances of the distributed optimizer, hold equal gradients.
    num_copies = tp_group.size() * chunk.ddp_config.num_distributed_optimizer_instances
    return torch.linalg.vector_norm(own, dtype=torch.float64).square() / num_copies
