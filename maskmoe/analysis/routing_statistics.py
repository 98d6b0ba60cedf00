"""The trace of a model's routing, and its statistics: pure functions of arrays.

The sizes are L layers with experts, T tokens, N experts, k experts of a token, B frequency bands, U distinct ids of a
probe, of which F occur often enough to be listed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from maskmoe.files.outputs import atomic_output
from maskmoe.routing_mask.frequency import FrequencyBands

SPLITS = ("train", "valid", "test")
NO_EXPERT = -1
_SHUFFLES = 4


@dataclass(frozen=True)
class AnalysisSettings:
    """The sizes of the probe, the parameters of the statistics, and the tokenizer.

    An attribute that the command has a flag for has the name of the flag.

    Attributes:
        tokens: Number of tokens of the probe text.
        seq_length: Number of tokens in a window; None for the sequence length of the model, at most an eighth of
            `tokens`.
        batch_size: Number of windows in a batch.
        min_occurrences: Number of occurrences in the probe from which an id counts in the statistics of distinct
            experts.
        top_ids: Number of ids to list for each expert.
        tokenizer_type, tokenizer_model: The values of Megatron's flags; None for the tokenizer of the training run.
    """

    tokens: int = 16384
    seq_length: int | None = None
    batch_size: int = 8
    min_occurrences: int = 8
    top_ids: int = 10
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing of all tokens in all layers with experts.

    Attributes:
        token_ids: int64 [tokens].
        experts: int16 [layers, tokens, k], the chosen experts, the best first; `NO_EXPERT` fills the places of tokens
            with fewer than k experts.
        weights: float32 [layers, tokens, k], the weights of the chosen experts; 0 for `NO_EXPERT`.
        entropy: float32 [layers, tokens], entropy of the probabilities of the visible experts, in nats.
        num_visible: int16 [layers, tokens], number of visible experts of the token's id, V.
        num_experts: Number of experts in a layer, N.
    """

    token_ids: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    entropy: np.ndarray
    num_visible: np.ndarray
    num_experts: int

    @property
    def is_routable(self) -> np.ndarray:
        """Return whether the id of a token sees two or more experts, bool [layers, tokens]."""
        return self.num_visible > 1

    def save(self, path: Path, checkpoint: str, layers: tuple[int, ...]) -> None:
        """Write the arrays to a safetensors file, atomically; its metadata has the other values as JSON.

        Args:
            path: The file to write.
            checkpoint: The name of the model.
            layers: Numbers of the layers with experts, from 1.

        Raises:
            UserError: The file cannot be written.
        """
        tensors = {name: np.ascontiguousarray(v) for name, v in vars(self).items() if isinstance(v, np.ndarray)}
        record = {"checkpoint": checkpoint, "layers": layers, "num_experts": self.num_experts}
        with atomic_output(path) as temporary:
            save_file(tensors, temporary, metadata={name: json.dumps(value) for name, value in record.items()})


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """The statistics of one model. A mean over no tokens is NaN.

    Attributes:
        load: int64 [L, B, N], number of assignments.
        entropy: float64 [L], mean entropy of the routers over the tokens that see two or more experts, in nats.
        entropy_bound: float64 [L], mean of ln V over these tokens, the largest possible mean entropy, in nats.
        first_weight: float64 [L], mean weight of a token's best expert over these tokens.
        single_expert_share: float64 [L], share of the tokens that see one expert.
        explained: float64 [2, 2, L], share of the uncertainty about the experts of a token that its id removes, see
            `explained_by_id`: of its best expert and of all its experts, for all tokens and for the tokens that see two
            or more experts.
        changed: float64 [2 + B, L], share of its experts that a token changed since the previous model, as means over
            groups of tokens: all tokens, the tokens that see two or more experts in either model, and the tokens of
            each frequency band. None for the first model.
        top_ids: int64 [L, N, R], the ids that each expert gets most often, the most frequent first.
        top_counts: int64 [L, N, R], number of tokens with these ids that the expert gets; 0 after all ids of an expert.
        distinct: int64 [L, F], number of experts that the occurrences of an id chose first.
        effective: float64 [L, F], exp of the entropy of these choices: the number of equally used experts with the
            same entropy.
    """

    load: np.ndarray
    entropy: np.ndarray
    entropy_bound: np.ndarray
    first_weight: np.ndarray
    single_expert_share: np.ndarray
    explained: np.ndarray
    changed: np.ndarray | None
    top_ids: np.ndarray
    top_counts: np.ndarray
    distinct: np.ndarray
    effective: np.ndarray


