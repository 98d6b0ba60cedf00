"""Computes statistics of routing traces, by pure functions of arrays.

The sizes are L layers with experts, T tokens, N experts, k experts of a token, G groups of tokens, U distinct ids of a
probe.
"""

import math
from collections.abc import Iterator

import numpy as np
from scipy.special import entr

from maskmoe.analysis.routing.settings import AnalysisSettings
from maskmoe.analysis.routing.trace import NO_EXPERT, RoutingTrace
from maskmoe.routing_mask.frequency import FrequencyBands


def measure(
    trace: RoutingTrace, before: RoutingTrace, bands: FrequencyBands, capacity_tokens: int, settings: AnalysisSettings
) -> dict[str, np.ndarray]:
    """Compute all statistics of one model.

    Args:
        trace: the trace of the model.
        before: the trace of the previous model of the series; for the first model, its own trace.
        bands: the frequency bands of the ids.
        capacity_tokens: number of tokens that share the capacity of the experts.
        settings: the settings of the analysis.

    Returns:
        load: int64 [L, B, N], number of assignments.
        dropped: float64 [capacity factors, L], share of the assignments that experts of limited capacity would drop.
        id_expert_information: float64 [L], mutual information of the id and the experts of a token, in nats.
        next_layer_information: float64 [L - 1], mutual information of a token's best experts in consecutive layers with
            experts, in nats.
        coactivation: int64 [L, N, N], number of tokens that chose two experts together.
        transitions: int64 [L - 1, N, N], number of tokens by their best experts in consecutive layers with experts.
        changed: float64 [2 + B, L], share of its experts that a token changed since the previous model, as means over
            groups of tokens; NaN for a group without tokens. The groups are all tokens, the tokens that see two or more
            experts in either model, and the tokens of each frequency band.

        And the arrays of `router_entropy`, `top_ids` and `distinct_experts`.
    """
    band_of_token, num_bands = bands.band_of_id[trace.token_ids], len(bands.names)
    next_layer = transitions(trace)
    changed = fluctuation(before, trace)
    groups = [np.ones(len(band_of_token), bool), before.is_routable | trace.is_routable]
    groups += [band_of_token == band for band in range(num_bands)]
    return {
        "load": expert_load(trace, band_of_token, num_bands),
        "dropped": np.array([dropped_share(trace, factor, capacity_tokens) for factor in settings.capacity_factors]),
        **router_entropy(trace),
        "id_expert_information": id_information(trace),
        "next_layer_information": mutual_information(next_layer),
        **top_ids(trace, settings.top_ids),
        **distinct_experts(trace, settings.min_occurrences),
        "coactivation": coactivation(trace),
        "transitions": next_layer,
        "changed": np.stack([mean_where(changed, group) for group in groups]),
    }


def count_choices(experts: np.ndarray, group_of_token: np.ndarray, num_groups: int, num_experts: int) -> np.ndarray:
    """Count how often the tokens of each group chose each expert in one layer.

    Args:
        experts: int16 [T, k], the chosen experts or `NO_EXPERT`.
        group_of_token: int64 [T], the group of each token.
        num_groups: number of groups, G.
        num_experts: number of experts, N.

    Returns:
        int64 [G, N]; the sum is the number of chosen experts of all tokens.
    """
    bins = (group_of_token * num_experts)[:, None] + experts
    counts = np.bincount(bins[experts != NO_EXPERT], minlength=num_groups * num_experts)
    return counts.reshape(num_groups, num_experts)


def expert_load(trace: RoutingTrace, group_of_token: np.ndarray, num_groups: int) -> np.ndarray:
    """Count the assignments of each group of tokens to each expert, int64 [L, G, N].

    Args:
        trace: the routing of T tokens.
        group_of_token: int64 [T], the group of each token, such as its frequency band or its micro-batch.
        num_groups: number of groups, G.
    """
    counts = [count_choices(experts, group_of_token, num_groups, trace.num_experts) for experts in trace.experts]
    return np.stack(counts)


def max_over_mean(load: np.ndarray) -> np.ndarray:
    """Return the largest load of an expert over the mean, float64 [...] of [..., N]; NaN if no expert has a load."""
    return _divide(load.max(axis=-1), load.mean(axis=-1))


