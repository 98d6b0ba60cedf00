"""Statistics of routing traces: pure functions of arrays.

Sizes: L layers with experts, T tokens, N experts, k experts of a token, B frequency bands, U distinct ids of a probe.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import entr

from maskmoe.routing_analysis.trace import NO_EXPERT, RoutingTrace


def count_choices(experts: np.ndarray, group_of_token: np.ndarray, num_groups: int, num_experts: int) -> np.ndarray:
    """How often the tokens of each group chose each expert in one layer.

    Args:
        experts: int16 [T, k].
        group_of_token: int64 [T].
        num_groups: G.
        num_experts: N.

    Returns:
        int64 [G, N]; it adds up to the chosen experts of all tokens.
    """
    bins = (group_of_token * num_experts)[:, None] + experts
    counts = np.bincount(bins[experts != NO_EXPERT], minlength=num_groups * num_experts)
    return counts.reshape(num_groups, num_experts)


def expert_load(trace: RoutingTrace, group_of_token: np.ndarray, num_groups: int) -> np.ndarray:
    """Assignments of every expert, of each group of tokens, int64 [L, G, N].

    Args:
        trace: of T tokens.
        group_of_token: int64 [T], such as frequency bands or micro-batches.
        num_groups: G.
    """
    return np.stack(
        [count_choices(experts, group_of_token, num_groups, trace.num_experts) for experts in trace.experts]
    )


def max_over_mean(load: np.ndarray) -> np.ndarray:
    """Load of the busiest expert over the mean, float64 [...] of [..., N]; NaN where there is none."""
    return _divide(load.max(axis=-1), load.mean(axis=-1))


def coefficient_of_variation(load: np.ndarray) -> np.ndarray:
    """Standard deviation of the experts' load over its mean, float64 [...] of [..., N]; NaN where there is none."""
    return _divide(load.std(axis=-1), load.mean(axis=-1))


def expert_capacity(num_tokens: int, topk: int, num_experts: int, capacity_factor: float) -> int:
    """The most assignments that an expert takes of a micro-batch (`get_capacity` of Megatron-Core's `moe_utils`)."""
    return math.ceil(num_tokens * topk / num_experts * capacity_factor)


def dropped_share(trace: RoutingTrace, capacity_factor: float, micro_batch_tokens: int) -> np.ndarray:
    """Share of the assignments that experts of limited capacity would drop.

    Args:
        trace: of T tokens.
        capacity_factor: multiple of an even share of T * k assignments.
        micro_batch_tokens: consecutive tokens that share a capacity; the last may have fewer.

    Returns:
        float64 [L].
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
    """How undecided routers are.

    Attributes:
        mean: float64 [L], nats, over the tokens that see two experts or more; NaN where there is none.
        bound: float64 [L], the mean of ln V over the same tokens: what the entropy is at most.
        single_expert_token_share: float64 [L], tokens that see one expert.
        first_weight: float64 [L], weight of a token's best expert, over the same tokens as `mean`.
    """

    mean: np.ndarray
    bound: np.ndarray
    single_expert_token_share: np.ndarray
    first_weight: np.ndarray

    @classmethod
    def of(cls, trace: RoutingTrace) -> "Entropy":
        """Of all tokens of a trace."""
        routable = trace.is_routable
        return cls(
            mean=mean_where(trace.entropy, routable),
            bound=mean_where(np.log(trace.num_visible, dtype=np.float64), routable),
            single_expert_token_share=1 - routable.mean(axis=1),
            first_weight=mean_where(trace.weights[..., 0], routable),
        )


def mean_where(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean over the counted elements of the last axis, float64 [L] of [L, T]; NaN where none is counted."""
    counted = np.broadcast_to(counted, values.shape)
    return _divide(np.where(counted, values, 0).sum(axis=-1, dtype=np.float64), counted.sum(axis=-1))


def count_choices_of_ids(trace: RoutingTrace, first_only: bool = False) -> Iterator[np.ndarray]:
    """How often each id chose each expert, int64 [U, N], ids ascending; one layer at a time, since they are large.

    Args:
        trace: with U distinct ids.
        first_only: count the best expert of each token alone.
    """
    ids, index = np.unique(trace.token_ids, return_inverse=True)
    for experts in trace.experts[..., :1] if first_only else trace.experts:
        yield count_choices(experts, index, len(ids), trace.num_experts)


def mutual_information(counts: np.ndarray) -> np.ndarray:
    """Mutual information of rows and columns of tables of counts, in nats; float64 [...] of [..., rows, columns].

    It is at most the logarithm of the smaller number of rows or columns. Of few occurrences per row it is too high.
    """
    *shape, rows, columns = counts.shape
    joint = _entropy(counts.reshape(*shape, rows * columns))
    information = _entropy(counts.sum(axis=-1)) + _entropy(counts.sum(axis=-2)) - joint
    return np.maximum(information, 0.0)  # rounding may leave less