def measure(
    trace: RoutingTrace, before: RoutingTrace | None, bands: FrequencyBands, settings: AnalysisSettings
) -> RoutingStatistics:
    """Compute all statistics of one model.

    Args:
        trace: The trace of the model.
        before: The trace of the previous model of the series; None for the first model.
        bands: The frequency bands of the ids.
        settings: The settings of the analysis.
    """
    band_of_token = bands.band_of_id[trace.token_ids]
    routable = trace.is_routable
    top_ids, top_counts = most_frequent_ids(trace, settings.top_ids)
    distinct, effective = distinct_experts(trace, settings.min_occurrences)
    return RoutingStatistics(
        load=np.stack(
            [count_choices(experts, band_of_token, len(bands.names), trace.num_experts) for experts in trace.experts]
        ),
        entropy=mean_where(trace.entropy, routable),
        entropy_bound=mean_where(np.log(trace.num_visible, dtype=np.float64), routable),
        first_weight=mean_where(trace.weights[..., 0], routable),
        single_expert_share=1 - routable.mean(axis=1),
        explained=np.array(
            [
                [_explained_of_layers(trace, experts, tokens) for tokens in (np.ones_like(routable), routable)]
                for experts in (trace.experts[..., :1], trace.experts)
            ]
        ),
        changed=None if before is None else mean_changes(before, trace, band_of_token, len(bands.names)),
        top_ids=top_ids,
        top_counts=top_counts,
        distinct=distinct,
        effective=effective,
    )


def count_choices(experts: np.ndarray, group_of_token: np.ndarray, num_groups: int, num_experts: int) -> np.ndarray:
    """Count how often the tokens of each group chose each expert in one layer.

    Args:
        experts: int16 [T, k], the chosen experts or `NO_EXPERT`.
        group_of_token: int64 [T], the group of each token.
        num_groups: Number of groups.
        num_experts: Number of experts, N.

    Returns:
        int64 [groups, N]; the sum is the number of chosen experts of all tokens.
    """
    bins = (group_of_token * num_experts)[:, None] + experts
    counts = np.bincount(bins[experts != NO_EXPERT], minlength=num_groups * num_experts)
    return counts.reshape(num_groups, num_experts)


def choices_of_ids(trace: RoutingTrace, first_only: bool = False) -> Iterator[np.ndarray]:
    """Count how often each id chose each expert, int64 [U, N] with ascending ids.

    The tables are large, so this generator yields the table of one layer at a time.

    Args:
        trace: The routing of tokens with U distinct ids.
        first_only: Whether to count only the best expert of each token.
    """
    ids, index = np.unique(trace.token_ids, return_inverse=True)
    for experts in trace.experts[..., :1] if first_only else trace.experts:
        yield count_choices(experts, index, len(ids), trace.num_experts)


def max_over_mean(load: np.ndarray) -> np.ndarray:
    """Return the largest load of an expert over the mean, float64 [...] of [..., N]; NaN if no expert has a load."""
    return _divide(load.max(axis=-1), load.mean(axis=-1))


