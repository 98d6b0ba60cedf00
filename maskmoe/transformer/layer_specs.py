"""Megatron-Core's layer specs with MaskMoE's modules substituted; no other file substitutes modules."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, cast

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.backends import get_backend
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder, WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from maskmoe.transformer.experts import CountsOnDeviceMLP, LocalExperts
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.routing import AuxLossTokens
from maskmoe.transformer.token_ids import gather_sequence, split_sequence
from maskmoe.transformer.torch_modules.attention import TorchDotProductAttention
from maskmoe.transformer.torch_modules.gated_delta_net import get_gated_delta_net_layer_spec
from maskmoe.transformer.torch_modules.latent_attention import LocalMLASelfAttention, keys_of_checkpoint
from maskmoe.transformer.torch_modules.norms import AllHeadsRMSNorm, TorchNorm
from maskmoe.transformer.visible_experts import VisibleExperts


class MaskMoEMultiTokenPredictionLayer(MultiTokenPredictionLayer):
    """`MultiTokenPredictionLayer` that shifts token ids correctly under sequence parallelism, too.

    Each layer embeds the tokens one position further on, and shifts `padding_mask`, which holds the token ids, along.
    The stock layer shifts only the part of the sequence that a rank holds. The last token of the part then gets id 0
    instead of the id of the next rank's first token.
    """

    def __init__(self, *args: Any, hybrid_submodules: HybridStackSubmodules | None = None, **kwargs: Any) -> None:
        # `HybridStack` does not pass `is_mtp_layer` to MoE layers. Without experts, no MoE layer has a spec.
        if hybrid_submodules is not None and isinstance(hybrid_submodules.moe_layer, ModuleSpec):
            moe_layer = hybrid_submodules.moe_layer
            moe_layer = replace(moe_layer, params={**moe_layer.params, "is_mtp_layer": True})
            hybrid_submodules = replace(hybrid_submodules, moe_layer=moe_layer)
        super().__init__(*args, hybrid_submodules=hybrid_submodules, **kwargs)

    def _get_embeddings(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> tuple:
        """Shift ids and embed them, as the overridden method does.

        `padding_mask` is this rank's part of the packed ids.
        """
        if not self.sequence_parallel or padding_mask is None:
            return super()._get_embeddings(*args, padding_mask=padding_mask, **kwargs)
        assert self.tp_group is not None
        whole = gather_sequence(padding_mask, self.tp_group)
        input_ids, position_ids, shifted, *rest = super()._get_embeddings(*args, padding_mask=whole, **kwargs)
        assert shifted is not None
        return input_ids, position_ids, split_sequence(shifted, self.tp_group), *rest


_MODULES: dict[Any, Any] = {
    FusedLayerNorm: TorchNorm,  # Megatron takes Apex's norm if Apex is installed, also for an RMSNorm
    WrappedTorchNorm: TorchNorm,
    DotProductAttention: TorchDotProductAttention,
    MoELayer: MaskMoELayer,
    SequentialMLP: LocalExperts,
    MultiTokenPredictionLayer: MaskMoEMultiTokenPredictionLayer,
}
"""Megatron-Core's modules in a spec, and the modules that replace them."""

# The submodules of a transformer layer that are a layer of their own in a hybrid model.
_ATTENTION = ("input_layernorm", "self_attention", "self_attn_bda")
_MLP = ("pre_mlp_layernorm", "mlp", "mlp_bda")


def get_maskmoe_decoder_block_spec(
    config: TransformerConfig,
    visible_experts: VisibleExperts | None,
    aux_loss_tokens: AuxLossTokens = "all",
    vp_stage: int | None = None,
    qk_layernorm_all_heads: bool = False,
) -> TransformerBlockSubmodules:
    """Return the spec of `get_gpt_decoder_block_spec` with MaskMoE layers in place of MoE layers.

    Args:
        config: The model's configuration; `transformer_impl` selects Transformer Engine or local modules.
        visible_experts: The routing mask shared by the model's routers; None for a model without experts.
        aux_loss_tokens: Tokens that load-balancing losses count, see `MaskMoERouter`.
        vp_stage: Virtual pipeline stage.
        qk_layernorm_all_heads: Normalize queries and keys over all heads, see `AllHeadsRMSNorm`.
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
    """Return any spec of Megatron-Core with MaskMoE's layers, routers, experts and norms in place of the stock ones.

    `spec` is the spec of a block, of one layer or of an MoE layer, which stays unchanged; subclasses of the stock
    modules are kept. `config.transformer_impl` must be that of the spec. The other arguments are those of
    `get_maskmoe_decoder_block_spec`.
    """
    is_local = config.transformer_impl == "local"
    modules = dict(_MODULES)
    if visible_experts is not None:
        router: Any = partial(MaskMoERouter, visible_experts=visible_experts, aux_loss_tokens=aux_loss_tokens)
        modules[TopKRouter] = router
    if is_local:
        modules[MLASelfAttention] = LocalMLASelfAttention
    # Norms of queries and keys over all heads, by the names of their fields.
    tp_group = visible_experts.pg_collection.tp if visible_experts else None
    norm: Any = partial(AllHeadsRMSNorm, tp_group=tp_group)
    norms: dict[str, Any] = {
        "q_layernorm": partial(norm, num_heads=config.num_attention_heads),
        "k_layernorm": partial(norm, num_heads=config.num_query_groups),
    }

    def substitute(node: Any) -> Any:
        if isinstance(node, SelfAttentionSubmodules) and qk_layernorm_all_heads:
            return replace(node, **norms)
        if isinstance(node, TransformerLayerSubmodules) and is_local and isinstance(config, MLATransformerConfig):
            has_experts = isinstance(node.mlp, partial) and node.mlp.func is MaskMoELayer
            return replace(node, sharded_state_dict_keys_map=keys_of_checkpoint(config, has_experts))
        return modules.get(node, node) if isinstance(node, type) else node

    return map_spec(spec, substitute)


def with_counts_on_device(spec: Any) -> Any:
    """Return any spec with `CountsOnDeviceMLP` in place of Transformer Engine's grouped experts."""
    return map_spec(spec, lambda node: CountsOnDeviceMLP if node is TEGroupedMLP else node)


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


