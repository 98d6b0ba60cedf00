"""The statistics equal a few lines of plain Python, and their invariants hold for random traces."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from maskmoe.analysis import routing_statistics as statistics
from maskmoe.analysis.routing_statistics import NO_EXPERT, AnalysisSettings, RoutingStatistics, RoutingTrace
from maskmoe.routing_mask.frequency import FrequencyBands


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
    return RoutingTrace(token_ids, experts, weights, entropy, num_visible, num_experts)


traces = st.builds(
    make_trace,
    seed=st.integers(0, 1000),
    layers=st.integers(1, 3),
    tokens=st.integers(1, 60),
    num_experts=st.integers(3, 9),
    topk=st.integers(1, 3),
    vocab_size=st.integers(1, 12),
)


BANDS = FrequencyBands(np.arange(20, 0, -1).astype(float))


def measure(trace: RoutingTrace, before: RoutingTrace | None = None, **settings: int) -> RoutingStatistics:
    return statistics.measure(trace, before, BANDS, AnalysisSettings(**settings))


def num_layers(trace: RoutingTrace) -> int:
    return len(trace.experts)


@given(traces)
def test_load(trace):
    load = measure(trace).load
    expected = np.zeros((num_layers(trace), 3, trace.num_experts))
    for layer, token, place in np.argwhere(trace.experts != NO_EXPERT):
        expected[layer, BANDS.band_of_id[trace.token_ids[token]], trace.experts[layer, token, place]] += 1
    assert np.array_equal(load, expected)


def test_entropy():
    trace = make_trace()
    found = measure(trace)
    for layer in range(3):
        routable = [token for token in range(200) if trace.num_visible[layer, token] > 1]
        assert found.single_expert_share[layer] == pytest.approx(1 - len(routable) / 200)
        assert found.entropy[layer] == pytest.approx(np.mean([trace.entropy[layer, token] for token in routable]))
        bound = np.mean([math.log(trace.num_visible[layer, token]) for token in routable])
        assert found.entropy_bound[layer] == pytest.approx(bound)
        weight = np.mean([trace.weights[layer, token, 0] for token in routable])
        assert found.first_weight[layer] == pytest.approx(weight)


def draw_experts(
    num_ids: int, occurrences: int, num_experts: int, topk: int, decided: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw ids [T] and experts [T, k] of tokens: with a probability `decided` those of the id, else uniform ones."""
    rng = np.random.default_rng(seed)
    token_ids = rng.permutation(np.repeat(np.arange(num_ids), occurrences))
    of_id = rng.random((num_ids, num_experts)).argsort(axis=1)
    any_experts = rng.random((len(token_ids), num_experts)).argsort(axis=1)
    is_decided = rng.random(len(token_ids)) < decided
    return token_ids, np.where(is_decided[:, None], of_id[token_ids], any_experts)[:, :topk].astype(np.int16)


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize(("num_ids", "occurrences"), [(800, 3), (300, 40)])
def test_explained_by_id_at_both_ends(topk, num_ids, occurrences):
    """Without the correction, three occurrences of an id explain most of the choice between 16 experts by chance."""
    ids, experts = draw_experts(num_ids, occurrences, 16, topk, decided=0)
    assert statistics.explained_by_id(ids, experts, 16) == pytest.approx(0, abs=0.01)
    ids, experts = draw_experts(num_ids, occurrences, 16, topk, decided=1)
    assert statistics.explained_by_id(ids, experts, 16) == 1
    once = np.arange(1000, 1000 + num_ids)  # ids that occur once say nothing about themselves
    mixed = np.concatenate([ids, once]), np.concatenate([experts, draw_experts(num_ids, 1, 16, topk, 0)[1]])
    assert statistics.explained_by_id(*mixed, 16) > 0.9


