"""Makes a MaskMoE model of a dense model: every expert starts as the dense MLP (sparse upcycling, arXiv 2212.05055)."""

from typing import Any

import torch

from maskmoe.conversion.families import PROJECTIONS, Naming
from maskmoe.conversion.model_tensors import (
    OpenedModel,
    make_config,
    mtp_tensor_shapes,
    tensor_shapes,
    with_routing_mask,
)
from maskmoe.conversion.settings import UpcycleSettings
from maskmoe.conversion.tensor_sources import JoinedSource, MemorySource, RearrangedSource
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEConfig
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask

# Settings of experts that a dense model's configuration may hold, too.
_EXPERT_FEATURES = (
    "scoring_func",
    "use_expert_bias",
    "n_group",
    "topk_group",
    "shared_expert_gate",
    "router_aux_loss_coef",
)
_ROUTER = ".mlp.gate.weight"
_EVERY_EXPERT_IS_THE_MLP = Naming(PROJECTIONS, experts=".")


def upcycle(dense: OpenedModel, settings: UpcycleSettings, mask: RoutingMask) -> OpenedModel:
    """Make a MaskMoE model of a dense model, whose tensors are read on demand; only the new routers are in memory.

    The new model computes the same as the dense model, up to rounding, if the weights of a token's experts add up to 1.
    This holds if k is at least 2 or every id sees one expert, see `changes_function`. It keeps the dense model's
    arguments of Megatron, which writing a checkpoint updates by the new configuration.

    Args:
        dense: A model whose layers are all dense.
        settings: How experts are made.
        mask: The routing mask, for the model's vocabulary and for all its layers or those with experts.

    Raises:
        UserError: The model has experts already, the settings do not suit the model, or the mask does not fit.
    """
    if "sparse" in dense.config["mlp_layer_types"]:
        raise UserError("only a model without experts can be upcycled, this one has some")
    config = _upcycled_config(dense.config, settings)
    shapes = tensor_shapes(config) | mtp_tensor_shapes(config)
    copied = {name: shape for name, shape in shapes.items() if not name.endswith(_ROUTER)}
    dtype = dense.source.tensors["model.embed_tokens.weight"].dtype
    generator = torch.Generator().manual_seed(settings.seed)
    routers = {
        name: torch.empty(shape).normal_(std=config["initializer_range"], generator=generator).to(dtype)
        for name, shape in shapes.items()
        if name not in copied
    }
    experts = RearrangedSource(dense.source, copied, _EVERY_EXPERT_IS_THE_MLP.copies(copied))
    return with_routing_mask(OpenedModel(JoinedSource(MemorySource(routers), experts), config, dense.args), mask)


def changes_function(settings: UpcycleSettings, mask: RoutingMask) -> bool:
    """Return whether an upcycled model computes something else than the dense model.

    With k = 1 an expert's output is multiplied by its probability, which is below 1 for ids that see several experts.
    """
    return settings.topk == 1 and mask.max_visible > 1


def _upcycled_config(dense: dict[str, Any], settings: UpcycleSettings) -> dict[str, Any]:
    """Return the configuration of the upcycled model, without a routing mask, from that of the dense model."""
    layers = FeedForwardLayers.of_frequency(settings.moe_layer_freq, dense["num_hidden_layers"])
    # The configuration of a dense model may hold anything about experts, so start from the defaults.
    plain = {name: getattr(MaskMoEConfig, name) for name in _EXPERT_FEATURES}
    experts = {
        "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in layers.decoder],
        "num_experts": settings.num_experts,
        "num_experts_per_tok": settings.topk,
        "moe_intermediate_size": dense["intermediate_size"],
        # A softmax over a single chosen expert would be constant, and the router would get no gradient.
        "norm_topk_prob": settings.topk > 1,
        "routed_scaling_factor": 1.0,
        "shared_expert_intermediate_size": 0,
    }
    return make_config(MaskMoEConfig, dense | plain | experts).to_dict() | {"routing_mask": None}
