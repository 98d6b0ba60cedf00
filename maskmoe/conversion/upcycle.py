"""Makes a MaskMoE model of a dense model: every expert starts as the dense MLP, or as a part of it.

Methods: sparse upcycling (arXiv 2212.05055); experts that start as parts of the MLP, with routers that choose all parts
together, as in "Upcycling Large Language Models into Mixture of Experts" (arXiv 2410.07524); features that are drawn
anew, as in Drop-Upcycling (arXiv 2502.19261).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from maskmoe.conversion.blocks import Block, Copy, JoinedSource, RearrangedSource, TensorSource
from maskmoe.conversion.families import PLAIN_EXPERTS
from maskmoe.conversion.model_tensors import tensor_shapes
from maskmoe.conversion.opened_model import OpenedModel, with_routing_mask
from maskmoe.conversion.settings import UpcycleSettings
from maskmoe.conversion.upcycled_tensors import (
    DOWN,
    GATE_UP,
    ROUTER,
    SHARED_EXPERT_SCALE,
    SHARED_EXPERTS,
    ChangedExperts,
    NewRouters,
    ScaledSharedExperts,
)
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask, unpack_bits


def upcycle(dense: OpenedModel, settings: UpcycleSettings, mask: RoutingMask) -> OpenedModel:
    """Make a MaskMoE model of a dense model; tensors are computed when they are read, in blocks of any size.

    The new model computes the same as the dense model, up to rounding, if the weights of a token's experts add up to 1
    and the chosen experts are whole copies of the MLP, or all parts of such copies. This holds without noise and new
    features, if k is at least 2 or every id sees one expert, and, for experts that are parts of the MLP, if each
    visible set consists of whole copies. `changes_of_function` says whether it holds.

    Args:
        dense: a model whose layers are all dense.
        settings: how experts are made.
        mask: the routing mask, for the model's vocabulary and number of layers.

    Raises:
        UserError: the model has experts already, the settings do not suit the model, or the mask does not fit.
    """
    if "sparse" in dense.config["mlp_layer_types"]:
        raise UserError("only a model without experts can be upcycled, this one has some")
    config = dense.config | _expert_fields(dense.config, settings)
    shapes = tensor_shapes(config)
    router_shapes = {name: shape for name, shape in shapes.items() if name.endswith(ROUTER)}
    copied_shapes = {name: shape for name, shape in shapes.items() if name not in router_shapes}
    # Copy all tensors but the routers, then let sources of changed tensors take precedence over the copies.
    copies = [copy for name, shape in copied_shapes.items() for copy in _copies(name, shape, settings.granularity)]
    copied = RearrangedSource(dense.source, copied_shapes, copies)
    dtype = dense.source.tensors["model.embed_tokens.weight"].dtype
    sources: list[TensorSource] = [NewRouters(router_shapes, dtype, config["initializer_range"], settings), copied]
    if settings.shared_expert:
        sources.insert(0, ScaledSharedExperts(copied))
    if settings.noise or settings.reinitialised:
        sources.insert(0, ChangedExperts(copied, dense.source, settings))
    return with_routing_mask(OpenedModel(JoinedSource(*sources), config), mask)


def changes_of_function(settings: UpcycleSettings, mask: RoutingMask) -> list[str]:
    """Return why an upcycled model computes something else than the dense model; empty if both compute the same."""
    changes = []
    if settings.noise:
        changes.append("the experts have noise")
    if settings.reinitialised:
        changes.append("parts of the experts start anew")
    if settings.topk == 1 and mask.max_visible > 1:
        changes.append("with k = 1 an expert's output is multiplied by its probability, which is below 1 where V > 1")
    if not _shows_whole_copies(mask, settings.granularity):
        changes.append(f"the mask shows some ids a part of the {settings.granularity} experts that make up the MLP")
    return changes


def _shows_whole_copies(mask: RoutingMask, granularity: int) -> bool:
    """Return whether every visible set consists of whole groups of `granularity` neighbouring experts."""
    if granularity == 1:
        return True
    for row_of_id, visible_bits in zip(mask.row_of_id, mask.visible_bits, strict=True):
        visible = unpack_bits(visible_bits[np.unique(row_of_id)], mask.num_experts)
        groups = visible.reshape(len(visible), -1, granularity)
        if (groups.any(axis=2) != groups.all(axis=2)).any():
            return False
    return True


def _expert_fields(config: Mapping[str, Any], settings: UpcycleSettings) -> dict[str, Any]:
    """Return the fields of the upcycled model's configuration that differ from the dense model's."""
    features, remainder = divmod(config["intermediate_size"], settings.granularity)
    if remainder:
        raise UserError(f"intermediate_size {config['intermediate_size']} cannot be divided by {settings.granularity}")
    return PLAIN_EXPERTS | {
        "mlp_layer_types": [
            "sparse" if sparse else "dense" for sparse in settings.is_sparse(config["num_hidden_layers"])
        ],
        "num_experts": settings.num_experts,
        "num_experts_per_tok": settings.topk,
        "moe_intermediate_size": features,
        # A softmax over a single chosen expert would be constant, and the router would get no gradient.
        "norm_topk_prob": settings.topk > 1,
        "routed_scaling_factor": settings.granularity * (SHARED_EXPERT_SCALE if settings.shared_expert else 1.0),
        "shared_expert_intermediate_size": config["intermediate_size"] if settings.shared_expert else 0,
    }


def _copies(name: str, shape: tuple[int, ...], granularity: int) -> Iterator[Copy]:
    """Yield the copies that fill a tensor of the upcycled model from the dense model's tensors."""
    mlp = name.partition(".experts.")[0]
    if name.endswith(GATE_UP):
        num_experts, rows, hidden = shape
        features = rows // 2
        for expert in range(num_experts):
            first = expert % granularity * features
            for part, projection in enumerate(("gate_proj", "up_proj")):
                source = Block(f"{mlp}.{projection}.weight", (first, 0), (features, hidden))
                yield Copy(source, Block(name, (expert, part * features, 0), (1, features, hidden)))
    elif name.endswith(DOWN):
        num_experts, hidden, features = shape
        for expert in range(num_experts):
            first = expert % granularity * features
            source = Block(f"{mlp}.down_proj.weight", (0, first), (hidden, features))
            yield Copy(source, Block(name, (expert, 0, 0), (1, hidden, features)))
    else:  # a shared expert is the whole MLP; all other tensors keep their names
        yield Copy(Block.whole(name.replace(SHARED_EXPERTS, "."), shape), Block.whole(name, shape))
