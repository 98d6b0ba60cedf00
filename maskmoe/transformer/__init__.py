"""The layers, models and layer specs of MaskMoE for Megatron-Core; `__all__` is the public API.

On a machine without a GPU, call `maskmoe.megatron_compat.prepare_process` before this package is imported, which
imports megatron.
"""

from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.layer_specs import (
    get_maskmoe_decoder_block_spec,
    get_maskmoe_hybrid_stack_spec,
    get_maskmoe_mtp_block_spec,
    with_maskmoe_modules,
)
from maskmoe.transformer.models import MaskMoEGPTModel, MaskMoEHybridModel
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import VisibleExperts

__all__ = [
    "MaskMoEGPTModel",
    "MaskMoEHybridModel",
    "MaskMoELayer",
    "MaskMoERouter",
    "RoutingMask",
    "TokenIds",
    "VisibleExperts",
    "get_maskmoe_decoder_block_spec",
    "get_maskmoe_hybrid_stack_spec",
    "get_maskmoe_mtp_block_spec",
    "with_maskmoe_modules",
]
