"""Makes a MaskMoE model of a dense model: every expert starts as the dense MLP, or as a part of it.

Methods: sparse upcycling (arXiv 2212.05055), and experts that start as parts of the MLP, with routers that choose all
parts together, as in "Upcycling Large Language Models into Mixture of Experts" (arXiv 2410.07524).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from maskmoe.conversion.model_tensors import (
    OpenedModel,
    expert_projections,
    make_config,
    mtp_tensor_shapes,
    tensor_shapes,
    with_routing_mask,
)
from maskmoe.conversion.settings import UpcycleSettings
from maskmoe.conversion.tensor_sources import Block, Copy, JoinedSource, MemorySource, RearrangedSource, ScaledSource
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
_SHARED_EXPERTS, _SHARED_DOWN = ".shared_experts.", ".shared_experts.down_proj.weight"
# A layer with a shared expert adds up two copies of the MLP, so each of them is scaled by one half.
_SHARED_EXPERT_SCALE = 0.5


def upcycle(dense: OpenedModel, settings: UpcycleSettings, mask: RoutingMask) -> OpenedModel:
    """Make a MaskMoE model of a dense model, whose tensors are read on demand; only the new routers are in memory.

    The new model computes the same as the dense model, up to rounding, if the weights of a token's experts add up to 1
    and the chosen experts make up whole copies of the MLP, see `changes_of_function`. It keeps the dense model's
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
    generator, parts = torch.Generator().manual_seed(settings.seed), settings.granularity
    routers = {}
    for name, (num_experts, hidden) in ((name, shape) for name, shape in shapes.items() if name not in copied):
        # The experts that make up one copy of the MLP have equal rows, so that they are chosen together.
        rows = torch.empty(num_experts // parts, hidden).normal_(std=config["initializer_range"], generator=generator)
        routers[name] = rows.repeat_interleave(parts, dim=0).to(dtype)
    copies = RearrangedSource(dense.source, copied, _copies(copied, parts))
    experts = ScaledSource(copies, {name: _SHARED_EXPERT_SCALE for name in copied if name.endswith(_SHARED_DOWN)})
    return with_routing_mask(OpenedModel(JoinedSource(MemorySource(routers), experts), config, dense.args), mask)


def changes_of_function(settings: UpcycleSettings, mask: RoutingMask) -> list[str]:
    """Return why an upcycled model computes something else than the dense model; empty if both compute the same."""
    changes, parts = [], settings.granularity
    if settings.topk == 1 and mask.max_visible > 1:
        changes.append("with K = 1, probabilities scale outputs")
    sets = (mask.visible_sets(table).reshape(mask.vocab_size, -1, parts) for table in range(len(mask.row_of_id)))
    if parts > 1 and not all((groups.any(axis=2) == groups.all(axis=2)).all() for groups in sets):
        changes.append(f"the mask shows some ids a part of the {parts} experts that make up the MLP")
    return changes


def _copies(shapes: Mapping[str, tuple[int, ...]], granularity: int) -> Iterator[Copy]:
    """Yield the copies that fill tensors of the upcycled model from the dense model's tensors."""
    for name, shape in shapes.items():
        layer, _, of_experts = name.partition(".experts.")
        if not of_experts:  # a shared expert is the whole MLP; all other tensors keep their names
            yield Copy(Block.whole(name.replace(_SHARED_EXPERTS, "."), shape), Block.whole(name, shape))
            continue
        for expert, projection, target in expert_projections(name, shape):
            _, rows, columns = target.sizes
            part = expert % granularity
            start = (0, part * columns) if projection == "down" else (part * rows, 0)
            yield Copy(Block(f"{layer}.{projection}_proj.weight", start, (rows, columns)), target)


def _upcycled_config(dense: dict[str, Any], settings: UpcycleSettings) -> dict[str, Any]:
    """Return the configuration of the upcycled model, without a routing mask, from that of the dense model."""
    features, remainder = divmod(dense["intermediate_size"], settings.granularity)
    if remainder:
        raise UserError(f"intermediate_size {dense['intermediate_size']} cannot be divided by {settings.granularity}")
    layers = FeedForwardLayers.of_frequency(settings.moe_layer_freq, dense["num_hidden_layers"])
    # The configuration of a dense model may hold anything about experts, so start from the defaults.
    plain = {name: getattr(MaskMoEConfig, name) for name in _EXPERT_FEATURES}
    experts = {
        "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in layers.decoder],
        "num_experts": settings.num_experts,
        "num_experts_per_tok": settings.topk,
        "moe_intermediate_size": features,
        # A softmax over a single chosen expert would be constant, and the router would get no gradient.
        "norm_topk_prob": settings.topk > 1,
        "routed_scaling_factor": settings.granularity * (_SHARED_EXPERT_SCALE if settings.shared_expert else 1.0),
        "shared_expert_intermediate_size": dense["intermediate_size"] if settings.shared_expert else 0,
    }
    return make_config(MaskMoEConfig, dense | plain | experts).to_dict() | {"routing_mask": None}
