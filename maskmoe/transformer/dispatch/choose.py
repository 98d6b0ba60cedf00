"""Choose the way to dispatch, and build its dispatcher."""

from collections.abc import Callable

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_size
from torch import Tensor

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.one_copy import OneCopyDispatcher, OneRankDispatcher, unchanged
from maskmoe.transformer.dispatch.planned import PlannedDispatcher
from maskmoe.transformer.dispatch.protocol import Dispatcher
from maskmoe.transformer.dispatch.stock import StockDispatcher


def choose_dispatch(
    config: TransformerConfig, pg_collection: ProcessGroupCollection, is_rank_local: bool, is_mtp_layer: bool = False
) -> DispatchKind:
    """Return the fastest kind of dispatch that supports all settings.

    The mask is rank-local if all visible experts of every id are on one expert-parallel rank.
    """
    if (
        config.moe_token_dispatcher_type != "alltoall"
        or get_pg_size(pg_collection.expt_tp) > 1
        or config.moe_pad_expert_input_to_capacity
        or config.moe_shared_expert_overlap
        # `MoELayer` computes the deferred gradients of the experts' weights in its own dispatch.
        or config.overlap_dispatch_backward_with_experts_wgrad
    ):
        return DispatchKind.STOCK
    if get_pg_size(pg_collection.ep) == 1:
        # Dropped tokens have no expert.
        return DispatchKind.ONE_RANK if config.moe_expert_capacity_factor is None else DispatchKind.STOCK
    # A plan lets the receiving rank choose experts. Random logits, dropped tokens and recorded choices depend on the
    # rank that chooses. A plan also states the number of selected experts, which depends on the chosen groups in
    # group-limited routing, and gathers as many ids from each rank.
    can_plan = (
        config.moe_expert_capacity_factor is None
        and not config.variable_seq_lengths
        and not config.moe_input_jitter_eps
        and not config.moe_router_force_load_balancing
        and config.moe_router_force_biased is None
        and not config.moe_enable_routing_replay
        and not config.moe_router_group_topk
    )
    # Multi-token prediction routes by shifted ids, which the plan of a micro-batch does not cover. The rows of latent
    # experts are narrower than the hidden states that a router needs.
    if is_rank_local and can_plan and not is_mtp_layer and not config.moe_latent_size:
        return DispatchKind.PLANNED
    # With one expert for each token, or on each rank, Megatron's all-to-all also sends one copy.
    one_expert_per_rank = config.num_moe_experts == get_pg_size(pg_collection.ep)
    return DispatchKind.STOCK if config.moe_router_topk == 1 or one_expert_per_rank else DispatchKind.ONE_COPY


def build_dispatcher(kind: DispatchKind, layer: MoELayer, pg_collection: ProcessGroupCollection) -> Dispatcher:
    """Build the dispatcher of an MoE layer."""
    if kind is DispatchKind.STOCK:
        return StockDispatcher(layer, pg_collection)
    if kind is DispatchKind.PLANNED:
        return PlannedDispatcher(layer.config, layer.ep_group)
    compress, expand = _projections_of_latent_experts(layer) if layer.config.moe_latent_size else (unchanged, unchanged)
    if kind is DispatchKind.ONE_RANK:
        return OneRankDispatcher(layer.config, compress, expand)
    return OneCopyDispatcher(layer.config, layer.ep_group, compress, expand)


def _projections_of_latent_experts(layer: MoELayer) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the maps of hidden states to the width of latent experts, and back."""
    return lambda hidden_states: layer.fc1_latent_proj(hidden_states)[0], lambda rows: layer.fc2_latent_proj(rows)[0]