def get_maskmoe_hybrid_stack_spec(
    config: TransformerConfig,
    visible_experts: VisibleExperts | None,
    aux_loss_tokens: AuxLossTokens = "all",
    vp_stage: int | None = None,
    qk_layernorm_all_heads: bool = False,
) -> ModuleSpec:
    """Return a spec like Megatron-Core's `hybrid_stack_spec`, with MaskMoE layers in place of MoE layers.

    The stock spec needs Transformer Engine. This spec divides the transformer layers of a GPT model between attention
    and MLP, so local modules, norms of queries and keys, and every other setting of these layers come along.

    The arguments are those of `get_maskmoe_decoder_block_spec`.
    """
    # Get the specs of a dense and of a MoE layer from a GPT model of two layers.
    two_layers = copy(config)
    two_layers.num_layers, two_layers.moe_layer_freq = 2, [0, int(visible_experts is not None)]
    layers: Any = get_gpt_decoder_layer_specs(two_layers, **backend_arguments(config))  # Megatron annotates a block
    dense, last = layers
    attention = _part(dense, _ATTENTION)
    submodules = HybridStackSubmodules(mlp_layer=_part(dense, _MLP))
    if config.multi_latent_attention:
        submodules.mla_layer = attention
    else:
        submodules.attention_layer = attention
    if visible_experts is not None:
        submodules.moe_layer = _part(last, _MLP)
    # The layers of multi-token prediction are built from the pattern, but its norms and its projection from this spec.
    if config.mtp_num_layers:
        submodules.mtp_block_spec = cast(
            Any,
            get_gpt_mtp_block_spec(config, last, config.transformer_impl == "transformer_engine", vp_stage=vp_stage),
        )
    norm = get_backend(config.transformer_impl).layer_norm(rms_norm=config.normalization == "RMSNorm")
    stack = ModuleSpec(MaskMoEHybridStack, params={"final_norm": norm}, submodules=submodules)
    stack = with_maskmoe_modules(stack, config, visible_experts, aux_loss_tokens, qk_layernorm_all_heads)
    # These layers have no counterpart in a GPT model.
    stack.submodules.gdn_layer = get_gated_delta_net_layer_spec(config)
    stack.submodules.mamba_layer = cast(Any, hybrid_stack_spec.submodules).mamba_layer
    return stack


def _part(layer: ModuleSpec, names: tuple[str, ...]) -> ModuleSpec:
    """Return the spec of a part of a transformer layer: the submodules with the given names."""
    whole = cast(TransformerLayerSubmodules, layer.submodules)
    submodules: dict[str, Any] = {name: getattr(whole, name) for name in (*names, "sharded_state_dict_keys_map")}
    return replace(layer, submodules=TransformerLayerSubmodules(**submodules))


class MaskMoEHybridStack(HybridStack):
    """`HybridStack` whose final norm comes from the spec; the stock class always uses Transformer Engine's norm.

    With sequence parallelism, tensor-parallel ranks draw different random numbers, as in `TransformerBlock`: the stock
    class would drop the same elements of the tokens of all ranks.

    Raises:
        ValueError: `submodules` has no spec for the symbol of a layer, which `HybridStack` would silently leave out.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        final_norm: LayerNormBuilder,
        post_layer_norm: bool = True,
        post_process: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, post_process=post_process, **kwargs)
        missing = {
            symbol
            for symbol, layer in zip(self.layer_type_list, self.layers, strict=True)
            if isinstance(layer, IdentityOp)
        }
        if missing:
            raise ValueError(f"there is no layer for the symbols {', '.join(sorted(missing))} with these settings")
        self.post_layer_norm = post_layer_norm
        if post_process and post_layer_norm:
            norm: Any = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            self.final_norm = norm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute all layers, with random numbers of this rank under sequence parallelism."""
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork() if self.config.sequence_parallel else nullcontext():
            return super().forward(*args, **kwargs)
