"""How tokens are routed, layer by layer, in the training log, TensorBoard and W&B."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, is_last_rank
from torch import Tensor

from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.routing_statistics import RoutingSums

_MOST_ROWS = "rank_rows_max"

# Expert activations take half as much memory again as they would if routing were even.
_UNEVEN = 1.5


@dataclass(frozen=True)
class RoutingRecord:
    """How the tokens of some iterations were routed, on all ranks.

    Attributes:
        of_layer: by name of the scalar, its value by index of the MoE layer, counting from 0 as Megatron's tags do.
            Layers of multi-token prediction follow the decoder's. Those without a value are left out.

            - `expert_load_max_over_mean`: tokens of the expert that got most, over the mean of all experts.
            - `rank_load_max_over_mean`: the same of the expert-parallel ranks, if there are several.
            - `rank_rows_max`: the most rows that the experts of one rank got in one micro-batch, if there are several.
            - `routing_entropy`: of the masked probabilities, in nats; mean over tokens with V >= 2. At most ln V.
            - `single_expert_token_share`: tokens with V = 1.
            - `router_grad_norm`: of the router's weight in the last iteration, over the whole model, before clipping.
        uneven: the index of the layer whose `rank_rows_max` is furthest from the mean rows of a micro-batch, and the
            ratio; None with one expert-parallel rank.
    """

    of_layer: dict[str, dict[int, float]]
    uneven: tuple[int, float] | None

    @property
    def overall(self) -> dict[str, float]:
        """The mean over the layers, as Megatron has it; of the most rows, the most."""
        return {
            name: max(values.values()) if name == _MOST_ROWS else sum(values.values()) / len(values)
            for name, values in self.of_layer.items()
            if values
        }

    def scalars(self) -> dict[str, float]:
        """What goes to TensorBoard and W&B, by tag: overall values and those of layers, named as Megatron's are."""
        by_layer = {
            f"moe/{name}_layer_{layer}": value
            for name, values in self.of_layer.items()
            for layer, value in values.items()
        }
        return self.overall | by_layer

    def __str__(self) -> str:
        values = (f" {name.replace('_', ' ')}: {value:.4g} |" for name, value in self.overall.items())
        return f" routing |{''.join(values)}"


class RoutingLog:
    """Finalizes gradients as Megatron-Core does and, every `interval` iterations, logs the routing since the last time.

    To be a model's `finalize_model_grads_func`, which the pipeline schedules call on all ranks once in every iteration,
    when gradients are whole and not yet clipped. What was counted is not saved: after a restart, the first interval is
    what is left of it.

    Args:
        interval: iterations.
    """

    def __init__(self, interval: int):
        self._interval = interval
        self._has_warned = False

    def __call__(
        self,
        model: Sequence[DistributedDataParallel],
        num_tokens: Tensor | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        force_all_reduce: bool | None = False,
    ) -> None:
        """Finalize the gradients of this rank's model chunks; a collective call. Arguments: Megatron-Core's."""
        finalize_model_grads(model, num_tokens, pg_collection, force_all_reduce)
        iteration = get_args().curr_iteration + 1
        if iteration % self._interval == 0:
            record = take_record(model)
            if is_last_rank():
                self._write(record, iteration)

    def _write(self, record: RoutingRecord, iteration: int) -> None:
        print(record, flush=True)
        scalars = record.scalars()
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
                f"experts got {record.of_layer[_MOST_ROWS][layer]:.0f} rows in one micro-batch, {ratio:.2f} times the "
                f"mean. This is said once; see `{_MOST_ROWS}` in TensorBoard. A balanced mask or a larger "
                "--moe-aux-loss-coeff evens it out",
                file=sys.stderr,
                flush=True,
            )


