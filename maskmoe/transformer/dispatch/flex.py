"""Flex dispatch: Megatron-Core's flex dispatcher, for any number of selected experts per token.

The flex dispatcher leaves communication to a library: DeepEP, HybridEP, or NCCL-EP of Transformer Engine. HybridEP
takes the routing map, so Megatron's manager serves every routing mask. DeepEP and NCCL-EP take k expert indices for
each token, and skip an index of -1. Megatron's managers for DeepEP and NCCL-EP fill all k slots, so their method that
fills the slots is replaced.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from torch import Tensor


def select_slots(routing_map: Tensor, probs: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Turn a routing map into the form of DeepEP and NCCL-EP: slots for the selected experts of each token.

    Args:
        routing_map: Bool [tokens, experts], with at most `num_slots` experts per token.
        probs: [tokens, experts], the weights.
        num_slots: Slots of each token.

    Returns:
        [tokens, slots] each: weights, 0 in an unused slot; and expert indices (int64), -1 in an unused slot.
    """
    slot_probs, slot_experts = probs.masked_fill(~routing_map, -torch.inf).topk(num_slots, dim=-1)
    # The weight of a selected expert can be 0, too, so the routing map decides which slots are unused.
    unused = ~routing_map.gather(-1, slot_experts)
    return slot_probs.masked_fill(unused, 0), slot_experts.masked_fill(unused, -1)


def build_flex_dispatcher(*args: Any) -> MoEFlexTokenDispatcher:
    """Build `MoEFlexTokenDispatcher`, whose arguments are taken, for any number of selected experts per token."""
    dispatcher = MoEFlexTokenDispatcher(*args)
    if dispatcher.config.moe_flex_dispatcher_backend != "hybridep":
        manager: Any = dispatcher._comm_manager

        def setup_metadata(routing_map: Tensor, probs: Tensor) -> None:
            """Store weights and indices of the selected experts; both arguments are [tokens, ranks, local experts]."""
            manager.token_probs, manager.token_indices = select_slots(
                routing_map.flatten(1), probs.flatten(1), manager.router_topk
            )
            manager.num_local_tokens = len(routing_map)

        # Megatron hard-codes the classes of the managers, so replace the method of the instance.
        manager.setup_metadata = setup_metadata
    return dispatcher
