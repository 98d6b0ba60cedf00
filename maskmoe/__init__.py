"""MaskMoE: token-aware mixture-of-experts pretraining on Megatron-Core; `__all__` is the public API.

The names are imported when they are used, so that the data tools need no torch. On a machine without a GPU, call
`prepare_process` first: most names import megatron.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskmoe.megatron_compat import prepare_process
    from maskmoe.routing_mask.known_routing import ExpertLayout, plan
    from maskmoe.routing_mask.mask import RoutingMask
    from maskmoe.training.model.batch import build_datasets, get_batch, loss_function, token_losses
    from maskmoe.training.model.model_builder import MaskMoEModelConfig, embedding_ranks_of
    from maskmoe.training.rank_process import run_program
    from maskmoe.training.settings.arguments import add_maskmoe_arguments
    from maskmoe.transformer.layer_specs import (
        get_maskmoe_decoder_block_spec,
        get_maskmoe_hybrid_stack_spec,
        get_maskmoe_mtp_block_spec,
        with_maskmoe_modules,
    )
    from maskmoe.transformer.models import MaskMoEGPTModel, MaskMoEHybridModel
    from maskmoe.transformer.visible_experts import VisibleExperts

__version__ = "0.2.1"

_NAMES = {
    "megatron_compat": ["prepare_process"],
    "routing_mask.known_routing": ["ExpertLayout", "plan"],
    "routing_mask.mask": ["RoutingMask"],
    "training.model.batch": ["build_datasets", "get_batch", "loss_function", "token_losses"],
    "training.model.model_builder": ["MaskMoEModelConfig", "embedding_ranks_of"],
    "training.rank_process": ["run_program"],
    "training.settings.arguments": ["add_maskmoe_arguments"],
    "transformer.layer_specs": [
        "get_maskmoe_decoder_block_spec",
        "get_maskmoe_hybrid_stack_spec",
        "get_maskmoe_mtp_block_spec",
        "with_maskmoe_modules",
    ],
    "transformer.models": ["MaskMoEGPTModel", "MaskMoEHybridModel"],
    "transformer.visible_experts": ["VisibleExperts"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
