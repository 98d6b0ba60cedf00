"""The interventions of the study "choice or damping": routers and attention that replace those of a model.

Each builder is named by a program of this folder.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from widened_mask import NARROW_MASK

from maskmoe.files.run_folder import RUN_FOLDER_VARIABLE
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.model.model_builder import MaskMoEGPTModelBuilder
from maskmoe.transformer.layer_specs import map_spec
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.routing_statistics import sum_tokens
from maskmoe.transformer.selection import MaskedLogits, choose_experts, preference_scores
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import VisibleExperts

SMEARED_LAYER = 2


class GatedHashRouter(MaskMoERouter):
    """Damping without choice: every id has Hash's expert, with the weight that MaskMoE would give this expert.

    The weight is the softmax probability over the logits of the id's visible experts. An id with one visible expert has
    weight 1. Only top-1 routing with the softmax before the selection is supported.

    Attributes:
        own_expert: int64 [vocabulary], Hash's expert of each id; a part of the checkpoint.
    """

    own_expert: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("own_expert", torch.zeros(self.visible_experts.vocab_size, dtype=torch.long))

    def set_layer_number(self, layer_number: int) -> None:
        """Set the number of the layer, and read Hash's experts of this layer; an evaluation loads them instead."""
        super().set_layer_number(layer_number)
        narrow = Path(os.environ.get(RUN_FOLDER_VARIABLE, "")) / NARROW_MASK
        if narrow.is_file():
            self.own_expert.copy_(torch.from_numpy(RoutingMask.load(narrow).visible_sets(self.table)).long().argmax(1))

    def routing(self, logits: Tensor, token_ids: TokenIds) -> tuple[Tensor, Tensor]:
        """Give each token the expert of its id; arguments and result are those of `MaskMoERouter.routing`."""
        visible = self.visible_experts.mask_table(self.table).look_up(token_ids.ids.flatten())
        masked = MaskedLogits.mask(logits, visible, token_ids, self.score_function)
        experts = self.own_expert[token_ids.ids.flatten()]  # [tokens]
        routing_map = torch.nn.functional.one_hot(experts, self.num_experts).bool()
        if self.is_recording:
            self.statistics.add_tokens(sum_tokens(masked, routing_map))
        probs = torch.softmax(masked.values, dim=-1, dtype=torch.float32).type_as(logits)
        return probs * routing_map, routing_map


class UnitWeightRouter(MaskMoERouter):
    """Choice without damping: MaskMoE's expert with weight 1, and the gradient of the logarithm of its probability."""

    def routing(self, logits: Tensor, token_ids: TokenIds) -> tuple[Tensor, Tensor]:
        """Route as `MaskMoERouter.routing` does, with other weights."""
        probs, routing_map = super().routing(logits, token_ids)
        return probs / torch.where(routing_map, probs.detach(), 1.0), routing_map


class SecondChoiceRouter(MaskMoERouter):
    """MaskMoE without each token's best expert: if an id sees several experts, its tokens use the next best ones.

    For evaluation of trained models: the loss that is gained shows what the learned choice is worth.
    """

    def routing(self, logits: Tensor, token_ids: TokenIds) -> tuple[Tensor, Tensor]:
        """Route as `MaskMoERouter.routing` does, with the best visible expert of each routable token out of reach."""
        visible = self.visible_experts.mask_table(self.table).look_up(token_ids.ids.flatten())
        masked = MaskedLogits.mask(logits, visible, token_ids, self.score_function)
        scores = preference_scores(masked, self.config.moe_router_pre_softmax, self.expert_bias)
        best = choose_experts(scores, visible.experts, self.topk).routing_map  # [tokens, experts]
        best = best & (visible.experts.sum(dim=-1, keepdim=True) > 1)
        lowest = torch.finfo(logits.dtype).min
        return super().routing(logits.masked_fill(best.view(logits.shape), lowest), token_ids)


class SmearedSelfAttention(SelfAttention):
    """Self-attention whose keys in layer 2 are mixed with the keys of the preceding token, by a learned share a head.

    Source: Olsson et al., "In-context Learning and Induction Heads" (2022), the section on smeared keys.

    Attributes:
        smear: [heads], the logit of each head's share of its own key; used in layer 2 only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_smeared = self.layer_number == SMEARED_LAYER
        # A checkpoint stacks the parameters of all layers, and their optimizer states.
        self.smear = torch.nn.Parameter(torch.zeros(self.num_query_groups_per_partition))

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Compute queries, keys [sequence, batch, heads, channels] and values, and mix the keys."""
        query, key, *others = super().get_query_key_value_tensors(*args, **kwargs)
        if self.is_smeared:
            own_share = self.smear.sigmoid().view(-1, 1)  # [heads, 1]
            preceding = torch.cat([key[:1], key[:-1]])  # the first token has no preceding one
            key = own_share * key + (1 - own_share) * preceding
        return (query, key, *others)


class _InterventionBuilder(MaskMoEGPTModelBuilder):
    """Builds a `MaskMoEGPTModel` in whose specs `change` has replaced modules."""

    def layer_specs(self, visible_experts: VisibleExperts | None, vp_stage: int | None) -> dict[str, Any]:
        """Return the changed specs of the layers."""
        specs = super().layer_specs(visible_experts, vp_stage)
        return {name: spec if spec is None else map_spec(spec, self.change) for name, spec in specs.items()}

    @staticmethod
    def change(node: Any) -> Any:
        """Return the node of a spec, or what replaces it."""
        raise NotImplementedError


def _with_router(router: type[MaskMoERouter], node: Any) -> Any:
    """Replace a partial of `MaskMoERouter` by one of another router."""
    return router if node is MaskMoERouter else node


class GatedHashBuilder(_InterventionBuilder):
    """Replaces the router by `GatedHashRouter`."""

    change = staticmethod(partial(_with_router, GatedHashRouter))


class UnitWeightBuilder(_InterventionBuilder):
    """Replaces the router by `UnitWeightRouter`."""

    change = staticmethod(partial(_with_router, UnitWeightRouter))


class SecondChoiceBuilder(_InterventionBuilder):
    """Replaces the router by `SecondChoiceRouter`."""

    change = staticmethod(partial(_with_router, SecondChoiceRouter))


class SmearedKeysBuilder(_InterventionBuilder):
    """Replaces self-attention by `SmearedSelfAttention`."""

    @staticmethod
    def change(node: Any) -> Any:
        """Return the node of a spec, or what replaces it."""
        return SmearedSelfAttention if node is SelfAttention else node