def mean_where(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return the mean over the counted elements of the last axis, float64 [L] of [L, T]; NaN if none is counted."""
    counted = np.broadcast_to(counted, values.shape)
    return _divide(np.where(counted, values, 0).sum(axis=-1, dtype=np.float64), counted.sum(axis=-1))


def _explained_of_layers(trace: RoutingTrace, experts: np.ndarray, is_counted: np.ndarray) -> list[float]:
    """Return `explained_by_id` of each layer, for experts [L, T, k] and the tokens that are counted, bool [L, T]."""
    return [
        explained_by_id(trace.token_ids[counted], of_layer[counted], trace.num_experts)
        for of_layer, counted in zip(experts, is_counted, strict=True)
    ]


def explained_by_id(token_ids: np.ndarray, experts: np.ndarray, num_experts: int) -> float:
    """Return the share of the uncertainty about the experts of a token in one layer that the token's id removes.

    The share is I(expert; id) / H(expert) with both terms corrected for finite samples: the mutual information of ids
    that were shuffled among the tokens is subtracted from both, which leaves 1 - H(expert | id) / H(expert | shuffled
    id). The expected result is 0 if the experts do not depend on the id; it is 1 if the id decides the experts. Tokens
    whose id occurs once do not count.

    In between, ids with few occurrences bias the result. If an id chooses evenly among a few experts of its own, the
    result is too small: with 16 (64) experts by up to 0.32 (0.43) for 2 occurrences of each id, by 0.08 (0.2) for 16,
    and by 0.03 (0.1) for 40. If an id takes either one expert of its own or any expert, the error is at most 0.1.

    For k > 1 experts, the uncertainty is the sum over the experts of the entropy of "the token goes to this expert".

    Args:
        token_ids: int64 [T].
        experts: int16 [T, k], the chosen experts or `NO_EXPERT`.
        num_experts: Number of experts, N.

    Returns:
        The share, at most 1; NaN if nothing is uncertain even with shuffled ids, for example without tokens.
    """
    ids, index, occurrences = np.unique(token_ids, return_inverse=True, return_counts=True)

    def uncertainty(index: np.ndarray) -> float:
        chosen = count_choices(experts, index, len(ids), num_experts) / occurrences[:, None]  # [U, N]
        entropy = entr(chosen) if experts.shape[1] == 1 else entr(chosen) + entr(1 - chosen)
        return float(occurrences @ entropy.sum(axis=1))

    from scipy.special import entr  # the help of the command needs no scipy

    rng = np.random.default_rng(0)
    shuffled = np.mean([uncertainty(rng.permutation(index)) for _ in range(_SHUFFLES)])
    return float(1 - uncertainty(index) / shuffled) if shuffled else np.nan


def most_frequent_ids(trace: RoutingTrace, num_top: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the R = min(num_top, U) ids that each expert gets most often, and the numbers of tokens with these ids.

    Both results are int64 [L, N, R], see `RoutingStatistics`; equally frequent ids are in ascending order.
    """
    ids, counts = [], []
    for choices in choices_of_ids(trace):
        index = np.argsort(-choices, axis=0, kind="stable")[:num_top]
        counts.append(np.take_along_axis(choices, index, axis=0).T)
        ids.append(np.unique(trace.token_ids)[index].T)
    return np.stack(ids), np.stack(counts)


def repeated_ids(token_ids: np.ndarray, min_occurrences: int) -> np.ndarray:
    """Return the F ids that occur at least `min_occurrences` times, ascending."""
    ids, occurrences = np.unique(token_ids, return_counts=True)
    return ids[occurrences >= min_occurrences]


def distinct_experts(trace: RoutingTrace, min_occurrences: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `distinct` and `effective` of `RoutingStatistics` for the F ids of `repeated_ids`."""
    is_listed = np.isin(np.unique(trace.token_ids), repeated_ids(trace.token_ids, min_occurrences))
    choices = np.stack([counts[is_listed] for counts in choices_of_ids(trace, first_only=True)])
    return (choices > 0).sum(axis=-1), np.exp(_entropy(choices))


def mean_changes(before: RoutingTrace, after: RoutingTrace, band_of_token: np.ndarray, num_bands: int) -> np.ndarray:
    """Return the mean changes of groups of tokens from one model to the next, see `RoutingStatistics.changed`."""
    changed = fluctuation(before, after)
    groups = [np.ones(len(band_of_token), bool), before.is_routable | after.is_routable]
    groups += [band_of_token == band for band in range(num_bands)]
    return np.stack([mean_where(changed, group) for group in groups])


def fluctuation(before: RoutingTrace, after: RoutingTrace) -> np.ndarray:
    """Return which share of its experts each token changed, 1 - |A ∩ B| / max(|A|, |B|), float32 [L, T].

    Args:
        before: The trace with the experts A of each token.
        after: The trace of the same tokens and layers with the experts B.
    """
    changed = np.empty(before.entropy.shape, np.float32)
    for layer, (old, new) in enumerate(zip(before.experts, after.experts, strict=True)):
        is_shared = (old[:, :, None] == new[:, None, :]) & (old != NO_EXPERT)[:, :, None]  # [T, k, k]
        largest = np.maximum((old != NO_EXPERT).sum(axis=1), (new != NO_EXPERT).sum(axis=1))
        changed[layer] = 1 - is_shared.sum(axis=(1, 2)) / largest
    return changed


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Return the entropy of counts, in nats, float64 [...] of [..., n]."""
    from scipy.special import entr  # the help of the command needs no scipy

    return entr(_divide(counts, counts.sum(axis=-1, keepdims=True))).sum(axis=-1)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient in float64; NaN if the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, np.float64(numerator) / np.float64(denominator))
