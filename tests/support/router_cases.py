"""Random routers, masks and batches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from support.small_moe import DEVICE, make_config, make_mask, make_router, random_visible_sets
from torch import Tensor

from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds

LOSSES = {"moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3}
ALL_BALANCING_LOSSES = {
    "moe_router_load_balancing_type": ["global_aux_loss", "aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [1e-2, 2e-2, 3e-2],
}


@dataclass(frozen=True)
class Case:
    """Describes a random router, mask and batch."""

    seed: int
    num_experts: int
    topk: int
    shape: tuple[int, int]
    scores: str
    aux_loss_tokens: str
    dtype: torch.dtype = torch.float32
    groups: tuple[int, int] | None = None
    has_padding: bool = False

    @property
    def score_function(self) -> str:
        return self.scores.split("_")[0]

    @property
    def pre_softmax(self) -> bool:
        return self.scores == "softmax_before" or (self.topk == 1 and self.score_function == "softmax")

    @property
    def mask(self):
        return make_mask(random_visible_sets(self.seed, 2, 12, self.num_experts))

    @property
    def token_ids(self) -> TokenIds:
        ids = np.random.default_rng(self.seed).integers(0, 12, self.shape)
        return TokenIds(torch.from_numpy(ids).to(DEVICE), self.is_padding)

    @property
    def is_padding(self) -> Tensor | None:
        if not self.has_padding:
            return None
        return torch.from_numpy(np.random.default_rng(self.seed + 4).random(self.shape) < 0.4).to(DEVICE)

    @property
    def visible(self) -> Tensor:
        """Return the visible sets of the tokens in the second layer, bool [tokens, experts]."""
        return torch.from_numpy(self.mask.visible_sets(1)).to(DEVICE)[self.token_ids.ids.flatten()]

    def logits(self, scale: float) -> Tensor:
        values = np.random.default_rng(self.seed + 1).normal(scale=scale, size=(*self.shape, self.num_experts))
        return torch.from_numpy(values).to(DEVICE, self.dtype).requires_grad_()

    def router(self, **settings: Any) -> MaskMoERouter:
        """Build the router of the second layer; `settings` override its configuration."""
        has_bias = "with_bias" in self.scores
        num_groups, group_topk = self.groups or (None, None)
        config = make_config(
            self.num_experts,
            self.topk,
            num_layers=2,
            moe_router_score_function=self.score_function,
            moe_router_pre_softmax=self.pre_softmax,
            moe_router_enable_expert_bias=has_bias,
            moe_router_num_groups=num_groups,
            moe_router_group_topk=group_topk,
            **(LOSSES | ALL_BALANCING_LOSSES | settings),
        )
        router = make_router(config, self.mask, layer_number=2, aux_loss_tokens=self.aux_loss_tokens)
        if has_bias:
            bias = np.random.default_rng(self.seed + 2).normal(scale=3, size=self.num_experts)
            router.expert_bias.copy_(torch.from_numpy(bias))
        return router


SCORES = [
    "softmax_before",
    "softmax_after",
    "sigmoid",
    "sigmoid_with_bias",
    "sqrtsoftplus",
    "sqrtsoftplus_with_bias",
]


def possible_groups(num_experts: int, topk: int) -> list[tuple[int, int]]:
    """List pairs (groups, chosen groups) for which the chosen groups hold k experts and each can give one."""
    return [
        (num_groups, group_topk)
        for num_groups in range(1, num_experts + 1)
        for group_topk in range(1, num_groups + 1)
        if num_experts % num_groups == 0 and group_topk <= topk <= group_topk * num_experts // num_groups
    ]


@st.composite
def cases(draw, dtypes=(torch.float32,)) -> Case:
    num_experts = draw(st.integers(2, 20))
    topk = draw(st.integers(1, num_experts))
    return Case(
        seed=draw(st.integers(0, 2**32 - 1)),
        num_experts=num_experts,
        topk=topk,
        shape=draw(st.tuples(st.integers(1, 5), st.integers(1, 3))),
        scores=draw(st.sampled_from(SCORES)),
        aux_loss_tokens=draw(st.sampled_from(["all", "routable"])),
        dtype=draw(st.sampled_from(dtypes)),
        groups=draw(st.sampled_from([None, *possible_groups(num_experts, topk)])),
        has_padding=draw(st.booleans()),
    )
