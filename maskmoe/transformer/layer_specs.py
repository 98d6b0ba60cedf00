"""Megatron-Core's own layer specs with our modules in the place of theirs."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_decoder_layer_specs
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.router import AuxLossTokens, MaskMoERouter
from maskmoe.transformer.torch_norm import build_torch_norm
from maskmoe.transformer.visible_experts import VisibleExperts


def get_maskmoe_decoder_block_spec(
    config: TransformerConfig,
    visible_experts: VisibleExperts,
    aux_loss_tokens: AuxLossTokens = "all",
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The spec of `get_gpt_decoder_block_spec` with MaskMoE layers where it has MoE layers.

    Args:
        config: the model's configuration; `transformer_impl` chooses Transformer Engine or local modules.
        visible_experts: the routing mask shared by the model's routers.
        aux_loss_tokens: see `MaskMoERouter`.
        vp_stage: virtual pipeline stage.
    """
    block = get_gpt_decoder_block_spec(config, vp_stage=vp_stage, **_backend(config))
    return _with_maskmoe_modules(block, visible_experts, aux_loss_tokens)


def get_maskmoe_mtp_layer_spec(
    config: TransformerConfig, visible_experts: VisibleExperts, aux_loss_tokens: AuxLossTokens = "all"
) -> Any:
    """The spec of the last decoder layer, which multi-token prediction repeats; arguments as for the block's spec."""
    last_layer = get_gpt_decoder_layer_specs(config, **_backend(config))[-1]
    return _with_maskmoe_modules(last_layer, visible_experts, aux_loss_tokens)


def _backend(config: TransformerConfig) -> dict[str, Any]:
    return {
        "use_transformer_engine": config.transformer_impl == "transformer_engine",
        "normalization": config.normalization,
        "qk_l2_norm": config.qk_l2_norm,
    }


def _with_maskmoe_modules(spec: Any, visible_experts: VisibleExperts, aux_loss_tokens: AuxLossTokens) -> Any:
    router = partial(MaskMoERouter, visible_experts=visible_experts, aux_loss_tokens=aux_loss_tokens)

    def substitute(node: Any) -> Any:
        if node is WrappedTorchNorm:
            return build_torch_norm
        if node is MoELayer:
            return MaskMoELayer
        if isinstance(node, MoESubmodules):
            return replace(node, router=router)
        return node

    return _map_spec(spec, substitute)


def _map_spec(node: Any, substitute: Callable[[Any], Any]) -> Any:
    """Rebuild a spec, a tree of dataclasses, lists and partials, with `substitute` applied to its nodes."""
    if isinstance(node, partial):
        keywords = {name: _map_spec(value, substitute) for name, value in node.keywords.items()}
        return partial(_map_spec(node.func, substitute), *node.args, **keywords)
    if isinstance(node, list):
        return [_map_spec(child, substitute) for child in node]
    if is_dataclass(node) and not isinstance(node, type):
        children = {field.name: _map_spec(getattr(node, field.name), substitute) for field in fields(node)}
        return substitute(replace(node, **children))
    return substitute(node)
