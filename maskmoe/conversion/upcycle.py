"""Makes a MaskMoE model of a dense model: every expert starts as the dense MLP, or as a part of it.

Methods: sparse upcycling (arXiv 2212.05055), and experts that start as parts of the MLP, with routers that choose all
parts together, as in "Upcycling Large Language Models into Mixture of Experts" (arXiv 2410.07524).
"""

from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from maskmoe.conversion.model_tensors import (
    OpenedModel,
    expert_projections,
    make_config,
    mtp_tensor_shapes,
    tensor_shapes,
    with_routing_mask,
)
from maskmoe.conversion.settings import UpcycleSettings
from maskmoe.conversion.tensor_sources import Block, Copy, RearrangedSource, TensorSource, TensorSpec
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEConfig
from maskmoe.routing_mask.mask import RoutingMask

# A layer with a shared expert adds up two copies of the MLP, so each of them is scaled by one half.
_SHARED_EXPERT_SCALE = 0.5

_EXPERT_FEATURES = (
    "scoring_func",
    "use_expert_bias",
    "n_group",
    "topk_group",
    "shared_expert_gate",
    "router_aux_loss_coef",
)

_ROUTER = ".mlp.gate.weight"
_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"
_SHARED_EXPERTS, _SHARED_DOWN = ".shared_experts.", ".shared_experts.down_proj.weight"


def upcycle(dense: OpenedModel, settings: UpcycleSettings, mask: RoutingMask) -> OpenedModel:
    """Make a MaskMoE model of a dense model; tensors are computed when they are read, in blocks of any size.

    The new model computes the same as the dense model, up to rounding, if the weights of a token's experts add up to 1
    and the chosen experts are whole copies of the MLP, or all parts of such copies. This holds if k is at
    least 2 or every id sees one expert, and, for experts that are parts of the MLP, if each visible set consists of
    whole copies. `changes_of_function` says whether it holds.

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
    return with_routing_mask(OpenedModel(_UpcycledSource(dense.source, config, settings), config), mask)


def changes_of_function(settings: UpcycleSettings, mask: RoutingMask) -> list[str]:
    """Return why an upcycled model computes something else than the dense model; empty if both compute the same."""
    changes = []
    if settings.topk == 1 and mask.max_visible > 1:
        changes.append("with k = 1 an expert's output is multiplied by its probability, which is below 1 where V > 1")
    if not _shows_whole_copies(mask, settings.granularity):
        changes.append(f"the mask shows some ids a part of the {settings.granularity} experts that make up the MLP")
    return changes


def _shows_whole_copies(mask: RoutingMask, granularity: int) -> bool:
    """Return whether every visible set consists of whole groups of `granularity` neighbouring experts."""
    sets = (mask.visible_sets(table).reshape(mask.vocab_size, -1, granularity) for table in range(len(mask.row_of_id)))
    return granularity == 1 or all((groups.any(axis=2) == groups.all(axis=2)).all() for groups in sets)


def _upcycled_config(dense: dict[str, Any], settings: UpcycleSettings) -> dict[str, Any]:
    """Return the configuration of the upcycled model, without a routing mask, from that of the dense model."""
    features, remainder = divmod(dense["intermediate_size"], settings.granularity)
    if remainder:
        raise UserError(f"intermediate_size {dense['intermediate_size']} cannot be divided by {settings.granularity}")
    is_sparse = settings.is_sparse(dense["num_hidden_layers"])
    # The configuration of a dense model may hold anything about experts, so start from the defaults.
    plain = {name: getattr(MaskMoEConfig, name) for name in _EXPERT_FEATURES}
    experts = {
        "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in is_sparse],
        "num_experts": settings.num_experts,
        "num_experts_per_tok": settings.topk,
        "moe_intermediate_size": features,
        # A softmax over a single chosen expert would be constant, and the router would get no gradient.
        "norm_topk_prob": settings.topk > 1,
        "routed_scaling_factor": settings.granularity * (_SHARED_EXPERT_SCALE if settings.shared_expert else 1.0),
        "shared_expert_intermediate_size": dense["intermediate_size"] if settings.shared_expert else 0,
    }
    return make_config(MaskMoEConfig, dense | plain | experts).to_dict() | {"routing_mask": None}


def _copies(name: str, shape: tuple[int, ...], granularity: int) -> Iterator[Copy]:
    """Yield the copies that fill a tensor of the upcycled model from the dense model's tensors."""
    if not name.endswith((_GATE_UP, _DOWN)):  # a shared expert is the whole MLP; all other tensors keep their names
        yield Copy(Block.whole(name.replace(_SHARED_EXPERTS, "."), shape), Block.whole(name, shape))
        return
    for expert, projection, target in expert_projections(name, shape):
        _, rows, columns = target.sizes
        part = expert % granularity
        start = (0, part * columns) if projection == "down" else (part * rows, 0)
        yield Copy(Block(f"{name.partition('.experts.')[0]}.{projection}_proj.weight", start, (rows, columns)), target)


class _UpcycledSource:
    """Provides the tensors of an upcycled model: copies of the dense model's tensors, and new routers.

    Args:
        dense: Provides the tensors of the dense model.
        config: The configuration of the upcycled model.
        settings: How experts are made.
    """

    def __init__(self, dense: TensorSource, config: Mapping[str, Any], settings: UpcycleSettings) -> None:
        shapes = tensor_shapes(config) | mtp_tensor_shapes(config)
        copied = {name: shape for name, shape in shapes.items() if not name.endswith(_ROUTER)}
        copies = [copy for name, shape in copied.items() for copy in _copies(name, shape, settings.granularity)]
        self._copied = RearrangedSource(dense, copied, copies)
        dtype = dense.tensors["model.embed_tokens.weight"].dtype
        self.tensors = {name: TensorSpec(shape, dtype) for name, shape in shapes.items()} | self._copied.tensors
        self._router_std = config["initializer_range"]
        self._settings = settings

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        if block.tensor.endswith(_ROUTER):
            return self._draw_router(block.tensor)[block.slices]
        if block.tensor.endswith(_SHARED_DOWN):
            return self._copied.read(block) * _SHARED_EXPERT_SCALE
        return self._copied.read(block)

    def _draw_router(self, name: str) -> Tensor:
        """Draw a router from a normal distribution; the experts that make up one copy of the MLP have equal rows.

        The weights depend on the seed and the name only, so that a router can be read in blocks.
        """
        num_experts, hidden = self.tensors[name].shape
        sequence = np.random.SeedSequence(self._settings.seed, spawn_key=(crc32(name.encode()),))
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        copy_rows = torch.empty(num_experts // self._settings.granularity, hidden)
        copy_rows.normal_(std=self._router_std, generator=generator)
        weight = copy_rows.repeat_interleave(self._settings.granularity, dim=0)
        return weight.to(self.tensors[name].dtype)
