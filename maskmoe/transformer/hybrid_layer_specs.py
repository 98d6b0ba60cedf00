"""The spec of Megatron-Core's `HybridStack`, made of the halves of our GPT layers."""

from copy import copy
from dataclasses import replace
from typing import Any, cast

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from maskmoe.transformer.hybrid_stack import MaskMoEHybridStack
from maskmoe.transformer.layer_specs import backend_arguments, with_maskmoe_modules
from maskmoe.transformer.router_sums import AuxLossTokens
from maskmoe.transformer.torch_modules.gated_delta_net import get_gated_delta_net_layer_spec
from maskmoe.transformer.torch_modules.torch_norm import TorchNorm
from maskmoe.transformer.visible_experts import VisibleExperts

_ATTENTION = ("input_layernorm", "self_attention", "self_attn_bda")
_MLP = ("pre_mlp_layernorm", "mlp", "mlp_bda")


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
    two_layers.num_layers, two_layers.pipeline_model_parallel_size = 2, 1
    two_layers.virtual_pipeline_model_parallel_size = None
    two_layers.num_layers_in_first_pipeline_stage = two_layers.num_layers_in_last_pipeline_stage = None
    two_layers.moe_layer_freq = [0, int(visible_experts is not None)]
    backend = backend_arguments(config)
    block = get_gpt_decoder_block_spec(two_layers, **backend, pp_rank=0)
    assert block.layer_specs is not None
    dense, last = block.layer_specs
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
            Any, get_gpt_mtp_block_spec(config, last, backend["use_transformer_engine"], vp_stage=vp_stage)
        )
    stack = ModuleSpec(MaskMoEHybridStack, params={"final_norm": block.layer_norm}, submodules=submodules)
    stack = with_maskmoe_modules(stack, config, visible_experts, aux_loss_tokens, qk_layernorm_all_heads)
    # These layers have no counterpart in a GPT model.
    stack.submodules.gdn_layer = get_gated_delta_net_layer_spec(config)
    stack.submodules.mamba_layer = _mamba_layer(config)
    return stack


def _mamba_layer(config: TransformerConfig) -> ModuleSpec:
    """Return the spec of a Mamba layer: the stock one, or the same layer of local modules."""
    if config.transformer_impl != "local":
        return cast(Any, hybrid_stack_spec.submodules).mamba_layer
    projections = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    return ModuleSpec(
        MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=cast(Any, TorchNorm),
            mixer=ModuleSpec(MambaMixer, submodules=projections),
            mamba_bda=cast(Any, get_bias_dropout_add),
            sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
        ),
    )


def _part(layer: ModuleSpec, names: tuple[str, ...]) -> ModuleSpec:
    """Return the spec of a part of a transformer layer: the submodules with the given names."""
    whole = cast(TransformerLayerSubmodules, layer.submodules)
    submodules: dict[str, Any] = {name: getattr(whole, name) for name in (*names, "sharded_state_dict_keys_map")}
    return replace(layer, submodules=TransformerLayerSubmodules(**submodules))
