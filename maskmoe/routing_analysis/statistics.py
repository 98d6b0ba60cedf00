"""Computes statistics of routing traces, by pure functions of arrays.

The sizes are L layers with experts, T tokens, N experts, k experts of a token, G groups of tokens, U distinct ids of a
probe.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import entr

from maskmoe.routing_analysis.trace import NO_EXPERT, RoutingTrace


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
    return np.stack(
        [count_choices(experts, group_of_token, num_groups, trace.num_experts) for experts in trace.experts]
    )


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
    num_tokens = len(trace.token_ids)
    micro_batch = np.arange(num_tokens) // micro_batch_tokens
    sizes = np.bincount(micro_batch)  # [micro-batches]
    capacity = [expert_capacity(size, trace.topk, trace.num_experts, capacity_factor) for size in sizes.tolist()]
    load = expert_load(trace, micro_batch, len(sizes))
    excess = np.maximum(load - np.array(capacity)[:, None], 0)
    return excess.sum(axis=(1, 2)) / load.sum(axis=(1, 2))


@dataclass(frozen=True, eq=False)
class Entropy:
    """The entropy of the routers.

    The means are over the tokens that see two or more experts, and NaN without such tokens.

    Attributes:
        mean: float64 [L], mean entropy, in nats.
        bound: float64 [L], mean of ln V, the largest possible mean entropy, in nats.
        single_expert_token_share: float64 [L], share of the tokens that see one expert.
        first_weight: float64 [L], mean weight of a token's best expert.
    """

    mean: np.ndarray
    bound: np.ndarray
    single_expert_token_share: np.ndarray
    first_weight: np.ndarray

    @classmethod
    def from_trace(cls, trace: RoutingTrace) -> "Entropy":
        """Compute the means over the tokens of a trace."""
        routable = trace.is_routable
        return cls(
            mean=mean_where(trace.entropy, routable),
            bound=mean_where(np.log(trace.num_visible, dtype=np.float64), routable),
            single_expert_token_share=1 - routable.mean(axis=1),
            first_weight=mean_where(trace.weights[..., 0], routable),
        )


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


@dataclass(frozen=True, eq=False)
class TopIds:
    """The r most frequent ids of each expert; an expert with fewer ids has id -1 and zeros in the remaining places.

    Attributes:
        ids: int64 [L, N, r], the most frequent id first.
        counts: int64 [L, N, r], number of tokens with the id that the expert gets.
        shares: float64 [L, N, r], share of these tokens among all tokens of the expert.
        lifts: float64 [L, N, r], this share over the share of the id in the probe.
    """

    ids: np.ndarray
    counts: np.ndarray
    shares: np.ndarray
    lifts: np.ndarray

    @classmethod
    def from_trace(cls, trace: RoutingTrace, num_top: int) -> "TopIds":
        """Find the r = min(num_top, U) most frequent ids of each expert in a trace with U distinct ids."""
        ids, occurrences = np.unique(trace.token_ids, return_counts=True)
        layers = []
        for choices in count_choices_of_ids(trace):
            index = _largest(choices.T, min(num_top, len(ids)))  # [N, r]
            counts = np.take_along_axis(choices.T, index, axis=1)
            shares = counts / np.maximum(choices.sum(axis=0), 1)[:, None]
            lifts = shares / (occurrences[index] / len(trace.token_ids))
            layers.append((np.where(counts > 0, ids[index], -1), counts, shares, lifts))
        return cls(*(np.stack(arrays) for arrays in zip(*layers, strict=True)))


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
    return np.reshape(counts, (len(bins), trace.num_experts, trace.num_experts)).astype(np.int64)


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


@dataclass(frozen=True, eq=False)
class DistinctExperts:
    """The number of experts that the occurrences of an id choose first.

    Attributes:
        ids: int64 [F], the ids that occur often enough.
        distinct: int64 [L, F], number of experts that at least one occurrence chose first.
        effective: float64 [L, F], exp of the entropy of the first choices: the number of equally used experts with the
            same entropy.
    """

    ids: np.ndarray
    distinct: np.ndarray
    effective: np.ndarray

    @classmethod
    def from_trace(cls, trace: RoutingTrace, min_occurrences: int) -> "DistinctExperts":
        """Count the first choices of the ids that occur at least `min_occurrences` times."""
        ids, occurrences = np.unique(trace.token_ids, return_counts=True)
        is_frequent = occurrences >= min_occurrences
        choices = np.stack([counts[is_frequent] for counts in count_choices_of_ids(trace, first_only=True)])
        return cls(ids[is_frequent], (choices > 0).sum(axis=-1), np.exp(_entropy(choices)))


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient in float64; NaN if the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=denominator != 0)