def take_record(model: Sequence[DistributedDataParallel]) -> RoutingRecord:
    """What all ranks have counted since the last call; a collective call, and the host waits for it.

    Args:
        model: this rank's chunks, with gradients that are finalized.
    """
    config = get_model_config(model[0])
    num_layers = config.num_layers + (config.mtp_num_layers or 0)
    device = torch.cuda.current_device()
    row_size = 1 + RoutingSums.packed_size(config.num_moe_experts)
    sums = torch.zeros(num_layers, row_size, dtype=torch.float64, device=device)
    most_rows = torch.zeros(num_layers, dtype=torch.int64, device=device)
    for chunk in model:
        for router in chunk.modules():
            if isinstance(router, MaskMoERouter):
                layer = router.number_in_model - 1
                sums[layer, 0] = _part_of_squared_gradient(chunk, router.weight)
                sums[layer, 1:], most_rows[layer] = router.statistics.take()
    torch.distributed.all_reduce(sums)
    if config.expert_model_parallel_size > 1:
        torch.distributed.all_reduce(most_rows, op=torch.distributed.ReduceOp.MAX)
    grad_norms = sums[:, 0].sqrt() / _gradient_scale(config)
    return _record_of(
        RoutingSums.unpack(sums[:, 1:].cpu()), most_rows.cpu(), grad_norms.cpu(), config.expert_model_parallel_size
    )


def _record_of(sums: RoutingSums, most_rows: Tensor, grad_norms: Tensor, num_ep_ranks: int) -> RoutingRecord:
    """The record of all layers [layers] from sums over all ranks.

    Args:
        sums: of all layers.
        most_rows: int64 [layers], the most rows of a rank in a micro-batch.
        grad_norms: [layers].
        num_ep_ranks: each has an equal, contiguous share of the experts.
    """

    def of_layers(values: Tensor, has_value: Tensor) -> dict[int, float]:
        return {layer: values[layer].item() for layer in has_value.nonzero().flatten().tolist()}

    has_tokens = sums.num_tokens > 0
    of_layer = {"expert_load_max_over_mean": of_layers(_max_over_mean(sums.tokens_per_expert), has_tokens)}
    uneven = None
    if num_ep_ranks > 1:
        tokens_per_rank = sums.tokens_per_expert.unflatten(1, (num_ep_ranks, -1)).sum(dim=-1)
        of_layer["rank_load_max_over_mean"] = of_layers(_max_over_mean(tokens_per_rank), has_tokens)
        of_layer[_MOST_ROWS] = of_layers(most_rows, has_tokens)
        ratios = (most_rows * sums.num_micro_batches / sums.num_rows).nan_to_num()
        uneven = int(ratios.argmax()), ratios.max().item()
    of_layer["routing_entropy"] = of_layers(sums.entropy / sums.num_routable, sums.num_routable > 0)
    of_layer["single_expert_token_share"] = of_layers(1 - sums.num_routable / sums.num_tokens, has_tokens)
    of_layer["router_grad_norm"] = of_layers(grad_norms, has_tokens)
    return RoutingRecord(of_layer, uneven)


def _max_over_mean(load: Tensor) -> Tensor:
    """Of `[layers, parts]`, for each layer."""
    return load.amax(dim=1) / load.mean(dim=1)


def _part_of_squared_gradient(chunk: DistributedDataParallel, weight: torch.nn.Parameter) -> Tensor | float:
    """This rank's part of the squared norm of a gradient, of which all ranks' parts are the sum; still scaled.

    A distributed optimizer leaves each data-parallel rank with the sum of its own share of a bucket only. So each rank
    looks at that share, also where it has all.
    """
    if not weight.requires_grad:
        return 0.0
    bucket = chunk.param_to_bucket_group[weight].param_to_bucket[weight]
    group = chunk.intra_dp_cp_group
    share = -(-bucket.grad_data.numel() // group.size())
    start, end = bucket.param_to_index[weight]
    own = bucket.grad_data[max(start, group.rank() * share) : min(end, (group.rank() + 1) * share)]
    # Ranks of a tensor-parallel group, and instances of the distributed optimizer, have the same.
    num_copies = chunk.tp_group.size() * chunk.ddp_config.num_distributed_optimizer_instances
    return torch.linalg.vector_norm(own, dtype=torch.float64).square() / num_copies


def _gradient_scale(config: TransformerConfig) -> Tensor | float:
    """By what gradients are too large: the loss scale of fp16, else 1."""
    return 1.0 if config.grad_scale_func is None else config.grad_scale_func(1.0)