def true_share(num_experts: int, topk: int, decided: float) -> float:
    """Return 1 - H(expert | id) / H(expert) of the distribution of `draw_experts`."""
    share = topk / num_experts
    of_id, other = decided + (1 - decided) * share, (1 - decided) * share
    if topk == 1:
        return 1 - scipy_entropy([of_id, *[other] * (num_experts - 1)]) / math.log(num_experts)
    entropies = [scipy_entropy([chance, 1 - chance]) for chance in (of_id, other, share)]
    return 1 - (topk * entropies[0] + (num_experts - topk) * entropies[1]) / (num_experts * entropies[2])


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("decided", [0.3, 0.8])
def test_explained_by_id_in_between(topk, decided):
    expected = true_share(16, topk, decided)
    for num_ids, occurrences, accuracy in ((2000, 2, 0.1), (300, 40, 0.1), (200, 1000, 0.01)):
        ids, experts = draw_experts(num_ids, occurrences, 16, topk, decided)
        assert statistics.explained_by_id(ids, experts, 16) == pytest.approx(expected, abs=accuracy)


def test_explained_by_id_of_layers_and_tokens():
    trace = make_trace()
    explained = measure(trace).explained
    for layer in range(3):
        routable = trace.num_visible[layer] > 1
        for number, experts in enumerate((trace.experts[layer, :, :1], trace.experts[layer])):
            for place, tokens in enumerate((slice(None), routable)):
                share = statistics.explained_by_id(trace.token_ids[tokens], experts[tokens], 6)
                assert explained[number, place, layer] == share
    without_choice = measure(make_trace(vocab_size=1)).explained
    assert np.isnan(without_choice).all()


@given(traces, st.integers(1, 5))
def test_top_ids(trace, num_top):
    found = measure(trace, top_ids=num_top)
    shape = (num_layers(trace), trace.num_experts, min(num_top, len(set(trace.token_ids.tolist()))))
    assert found.top_ids.shape == found.top_counts.shape == shape
    for layer, expert in np.ndindex(*shape[:2]):
        got = Counter(trace.token_ids[(trace.experts[layer] == expert).any(axis=1)].tolist())
        expected = sorted(got.items(), key=lambda pair: (-pair[1], pair[0]))[:num_top]
        pairs = zip(found.top_ids[layer, expert].tolist(), found.top_counts[layer, expert].tolist(), strict=True)
        assert [pair for pair in pairs if pair[1]] == expected


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 3))
def test_fluctuation(seed, other_seed, topk):
    before, after = make_trace(seed, topk=topk, tokens=40), make_trace(other_seed, topk=topk, tokens=40)
    changed = statistics.fluctuation(before, after)
    assert np.array_equal(changed, statistics.fluctuation(after, before))
    assert (statistics.fluctuation(before, before) == 0).all()
    assert (changed[before.num_visible <= topk] == 0).all()
    for layer, token in np.ndindex(*changed.shape):
        old, new = (set(trace.experts[layer, token].tolist()) - {NO_EXPERT} for trace in (before, after))
        assert changed[layer, token] == pytest.approx(1 - len(old & new) / max(len(old), len(new)))
    # The means over groups of tokens.
    found = measure(after, before)
    assert measure(before).changed is None
    bands = BANDS.band_of_id[after.token_ids]
    for layer in range(3):
        groups = [bands >= 0, after.num_visible[layer] > 1, *(bands == band for band in range(3))]
        expected = [changed[layer, group].mean() if group.any() else np.nan for group in groups]
        np.testing.assert_allclose(found.changed[:, layer], expected, atol=1e-6)


@given(traces, st.integers(1, 6))
def test_distinct_experts(trace, min_occurrences):
    occurrences = Counter(trace.token_ids.tolist())
    ids = sorted(number for number, count in occurrences.items() if count >= min_occurrences)
    assert statistics.repeated_ids(trace.token_ids, min_occurrences).tolist() == ids
    found = measure(trace, min_occurrences=min_occurrences)
    assert found.distinct.shape == found.effective.shape == (num_layers(trace), len(ids))
    for layer, place in np.ndindex(*found.distinct.shape):
        choices = Counter(trace.experts[layer, trace.token_ids == ids[place], 0].tolist())
        assert found.distinct[layer, place] == len(choices)
        assert found.effective[layer, place] == pytest.approx(math.exp(scipy_entropy(list(choices.values()))))
