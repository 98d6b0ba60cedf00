"""Compares the simulated choice of experts with the router of the model."""

import numpy as np
import pytest
import torch
from support.small_cases import selected_experts
from support.small_moe import DEVICE, draw_parameters, make_config, make_mask, make_router, random_visible_sets

from maskmoe.analysis.dispatch_cost.routing import VisibleTable
from maskmoe.transformer.token_ids import TokenIds

NUM_TOKENS, NUM_EXPERTS, VOCAB_SIZE = 400, 8, 30


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("topk", [1, 2, 3, 8])
def test_tokens_select_as_many_visible_experts_as_in_the_router(topk: int) -> None:
    visible = random_visible_sets(topk, 1, VOCAB_SIZE, NUM_EXPERTS)
    mask = make_mask(visible)
    rng = np.random.default_rng(0)
    token_ids = rng.integers(VOCAB_SIZE, size=NUM_TOKENS)

    config = make_config(NUM_EXPERTS, topk)
    router = make_router(config, mask)
    draw_parameters(router)
    hidden = torch.randn(NUM_TOKENS, 1, config.hidden_size, device=DEVICE)
    _, routing_map = router(hidden, TokenIds(torch.from_numpy(token_ids[:, None]).to(DEVICE)))
    routed = [np.flatnonzero(experts).tolist() for experts in routing_map.cpu().numpy()]

    table = VisibleTable.of_layer(mask, 0)
    simulated = selected_experts(list(table.choose(token_ids, topk, rng)))

    num_visible = visible[0].sum(axis=1)[token_ids]
    for token in range(NUM_TOKENS):
        assert len(simulated[token]) == len(routed[token]) == min(topk, num_visible[token])
        assert visible[0, token_ids[token], simulated[token]].all()
        # Without a choice, both select the same experts.
        if num_visible[token] <= topk:
            assert sorted(simulated[token]) == routed[token]
    # The test covers tokens with and without a choice.
    assert (num_visible <= topk).any()
    assert topk == NUM_EXPERTS or (num_visible > topk).any()
