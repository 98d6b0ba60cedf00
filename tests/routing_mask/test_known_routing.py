"""What token ids tell about MoE layers, against a loop over tokens and all choices that a router could make."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_moe import make_mask, random_visible_sets

from maskmoe import ExpertLayout, plan
from maskmoe.errors import UserError

NUM_EXPERTS, VOCAB_SIZE = 6, 8


@given(
    seed=st.integers(0, 2**32 - 1),
    tables=st.integers(1, 2),
    topk=st.integers(1, NUM_EXPERTS),
    num_ranks=st.sampled_from([1, 2, 3, 6]),
    ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6),
)
def test_plan_equals_a_loop_over_tokens(seed: int, tables: int, topk: int, num_ranks: int, ids: list[int]) -> None:
    visible = random_visible_sets(seed, tables, VOCAB_SIZE, NUM_EXPERTS)
    layers = plan(np.array([ids], dtype=int), make_mask(visible, num_layers=2), ExpertLayout(topk, num_ranks))
    assert len(layers) == 2
    for layer, known in enumerate(layers):
        sets = [np.flatnonzero(visible[layer % tables, token_id]).tolist() for token_id in ids]
        assert [np.flatnonzero(row).tolist() for row in known.visible] == sets
        assert known.is_exact.tolist() == [len(experts) <= topk for experts in sets]
        least, most, per_expert = [0] * num_ranks, [0] * num_ranks, [0] * NUM_EXPERTS
        for experts in sets:
            choices = [
                {e * num_ranks // NUM_EXPERTS for e in c} for c in combinations(experts, min(topk, len(experts)))
            ]
            for rank in range(num_ranks):
                least[rank] += all(rank in ranks for ranks in choices)
                most[rank] += any(rank in ranks for ranks in choices)
            for expert in experts:
                per_expert[expert] += 1
        assert (known.most_rows.tolist(), (known.least_rows <= least).all()) == (most, True)
        if known.is_exact.all():
            assert known.tokens_per_expert.tolist() == per_expert
            assert known.least_rows.tolist() == known.most_rows.tolist() == least
        else:
            assert known.tokens_per_expert is None


@pytest.mark.parametrize(("ids", "num_ranks", "problem"), [([8], 1, "ids 0 to 7"), ([0], 4, "4 ranks cannot share")])
def test_impossible_plans_are_refused(ids: list[int], num_ranks: int, problem: str) -> None:
    mask = make_mask(random_visible_sets(0, 1, VOCAB_SIZE, NUM_EXPERTS))
    with pytest.raises(UserError, match=problem):
        plan(np.array(ids), mask, ExpertLayout(1, num_ranks))
