"""Megatron-Core's layer specs with MaskMoE's modules substituted; no other file substitutes modules."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.moe_module_specs import _build_shared_experts
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
)
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from maskmoe.transformer.experts import GroupedMLP
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.multi_token_prediction import MaskMoEMultiTokenPredictionLayer
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.router_sums import AuxLossTokens
from maskmoe.transformer.torch_modules.all_heads_norm import AllHeadsRMSNorm
from maskmoe.transformer.torch_modules.attention import TorchDotProductAttention
from maskmoe.transformer.torch_modules.latent_attention import LocalMLASelfAttention, keys_of_checkpoint
from maskmoe.transformer.torch_modules.mlp import TorchMLP, TorchSharedExpertMLP
from maskmoe.transformer.torch_modules.replicated_linear import ReplicatedLinear
from maskmoe.transformer.torch_modules.torch_norm import TorchNorm
from maskmoe.transformer.transformer_layer import MaskMoETransformerLayer
from maskmoe.transformer.visible_experts import VisibleExperts

_REPLACEMENTS: dict[Any, Any] = {
    WrappedTorchNorm: TorchNorm,
    DotProductAttention: TorchDotProductAttention,
    MLP.as_mlp_submodule: TorchMLP.as_mlp_submodule,
    MoELayer: MaskMoELayer,
    SequentialMLP: GroupedMLP,
    TransformerLayer: MaskMoETransformerLayer,
    MultiTokenPredictionLayer: MaskMoEMultiTokenPredictionLayer,
}
"""Modules of Megatron-Core and functions that build them, and their replacements."""


def get_maskmoe_decoder_block_spec(
    config: TransformerConfig,
    visible_experts: VisibleExperts | None,
    aux_loss_tokens: AuxLossTokens = "all",
    vp_stage: int | None = None,
    qk_layernorm_all_heads: bool = False,
) -> TransformerBlockSubmodules:
    """Return the spec of `get_gpt_decoder_block_spec` with MaskMoE layers in place of MoE layers.

    Args:
        config: the model's configuration; `transformer_impl` selects Transformer Engine or local modules.
        visible_experts: the routing mask shared by the model's routers; None for a model without experts.
        aux_loss_tokens: tokens that load-balancing losses count, see `MaskMoERouter`.
        vp_stage: virtual pipeline stage.
        qk_layernorm_all_heads: normalize queries and keys over all heads, see `AllHeadsRMSNorm`.
    """
    block = get_gpt_decoder_block_spec(config, vp_stage=vp_stage, **backend_arguments(config))
    return with_maskmoe_modules(block, config, visible_experts, aux_loss_tokens, qk_layernorm_all_heads)


def get_maskmoe_mtp_block_spec(
    config: TransformerConfig,
    visible_experts: VisibleExperts | None,
    aux_loss_tokens: AuxLossTokens = "all",
    vp_stage: int | None = None,
    qk_layernorm_all_heads: bool = False,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the spec of `get_gpt_mtp_block_spec`, which repeats the last decoder layer, with MaskMoE layers.

    The arguments are those of `get_maskmoe_decoder_block_spec`. Returns None if the pipeline stage has no
    multi-token prediction.
    """
    backend = backend_arguments(config)
    block = get_gpt_mtp_block_spec(
        config,
        get_gpt_decoder_layer_specs(config, **backend)[-1],  # pyrefly: ignore[bad-index]  # Megatron annotates a block
        use_transformer_engine=backend["use_transformer_engine"],
        vp_stage=vp_stage,
    )
    return with_maskmoe_modules(block, config, visible_experts, aux_loss_tokens, qk_layernorm_all_heads)


def backend_arguments(config: TransformerConfig) -> dict[str, Any]:
    """Return the arguments that make Megatron-Core's functions select modules."""
    return {
        "use_transformer_engine": config.transformer_impl == "transformer_engine",
        "normalization": config.normalization,
        "qk_l2_norm": config.qk_l2_norm,
    }


def with_maskmoe_modules(
    spec: Any,
    config: TransformerConfig,
    visible_experts: VisibleExperts | None,
    aux_loss_tokens: AuxLossTokens = "all",
    qk_layernorm_all_heads: bool = False,
) -> Any:
    """Return the spec with MaskMoE's layers, routers, experts and norms; see `get_maskmoe_decoder_block_spec`."""
    heads, query_groups = config.num_attention_heads, config.num_query_groups
    is_local = config.transformer_impl == "local"

    def substitute(node: Any) -> Any:
        if isinstance(node, MoESubmodules):
            assert visible_experts is not None
            router: Any = partial(MaskMoERouter, visible_experts=visible_experts, aux_loss_tokens=aux_loss_tokens)
            return replace(node, router=router)
        if isinstance(node, SelfAttentionSubmodules) and qk_layernorm_all_heads:
            assert query_groups is not None  # `TransformerConfig` sets the default.
            k_layernorm = partial(AllHeadsRMSNorm, num_heads=query_groups)
            return replace(node, q_layernorm=partial(AllHeadsRMSNorm, num_heads=heads), k_layernorm=k_layernorm)
        if isinstance(node, MLASelfAttentionSubmodules) and is_local:
            return replace(node, linear_q_down_proj=ReplicatedLinear, linear_kv_down_proj=ReplicatedLinear)
        if node is MLASelfAttention and is_local:
            return LocalMLASelfAttention
        if isinstance(node, TransformerLayerSubmodules) and is_local and isinstance(config, MLATransformerConfig):
            return replace(node, sharded_state_dict_keys_map=_keys_of_latent_attention(node, config))
        if node is FusedLayerNorm and config.normalization != "LayerNorm":
            return TorchNorm  # Megatron takes Apex's norm if Apex is installed, also for an RMSNorm.
        if node is _build_shared_experts and not config.use_grouped_gemm_for_shared_expert:
            return TorchSharedExpertMLP
        return _REPLACEMENTS.get(node, node) if isinstance(node, type | MethodType) else node

    return map_spec(spec, substitute)


def _keys_of_latent_attention(layer: TransformerLayerSubmodules, config: MLATransformerConfig) -> dict[str, str]:
    """Return the `sharded_state_dict_keys_map` of a layer with multi-latent attention, see `keys_of_checkpoint`."""
    is_moe = isinstance(layer.mlp, partial) and layer.mlp.func is MaskMoELayer
    return {**keys_of_checkpoint(config), **({} if is_moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"})}


def map_spec(node: Any, substitute: Callable[[Any], Any]) -> Any:
    """Rebuild a spec, a tree of dataclasses, lists, dicts and partials, with `substitute` applied to its nodes."""
    if isinstance(node, partial):
        keywords = {name: map_spec(value, substitute) for name, value in node.keywords.items()}
        return partial(map_spec(node.func, substitute), *node.args, **keywords)
    if isinstance(node, list):
        return [map_spec(child, substitute) for child in node]
    if isinstance(node, dict):
        return {name: map_spec(child, substitute) for name, child in node.items()}
    if is_dataclass(node) and not isinstance(node, type):
        children = {field.name: map_spec(getattr(node, field.name), substitute) for field in fields(node)}
        return substitute(replace(node, **children))
    return substitute(node)