def coefficient_of_variation(load: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the load over its mean, float64 [...] of [..., N]; NaN if there is no load."""
    return _divide(load.std(axis=-1), load.mean(axis=-1))


def expert_capacity(num_tokens: int, topk: int, num_experts: int, capacity_factor: float) -> int:
    """Return how many assignments an expert accepts in a micro-batch, like `get_capacity` of Megatron-Core."""
    return math.ceil(num_tokens * topk / num_experts * capacity_factor)


def dropped_share(trace: RoutingTrace, capacity_factor: float, micro_batch_tokens: int) -> np.ndarray:
    """Return the share of the assignments that experts of limited capacity would drop, float64 [L].

    Args:
        trace: the routing of T tokens.
        capacity_factor: the capacity as a multiple of an even share of the assignments of a micro-batch.
        micro_batch_tokens: number of consecutive tokens in a micro-batch; the last micro-batch may have fewer.
    """
    micro_batch = np.arange(len(trace.token_ids)) // micro_batch_tokens
    sizes = np.bincount(micro_batch)  # [micro-batches]
    capacity = [expert_capacity(size, trace.topk, trace.num_experts, capacity_factor) for size in sizes.tolist()]
    load = expert_load(trace, micro_batch, len(sizes))
    excess = np.maximum(load - np.array(capacity)[:, None], 0)
    return excess.sum(axis=(1, 2)) / load.sum(axis=(1, 2))


def router_entropy(trace: RoutingTrace) -> dict[str, np.ndarray]:
    """Return the entropy of the routers, as means over the tokens that see two or more experts.

    A mean is NaN without such tokens.

    Returns:
        entropy: float64 [L], mean entropy, in nats.
        entropy_bound: float64 [L], mean of ln V, the largest possible mean entropy, in nats.
        single_expert_token_share: float64 [L], share of the tokens that see one expert.
        first_weight: float64 [L], mean weight of a token's best expert.
    """
    routable = trace.is_routable
    return {
        "entropy": mean_where(trace.entropy, routable),
        "entropy_bound": mean_where(np.log(trace.num_visible, dtype=np.float64), routable),
        "single_expert_token_share": 1 - routable.mean(axis=1),
        "first_weight": mean_where(trace.weights[..., 0], routable),
    }


def mean_where(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return the mean over the counted elements of the last axis, float64 [L] of [L, T]; NaN if none is counted."""
    counted = np.broadcast_to(counted, values.shape)
    return _divide(np.where(counted, values, 0).sum(axis=-1, dtype=np.float64), counted.sum(axis=-1))


def count_choices_of_ids(trace: RoutingTrace, first_only: bool = False) -> Iterator[np.ndarray]:
    """Count how often each id chose each expert, int64 [U, N] with ascending ids.

    The tables are large, so this generator yields the table of one layer at a time.

    Args:
        trace: the routing of tokens with U distinct ids.
        first_only: whether to count only the best expert of each token.
    """
    ids, index = np.unique(trace.token_ids, return_inverse=True)
    for experts in trace.experts[..., :1] if first_only else trace.experts:
        yield count_choices(experts, index, len(ids), trace.num_experts)


def mutual_information(counts: np.ndarray) -> np.ndarray:
    """Return the mutual information of rows and columns, in nats, float64 [...] of counts [..., rows, columns].

    The mutual information is at most the logarithm of the smaller one of the numbers of rows and columns. It is
    overestimated if rows have few counts.
    """
    *shape, rows, columns = counts.shape
    joint = _entropy(counts.reshape(*shape, rows * columns))
    information = _entropy(counts.sum(axis=-1)) + _entropy(counts.sum(axis=-2)) - joint
    return np.maximum(information, 0.0)  # rounding may make the difference negative


def id_information(trace: RoutingTrace) -> np.ndarray:
    """Return the mutual information of a token's id and its experts, in nats, float64 [L]."""
    return np.array([mutual_information(choices) for choices in count_choices_of_ids(trace)])


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Return the entropy of counts, in nats, float64 [...] of [..., n]."""
    return entr(_divide(counts, counts.sum(axis=-1, keepdims=True))).sum(axis=-1)


def top_ids(trace: RoutingTrace, num_top: int) -> dict[str, np.ndarray]:
    """Return the r = min(num_top, U) most frequent ids of each expert, the most frequent id first.

    Returns:
        top_ids: int64 [L, N, r]; -1, with zeros in the other arrays, after all ids of an expert with fewer ids.
        top_counts: int64 [L, N, r], number of tokens with the id that the expert gets.
        top_shares: float64 [L, N, r], share of these tokens among all tokens of the expert.
        top_lifts: float64 [L, N, r], this share over the share of the id in the probe.
    """
    ids, occurrences = np.unique(trace.token_ids, return_counts=True)
    layers = []
    for choices in count_choices_of_ids(trace):
        index = _largest(choices.T, min(num_top, len(ids)))  # [N, r]
        counts = np.take_along_axis(choices.T, index, axis=1)
        shares = counts / np.maximum(choices.sum(axis=0), 1)[:, None]
        lifts = shares / (occurrences[index] / len(trace.token_ids))
        layers.append((np.where(counts > 0, ids[index], -1), counts, shares, lifts))
    names = ("top_ids", "top_counts", "top_shares", "top_lifts")
    return {name: np.stack(arrays) for name, arrays in zip(names, zip(*layers, strict=True), strict=True)}


def _largest(counts: np.ndarray, num_top: int) -> np.ndarray:
    """Return the columns of the largest counts of each row, in descending order; ties keep the order of the columns.

    Args:
        counts: int64 [rows, columns].
        num_top: number of columns to return, r.

    Returns:
        int64 [rows, r].
    """
    # One key per column orders by descending count first, and by ascending column for equal counts.
    ascending = np.arange(counts.shape[1]) - counts * counts.shape[1]
    top = np.argpartition(ascending, num_top - 1, axis=1)[:, :num_top]
    order = np.argsort(np.take_along_axis(ascending, top, axis=1), axis=1)
    return np.take_along_axis(top, order, axis=1)


def coactivation(trace: RoutingTrace) -> np.ndarray:
    """Count the tokens that chose two experts of a layer together, int64 [L, N, N]; the diagonal is the load."""
    pairs = np.empty((len(trace.layers), trace.num_experts, trace.num_experts), np.int64)
    for layer, experts in enumerate(trace.experts):
        chosen = np.zeros((len(experts), trace.num_experts + 1), np.float32)
        np.put_along_axis(chosen, experts.astype(np.int64), 1.0, axis=1)  # `NO_EXPERT` falls into the last column
        pairs[layer] = np.rint(chosen[:, :-1].T @ chosen[:, :-1])
    return pairs


def transitions(trace: RoutingTrace) -> np.ndarray:
    """Count tokens by their best experts in consecutive layers with experts, int64 [L - 1, N, N]."""
    first = trace.experts[..., 0].astype(np.int64)
    bins = first[:-1] * trace.num_experts + first[1:]  # [L - 1, T]
    counts = [np.bincount(layer_bins, minlength=trace.num_experts**2) for layer_bins in bins]
    return np.array(counts, np.int64).reshape(-1, trace.num_experts, trace.num_experts)


def fluctuation(before: RoutingTrace, after: RoutingTrace) -> np.ndarray:
    """Return which share of its experts each token changed, 1 - |A ∩ B| / max(|A|, |B|), float32 [L, T].

    Args:
        before: the trace with the experts A of each token.
        after: the trace of the same tokens and layers with the experts B.
    """
    changed = np.empty(before.entropy.shape, np.float32)
    for layer, (old, new) in enumerate(zip(before.experts, after.experts, strict=True)):
        is_shared = (old[:, :, None] == new[:, None, :]) & (old != NO_EXPERT)[:, :, None]  # [T, k, k]
        largest = np.maximum((old != NO_EXPERT).sum(axis=1), (new != NO_EXPERT).sum(axis=1))
        changed[layer] = 1 - is_shared.sum(axis=(1, 2)) / largest
    return changed


def repeated_ids(token_ids: np.ndarray, min_occurrences: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids that occur at least `min_occurrences` times, ascending, and their numbers of occurrences."""
    ids, occurrences = np.unique(token_ids, return_counts=True)
    is_repeated = occurrences >= min_occurrences
    return ids[is_repeated], occurrences[is_repeated]


def distinct_experts(trace: RoutingTrace, min_occurrences: int) -> dict[str, np.ndarray]:
    """Return the number of experts that the occurrences of an id choose first, for the F ids of `repeated_ids`.

    Returns:
        distinct: int64 [L, F], number of experts that at least one occurrence chose first.
        effective: float64 [L, F], exp of the entropy of the first choices: the number of equally used experts with the
            same entropy.
    """
    counted = np.isin(np.unique(trace.token_ids), repeated_ids(trace.token_ids, min_occurrences)[0])
    choices = np.stack([counts[counted] for counts in count_choices_of_ids(trace, first_only=True)])
    return {"distinct": (choices > 0).sum(axis=-1), "effective": np.exp(_entropy(choices))}


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient in float64; NaN if the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=denominator != 0)
