"""Gated delta net, layer `G` of hybrid models, also without the package `fla` and without Transformer Engine."""

import copy
from argparse import Namespace
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import get_backend
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.ssm.gated_delta_net import (
    HAVE_FLA,
    GatedDeltaNet,
    GatedDeltaNetSubmodules,
    torch_chunk_gated_delta_rule,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from maskmoe.megatron_compat import cpu
from maskmoe.megatron_compat.process_patches import building_gated_delta_net_without_fla
from maskmoe.transformer.torch_modules.norms import TorchNorm

_EPSILON = 1e-6  # of fla's `l2norm`
SIZES = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)
"""Megatron's arguments of the sizes of gated delta nets."""


class TorchGatedDeltaNet(GatedDeltaNet):
    """`GatedDeltaNet` in plain torch, with the parameters and checkpoints of the stock class.

    The stock class needs fla. This class computes what the stock class computes in deterministic mode, except that it
    normalizes queries and keys itself, for which the stock class calls fla also in that mode. Packed documents are
    refused, as in that mode.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.deterministic_mode = True
        with building_gated_delta_net_without_fla():
            super().__init__(config, *args, use_qk_l2norm=False, **kwargs)
        self.gated_delta_rule = _normalized_gated_delta_rule  # pyrefly: ignore[bad-assignment]  # names of arguments


def _normalized_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """Scale queries and keys to length 1, and compute the gated delta rule (arXiv 2412.06464) in fp32.

    All tensors are [batch, sequence, value heads, channels]; the result has the dtype of `v`. The state after the last
    token is returned, too.
    """
    q, k = (
        heads * torch.rsqrt(heads.square().sum(dim=-1, keepdim=True) + _EPSILON) for heads in (q.float(), k.float())
    )
    output, state = torch_chunk_gated_delta_rule(q, k, v, **arguments)
    return output.to(v.dtype), state


def uses_fla() -> bool:
    """Return whether layers are computed by fla, whose kernels need a GPU."""
    return HAVE_FLA and not cpu.is_installed()


def get_gated_delta_net_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Return the spec of a transformer layer with a gated delta net and without MLP.

    With Transformer Engine and fla, the modules are those of Megatron-Core's `hybrid_stack_spec`. Local modules save
    the norm before the layer by the name that it has in a checkpoint of Transformer Engine.
    """
    backend = get_backend(config.transformer_impl)
    is_local = config.transformer_impl == "local"
    norm: Any = TorchNorm if is_local else backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    projection: Any = backend.column_parallel_linear() if is_local else backend.column_parallel_layer_norm_linear()
    attention = ModuleSpec(
        GatedDeltaNet if uses_fla() else TorchGatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(in_proj=projection, out_norm=norm, out_proj=backend.row_parallel_linear()),
    )
    bias_dropout_add: Any = get_bias_dropout_add
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm if is_local else IdentityOp,
            self_attention=attention,
            self_attn_bda=bias_dropout_add,
            sharded_state_dict_keys_map={"input_layernorm.": "self_attention.in_proj.layer_norm_"} if is_local else {},
        ),
    )


def check_gated_delta_net(args: Namespace, has_fla: bool) -> str | None:
    """Return why layers G would silently compute something else with the given settings; None if they would not.

    Megatron need not have validated the arguments. `has_fla`: the machines that train have GPUs and fla.
    """
    if Symbols.GDN not in (args.hybrid_layer_pattern or ""):
        return None
    if not args.swiglu:
        return (
            "Layers G of --hybrid-layer-pattern need --swiglu. They apply the activation function of the MLPs to their "
            "convolution, and fla computes SiLU only."
        )
    if args.dataloader_inter_document_masking:
        if has_fla and args.transformer_impl == "transformer_engine" and not args.deterministic_mode:
            return None
        return (
            "--dataloader-inter-document-masking is not supported with layers G of --hybrid-layer-pattern in plain "
            "torch, which pass their state from document to document. It needs the package fla and --transformer-impl "
            "transformer_engine, without --deterministic-mode."
        )
    if args.reset_attention_mask:
        return (
            "--reset-attention-mask is not supported with layers G of --hybrid-layer-pattern, which ignore the mask "
            "and pass their state from document to document. Leave the flag out."
        )
    return None
