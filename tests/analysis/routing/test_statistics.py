"""The statistics equal a few lines of plain Python, and their invariants hold for random traces."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, get_capacity
from scipy.stats import entropy as scipy_entropy

from maskmoe.analysis.routing import statistics
from maskmoe.analysis.routing.trace import NO_EXPERT, RoutingTrace


def make_trace(
    seed: int = 0, layers: int = 3, tokens: int = 200, num_experts: int = 6, topk: int = 2, vocab_size: int = 20
) -> RoutingTrace:
    """Make random choices among visible experts; an id has the same visible experts in all traces of the same sizes."""
    sizes = np.random.default_rng(1)
    num_visible_of_id = sizes.integers(1, num_experts + 1, (layers, vocab_size))
    num_visible_of_id[:, 0] = 1
    visible = sizes.random((layers, vocab_size, num_experts)).argsort(axis=-1)  # the first V experts are visible
    token_ids = sizes.integers(0, vocab_size, tokens)
    rng = np.random.default_rng(seed)
    experts = np.full((layers, tokens, topk), NO_EXPERT, np.int16)
    weights = np.zeros((layers, tokens, topk), np.float32)
    for layer in range(layers):
        for token, number in enumerate(token_ids):
            seen = visible[layer, number, : num_visible_of_id[layer, number]]
            chosen = rng.permutation(seen)[:topk]
            experts[layer, token, : len(chosen)] = chosen
            weights[layer, token, : len(chosen)] = -np.sort(-rng.dirichlet(np.ones(len(chosen))))
    num_visible = num_visible_of_id[:, token_ids].astype(np.int16)
    entropy = (rng.random(num_visible.shape) * np.log(num_visible)).astype(np.float32)
    return RoutingTrace(
        token_ids, tuple(range(1, layers + 1)), experts, weights, entropy, num_visible, num_experts, f"seed {seed}"
    )


examples = settings(max_examples=50)
traces = st.builds(
    make_trace,
    seed=st.integers(0, 1000),
    layers=st.integers(1, 3),
    tokens=st.integers(1, 60),
    num_experts=st.integers(3, 9),
    topk=st.integers(1, 3),
    vocab_size=st.integers(1, 12),
)


@examples
@given(traces, st.integers(1, 4))
def test_load_adds_up_to_the_assignments(trace, num_groups):
    group = trace.token_ids % num_groups
    load = statistics.expert_load(trace, group, num_groups)
    assert load.shape == (len(trace.layers), num_groups, trace.num_experts)
    assert load.sum() == (trace.experts != NO_EXPERT).sum()
    layer, token = len(trace.layers) - 1, len(group) // 2
    for expert in range(trace.num_experts):
        expected = sum(
            expert in trace.experts[layer, other] for other in range(len(group)) if group[other] == group[token]
        )
        assert load[layer, group[token], expert] == expected


def test_unevenness_of_load():
    load = np.array([[2, 2, 2], [6, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(statistics.max_over_mean(load), [1, 3, np.nan])
    np.testing.assert_allclose(statistics.coefficient_of_variation(load), [0, math.sqrt(2), np.nan])


@examples
@given(traces, st.sampled_from([0.5, 1.0, 1.25, 2.0]), st.integers(1, 70))
def test_drops_equal_brute_force(trace, factor, micro_batch_tokens):
    expected = []
    for experts in trace.experts:
        kept = 0
        for start in range(0, len(experts), micro_batch_tokens):
            part = experts[start : start + micro_batch_tokens]
            capacity = get_capacity(len(part) * trace.topk, trace.num_experts, factor)
            room = [capacity] * trace.num_experts
            for expert in part[part != NO_EXPERT].tolist():
                if room[expert]:
                    room[expert] -= 1
                    kept += 1
        expected.append(1 - kept / (experts != NO_EXPERT).sum())
    np.testing.assert_allclose(statistics.dropped_share(trace, factor, micro_batch_tokens), expected, atol=1e-12)


@examples
@given(st.integers(1, 5000), st.integers(1, 8), st.integers(8, 256), st.floats(0.1, 8))
def test_capacity_is_megatrons(num_tokens, topk, num_experts, factor):
    capacity = statistics.expert_capacity(num_tokens, topk, num_experts, factor)
    assert capacity == get_capacity(num_tokens * topk, num_experts, factor)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_drops_are_megatrons(factor):
    trace = make_trace(topk=2)
    dropped = statistics.dropped_share(trace, factor, len(trace.token_ids))
    for experts, weights, share in zip(trace.experts, trace.weights, dropped, strict=True):
        padded = torch.zeros(len(experts), trace.num_experts + 1)
        index = torch.from_numpy(experts).long() % (trace.num_experts + 1)  # `NO_EXPERT` becomes the last column
        routing_map = padded.scatter(1, index, 1.0)[:, :-1].bool()
        probs = padded.scatter(1, index, torch.from_numpy(weights))[:, :-1]
        _, kept = apply_router_token_dropping(probs, routing_map, 2, factor)
        assert share == pytest.approx(1 - (kept.sum() / routing_map.sum()).item(), abs=1e-6)
    assert (dropped > 0).any()


def test_entropy():
    trace = make_trace()
    entropy = statistics.router_entropy(trace)
    for layer in range(3):
        routable = [token for token in range(200) if trace.num_visible[layer, token] > 1]
        assert entropy["single_expert_token_share"][layer] == pytest.approx(1 - len(routable) / 200)
        assert entropy["entropy"][layer] == pytest.approx(np.mean([trace.entropy[layer, token] for token in routable]))
        bound = np.mean([math.log(trace.num_visible[layer, token]) for token in routable])
        assert entropy["entropy_bound"][layer] == pytest.approx(bound)
        assert entropy["entropy"][layer] < entropy["entropy_bound"][layer]
        weight = np.mean([trace.weights[layer, token, 0] for token in routable])
        assert entropy["first_weight"][layer] == pytest.approx(weight)


def test_entropy_without_choice():
    entropy = statistics.router_entropy(make_trace(vocab_size=1))
    assert np.isnan(entropy["entropy"]).all()
    assert np.isnan(entropy["entropy_bound"]).all()
    assert np.isnan(entropy["first_weight"]).all()
    assert (entropy["single_expert_token_share"] == 1).all()


@examples
@given(traces)
def test_information_is_bounded(trace):
    information = statistics.id_information(trace)
    assert (information >= 0).all()
    assert (information <= math.log(trace.num_experts) + 1e-9).all()
    between = statistics.mutual_information(statistics.transitions(trace))
    assert between.shape == (len(trace.layers) - 1,)
    assert ((between >= 0) & (between <= math.log(trace.num_experts) + 1e-9)).all()


def information_by_hand(xs: np.ndarray, ys: np.ndarray) -> float:
    """Return the mutual information of paired observations, in nats."""
    pairs = Counter(zip(xs.tolist(), ys.tolist(), strict=True))
    of_x, of_y = Counter(xs.tolist()), Counter(ys.tolist())
    total = pairs.total()
    return sum(n / total * math.log(n * total / (of_x[x] * of_y[y])) for (x, y), n in pairs.items())


def test_information_by_hand():
    trace = make_trace()
    for layer, information in enumerate(statistics.id_information(trace)):
        is_chosen = trace.experts[layer] != NO_EXPERT
        ids = np.repeat(trace.token_ids[:, None], 2, axis=1)[is_chosen]
        assert information == pytest.approx(information_by_hand(ids, trace.experts[layer][is_chosen]))
    for layer, information in enumerate(statistics.mutual_information(statistics.transitions(trace))):
        first, second = trace.experts[layer, :, 0], trace.experts[layer + 1, :, 0]
        assert information == pytest.approx(information_by_hand(first, second))


def test_information_of_a_table_and_of_independence():
    of_table = np.array([[5, 0], [0, 5]])
    independent = np.array([[1, 2], [2, 4]])
    np.testing.assert_allclose(
        statistics.mutual_information(np.stack([of_table, independent])), [math.log(2), 0], atol=1e-12
    )


@examples
@given(traces, st.integers(1, 5))
def test_top_ids(trace, num_top):
    top = statistics.top_ids(trace, num_top)
    occurrences = Counter(trace.token_ids.tolist())
    assert top["top_ids"].shape == (len(trace.layers), trace.num_experts, min(num_top, len(occurrences)))
    for layer in range(len(trace.layers)):
        for expert in range(trace.num_experts):
            got = Counter(trace.token_ids[(trace.experts[layer] == expert).any(axis=1)].tolist())
            expected = sorted(got.items(), key=lambda pair: (-pair[1], pair[0]))[:num_top]
            ids, counts = top["top_ids"][layer, expert].tolist(), top["top_counts"][layer, expert].tolist()
            assert [pair for pair in zip(ids, counts, strict=True) if pair[0] >= 0] == expected
            for rank, (number, count) in enumerate(expected):
                share = count / got.total()
                assert top["top_shares"][layer, expert, rank] == pytest.approx(share)
                assert top["top_lifts"][layer, expert, rank] == pytest.approx(
                    share / (occurrences[number] / len(trace.token_ids))
                )


@examples
@given(traces)
def test_coactivation(trace):
    pairs = statistics.coactivation(trace)
    assert np.array_equal(pairs, pairs.transpose(0, 2, 1))
    for layer, experts in enumerate(trace.experts):
        expected = Counter()
        for chosen in experts.tolist():
            expected.update(combinations(sorted(expert for expert in chosen if expert != NO_EXPERT), 2))
        for first, second in combinations(range(trace.num_experts), 2):
            assert pairs[layer, first, second] == expected[first, second]
    load = statistics.expert_load(trace, np.zeros(len(trace.token_ids), int), 1)[:, 0]
    assert np.array_equal(np.diagonal(pairs, axis1=1, axis2=2), load)


@examples
@given(traces)
def test_transitions(trace):
    counts = statistics.transitions(trace)
    assert (counts.sum(axis=(1, 2)) == len(trace.token_ids)).all()
    for layer, table in enumerate(counts):
        expected = Counter(zip(*trace.experts[layer : layer + 2, :, 0].tolist(), strict=True))
        assert {tuple(place): table[tuple(place)] for place in np.argwhere(table).tolist()} == expected


@examples
@given(traces)
def test_nothing_fluctuates_against_itself(trace):
    assert (statistics.fluctuation(trace, trace) == 0).all()


@examples
@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 3))
def test_fluctuation(seed, other_seed, topk):
    before, after = make_trace(seed, topk=topk, tokens=40), make_trace(other_seed, topk=topk, tokens=40)
    changed = statistics.fluctuation(before, after)
    assert np.array_equal(changed, statistics.fluctuation(after, before))
    assert (changed[before.num_visible == 1] == 0).all()
    assert (changed[before.num_visible <= topk] == 0).all()
    for layer, token in np.ndindex(*changed.shape):
        old, new = (set(trace.experts[layer, token].tolist()) - {NO_EXPERT} for trace in (before, after))
        assert changed[layer, token] == pytest.approx(1 - len(old & new) / max(len(old), len(new)))


def test_all_changed():
    before = make_trace(topk=1)
    after = RoutingTrace(**(vars(before) | {"experts": (before.experts + 1) % before.num_experts}))
    assert (statistics.fluctuation(before, after) == 1).all()


@examples
@given(traces, st.integers(1, 6))
def test_distinct_experts(trace, min_occurrences):
    ids, counts = statistics.repeated_ids(trace.token_ids, min_occurrences)
    of_ids = statistics.distinct_experts(trace, min_occurrences)
    occurrences = Counter(trace.token_ids.tolist())
    expected_ids = sorted(number for number, count in occurrences.items() if count >= min_occurrences)
    assert ids.tolist() == expected_ids
    assert counts.tolist() == [occurrences[number] for number in expected_ids]
    for layer in range(len(trace.layers)):
        for place, number in enumerate(ids):
            choices = Counter(trace.experts[layer, trace.token_ids == number, 0].tolist())
            assert of_ids["distinct"][layer, place] == len(choices)
            expected = math.exp(scipy_entropy(list(choices.values())))
            assert of_ids["effective"][layer, place] == pytest.approx(expected)
            assert of_ids["effective"][layer, place] <= len(choices) + 1e-9
            visible = trace.num_visible[layer, trace.token_ids == number][0]
            assert len(choices) <= visible