def id_information(trace: RoutingTrace) -> np.ndarray:
    """Mutual information of a token's id and its experts in each layer, in nats; float64 [L]."""
    return np.array([mutual_information(choices) for choices in count_choices_of_ids(trace)])


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy of counts, in nats; float64 [...] of [..., n]."""
    return entr(_divide(counts, counts.sum(axis=-1, keepdims=True))).sum(axis=-1)


@dataclass(frozen=True, eq=False)
class TopIds:
    """The ids that each expert gets most often; of experts with fewer than r ids the rest is -1 and 0.

    Attributes:
        ids: int64 [L, N, r], the most frequent first.
        counts: int64 [L, N, r], how often.
        shares: float64 [L, N, r], of all that the expert gets.
        lifts: float64 [L, N, r], share over the id's share of the probe.
    """

    ids: np.ndarray
    counts: np.ndarray
    shares: np.ndarray
    lifts: np.ndarray

    @classmethod
    def of(cls, trace: RoutingTrace, num_top: int) -> "TopIds":
        """The r = min(num_top, U) top ids in a trace with U distinct ones."""
        ids, occurrences = np.unique(trace.token_ids, return_counts=True)
        layers = []
        for choices in count_choices_of_ids(trace):
            index = _largest(choices.T, min(num_top, len(ids)))  # [N, r]
            counts = np.take_along_axis(choices.T, index, axis=1)
            shares = counts / np.maximum(choices.sum(axis=0), 1)[:, None]
            lifts = shares / (occurrences[index] / len(trace.token_ids))
            layers.append((np.where(counts > 0, ids[index], -1), counts, shares, lifts))
        return cls(*(np.stack(of_layers) for of_layers in zip(*layers, strict=True)))


def _largest(counts: np.ndarray, num_top: int) -> np.ndarray:
    """Columns of the largest counts of each row, in descending order, the first of equal ones first.

    Args:
        counts: int64 [rows, columns].
        num_top: r.

    Returns:
        int64 [rows, r].
    """
    # One number says both which count is larger and, of equal ones, which comes first.
    ascending = np.arange(counts.shape[1]) - counts * counts.shape[1]
    top = np.argpartition(ascending, num_top - 1, axis=1)[:, :num_top]
    order = np.argsort(np.take_along_axis(ascending, top, axis=1), axis=1)
    return np.take_along_axis(top, order, axis=1)


def coactivation(trace: RoutingTrace) -> np.ndarray:
    """Tokens that chose two experts of a layer together, int64 [L, N, N], symmetric; the diagonal is the load."""
    pairs = np.empty((len(trace.layers), trace.num_experts, trace.num_experts), np.int64)
    for layer, experts in enumerate(trace.experts):
        chosen = np.zeros((len(experts), trace.num_experts + 1), np.float32)
        np.put_along_axis(chosen, experts.astype(np.int64), 1.0, axis=1)  # `NO_EXPERT` falls into the last column
        pairs[layer] = np.rint(chosen[:, :-1].T @ chosen[:, :-1])
    return pairs


def transitions(trace: RoutingTrace) -> np.ndarray:
    """Tokens by their best expert in one layer with experts and in the next, int64 [L - 1, N, N]."""
    first = trace.experts[..., 0].astype(np.int64)
    bins = first[:-1] * trace.num_experts + first[1:]  # [L - 1, T]
    counts = [np.bincount(of_layer, minlength=trace.num_experts**2) for of_layer in bins]
    return np.reshape(counts, (len(bins), trace.num_experts, trace.num_experts)).astype(np.int64)


def fluctuation(before: RoutingTrace, after: RoutingTrace) -> np.ndarray:
    """How much of its experts each token changed: 1 - |A ∩ B| / max(|A|, |B|), float32 [L, T].

    Args:
        before, after: of the same tokens and layers.
    """
    changed = np.empty(before.entropy.shape, np.float32)
    for layer, (old, new) in enumerate(zip(before.experts, after.experts, strict=True)):
        is_shared = (old[:, :, None] == new[:, None, :]) & (old != NO_EXPERT)[:, :, None]  # [T, k, k]
        largest = np.maximum((old != NO_EXPERT).sum(axis=1), (new != NO_EXPERT).sum(axis=1))
        changed[layer] = 1 - is_shared.sum(axis=(1, 2)) / largest
    return changed


@dataclass(frozen=True, eq=False)
class DistinctExperts:
    """Over how many experts the occurrences of an id spread, by their first choices.

    Attributes:
        ids: int64 [F], those that occur often enough.
        distinct: int64 [L, F], experts that any occurrence chose.
        effective: float64 [L, F], exp of the entropy of the choices: equally used experts that are as diverse.
    """

    ids: np.ndarray
    distinct: np.ndarray
    effective: np.ndarray

    @classmethod
    def of(cls, trace: RoutingTrace, min_occurrences: int) -> "DistinctExperts":
        """Of the ids that occur at least `min_occurrences` times."""
        ids, occurrences = np.unique(trace.token_ids, return_counts=True)
        is_frequent = occurrences >= min_occurrences
        choices = [of_layer[is_frequent] for of_layer in count_choices_of_ids(trace, first_only=True)]
        distinct = np.stack([(of_layer > 0).sum(axis=1) for of_layer in choices])
        return cls(ids[is_frequent], distinct, np.stack([np.exp(_entropy(of_layer)) for of_layer in choices]))


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient in float64, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=denominator != 0)
