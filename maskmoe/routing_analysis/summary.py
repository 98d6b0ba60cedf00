"""Converts the results of an analysis to the JSON values of routing.json."""

import math
from typing import Any

import numpy as np

from maskmoe.routing_analysis.analysis import Analysis, CheckpointStatistics, Fluctuation
from maskmoe.routing_analysis.statistics import coefficient_of_variation, max_over_mean, mean_where


def summarise(analysis: Analysis) -> dict[str, Any]:
    """Return all results but the tables of ids and of pairs of experts.

    Lists over layers are in the order of `layers`. A number without a value, such as the entropy of a layer in which no
    token has a choice, is None.
    """
    return {
        "probe": _probe(analysis),
        "vocab_size": analysis.vocab_size,
        "num_experts": analysis.num_experts,
        "topk": analysis.topk,
        "layers": list(analysis.layers),
        "checkpoints": [_checkpoint(analysis, checkpoint) for checkpoint in analysis.checkpoints],
        "fluctuation": [_fluctuation(analysis, change) for change in analysis.fluctuation],
    }


def _probe(analysis: Analysis) -> dict[str, Any]:
    probe, bands = analysis.probe, analysis.bands
    tokens_of_band = np.bincount(bands.band_of_id[probe.token_ids], minlength=len(bands.names))
    ids_of_band = np.bincount(bands.band_of_id[np.unique(probe.token_ids)], minlength=len(bands.names))
    return {
        "source": probe.source,
        "tokens": len(probe.token_ids),
        "distinct_ids": int(ids_of_band.sum()),
        "seq_length": probe.seq_length,
        "batch_size": probe.batch_size,
        "micro_batch_tokens": analysis.micro_batch_tokens,
        "min_occurrences": analysis.settings.min_occurrences,
        "bands": [
            {"name": name, "tokens": int(tokens), "distinct_ids": int(ids)}
            for name, tokens, ids in zip(bands.names, tokens_of_band, ids_of_band, strict=True)
        ],
    }


def _checkpoint(analysis: Analysis, checkpoint: CheckpointStatistics) -> dict[str, Any]:
    load, entropy = checkpoint.load, checkpoint.entropy
    return {
        "name": checkpoint.name,
        "iteration": checkpoint.iteration,
        "load": _load(load.sum(axis=1))
        | {"by_band": {name: _load(load[:, band]) for band, name in enumerate(analysis.bands.names)}},
        "drops": [
            {"capacity_factor": factor, "by_layer": json_numbers(dropped)}
            for factor, dropped in zip(analysis.settings.capacity_factors, checkpoint.dropped, strict=True)
        ],
        "entropy": json_numbers(entropy.mean),
        "entropy_bound": json_numbers(entropy.bound),
        "single_expert_token_share": json_numbers(entropy.single_expert_token_share),
        "first_weight": json_numbers(entropy.first_weight),
        "id_expert_information": json_numbers(checkpoint.id_information),
        "id_expert_information_bound": math.log(analysis.num_experts),
        "next_layer_information": json_numbers(checkpoint.layer_information),
        "distinct_experts": _distinct_experts(analysis, checkpoint),
    }


def _load(load: np.ndarray) -> dict[str, Any]:
    """Return the unevenness of a load, int64 [L, N], and the load."""
    return {
        "assignments": load.tolist(),
        "max_over_mean": json_numbers(max_over_mean(load)),
        "coefficient_of_variation": json_numbers(coefficient_of_variation(load)),
    }


def _distinct_experts(analysis: Analysis, checkpoint: CheckpointStatistics) -> dict[str, Any]:
    ids = checkpoint.distinct_experts.ids
    band_of_id = analysis.bands.band_of_id[ids]
    by_band = {name: _means_of_ids(checkpoint, band_of_id == band) for band, name in enumerate(analysis.bands.names)}
    return _means_of_ids(checkpoint, np.ones(len(ids), bool)) | {"by_band": by_band}


def _means_of_ids(checkpoint: CheckpointStatistics, counted: np.ndarray) -> dict[str, Any]:
    """Return the means over the ids that `counted`, bool [F], selects."""
    of_ids = checkpoint.distinct_experts
    return {
        "ids": int(counted.sum()),
        "by_layer": json_numbers(mean_where(of_ids.distinct, counted)),
        "effective_by_layer": json_numbers(mean_where(of_ids.effective, counted)),
    }


def _fluctuation(analysis: Analysis, change: Fluctuation) -> dict[str, Any]:
    return {
        "from": change.before,
        "to": change.after,
        "by_layer": json_numbers(change.by_layer),
        "routable_by_layer": json_numbers(change.routable_by_layer),
        "by_band": {
            name: json_numbers(of_band) for name, of_band in zip(analysis.bands.names, change.by_band, strict=True)
        },
    }


def json_numbers(values: np.ndarray) -> list[float | None]:
    """Return numbers, [n], as JSON values; NaN, which JSON does not have, becomes None."""
    return [None if math.isnan(value) else value for value in values.tolist()]
