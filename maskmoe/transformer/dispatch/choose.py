"""Choose the way to dispatch, and build its dispatcher."""

from collections.abc import Callable

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_size
from torch import Tensor

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.one_copy import OneCopyDispatcher, OneRankDispatcher, unchanged
from maskmoe.transformer.dispatch.protocol import Dispatcher
from maskmoe.transformer.dispatch.stock import StockDispatcher


def choose_dispatch(
    config: TransformerConfig, pg_collection: ProcessGroupCollection, is_rank_local: bool, is_mtp_layer: bool = False
) -> DispatchKind:
    """Return the fastest kind of dispatch that supports all settings.

    The mask is rank-local if all visible experts of every id are on one expert-parallel rank.
    """
    num_ranks = get_pg_size(pg_collection.ep)
    if get_pg_size(pg_collection.expt_tp) > 1 or _needs_stock_dispatch(config):
        return DispatchKind.STOCK
    if num_ranks == 1:
        # Dropped tokens have no expert.
        return DispatchKind.ONE_RANK if config.moe_expert_capacity_factor is None else DispatchKind.STOCK
    # Multi-token prediction routes by shifted ids, which the plan of a micro-batch does not cover.
    if is_rank_local and not is_mtp_layer and _can_be_planned(config):
        return DispatchKind.PLANNED
    # With one expert for each token, or on each rank, Megatron's all-to-all also sends one copy.
    if config.moe_router_topk == 1 or config.num_moe_experts == num_ranks:
        return DispatchKind.STOCK
    return DispatchKind.ONE_COPY


def _needs_stock_dispatch(config: TransformerConfig) -> bool:
    """Return whether a setting needs Megatron's own dispatcher."""
    return bool(
        config.moe_token_dispatcher_type != "alltoall"
        or config.moe_pad_expert_input_to_capacity
        or config.moe_shared_expert_overlap
        or config.overlap_moe_expert_parallel_comm
    )


def _can_be_planned(config: TransformerConfig) -> bool:
    """Return whether ids tell the number of experts that are selected for a token."""
    return config.moe_expert_capacity_factor is None and not config.moe_router_group_topk


def build_dispatcher(kind: DispatchKind, layer: MoELayer, pg_collection: ProcessGroupCollection) -> Dispatcher:
    """Build the dispatcher of an MoE layer."""
    if kind is DispatchKind.STOCK:
        return StockDispatcher(layer, pg_collection)
    compress, expand = _projections_of_latent_experts(layer) if layer.config.moe_latent_size else (unchanged, unchanged)
    if kind is DispatchKind.ONE_RANK:
        return OneRankDispatcher(layer.config, compress, expand)
    return OneCopyDispatcher(layer.config, layer.ep_group, kind is DispatchKind.PLANNED, compress, expand)


def _projections_of_latent_experts(layer: MoELayer) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the maps of hidden states to the width of latent experts, and back."""
    return lambda hidden_states: layer.fc1_latent_proj(hidden_states)[0], lambda rows: layer.fc2_latent_proj(rows)[0]
