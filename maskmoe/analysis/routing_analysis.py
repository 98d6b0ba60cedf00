"""Measures how each model of a series routes one probe text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskmoe.analysis.analysis_settings import AnalysisSettings
from maskmoe.analysis.model_series import ModelSource, common_shape, model_folder, tokenizer_folder
from maskmoe.analysis.probe_text import Probe, ProbeText, read_pieces
from maskmoe.analysis.routing_statistics import RoutingStatistics, measure, repeated_ids
from maskmoe.analysis.trace_recording import load_decoder, record_routing
from maskmoe.errors import UserError
from maskmoe.routing_mask.frequency import FrequencyBands, TokenFrequency


@dataclass(frozen=True, eq=False)
class RoutingAnalysis:
    """The results of an analysis.

    Attributes:
        models: the models, in the order of the series.
        statistics: the statistics of each model.
        layers: numbers of the layers with experts, from 1.
        occurrences: occurrences of each id in the probe, int64 [vocab].
        bands: the frequency bands of the ids.
        listed_ids: the ids that `RoutingStatistics.distinct` is about, int64 [F].
        pieces: the vocabulary's piece of every id that occurs; empty without a tokenizer.
    """

    models: Sequence[ModelSource]
    statistics: Sequence[RoutingStatistics]
    layers: tuple[int, ...]
    occurrences: np.ndarray
    bands: FrequencyBands
    listed_ids: np.ndarray
    pieces: Mapping[int, str]


def analyze(
    models: Sequence[ModelSource],
    text: ProbeText,
    settings: AnalysisSettings,
    frequency: TokenFrequency | None = None,
    trace_files: Sequence[Path] = (),
    progress: bool = False,
) -> RoutingAnalysis:
    """Run each model over a probe text and measure how the model routes the text.

    Args:
        models: models that differ only in their weights, in the order of the series.
        text: the source of the probe text.
        settings: the settings of the analysis.
        frequency: token counts that define the frequency bands; None for the counts of the probe.
        trace_files: a file for the trace of each model; empty to write no traces.
        progress: whether to show a progress bar on stderr.

    Raises:
        UserError: a setting, the text or a model does not fit. The error is raised before the first model runs, unless
            the weights of a model are damaged.
    """
    # Everything that can be checked is checked before the first model runs.
    shape, max_seq_length = common_shape(models)
    if frequency is not None and frequency.vocab_size != shape.vocab_size:
        raise UserError(f"--token-frequency counts {frequency.vocab_size:,} ids, the model has {shape.vocab_size:,}")
    seq_length = settings.seq_length or max_seq_length
    if seq_length > max_seq_length:
        raise UserError(f"--seq-length is {seq_length}, but the model takes at most {max_seq_length} tokens")

    # The probe: the same token ids for all models.
    with tokenizer_folder(models[0], settings) as folder:
        sha256 = getattr(models[0].open().args, "tokenizer_sha256", None)
        token_ids = text.read(settings.tokens, seq_length, shape.vocab_size, folder, sha256)
        pieces = read_pieces(folder, token_ids)
    occurrences = np.bincount(token_ids, minlength=shape.vocab_size)
    bands = FrequencyBands(occurrences.astype(np.float64) if frequency is None else frequency.occurrences)

    # At most two traces are in memory at a time.
    statistics, before = [], None
    for position, model in enumerate(tqdm(models, desc="routing the probe", unit="model", disable=not progress)):
        with model_folder(model, settings) as folder:
            trace = record_routing(load_decoder(folder), Probe(token_ids, seq_length, settings.batch_size))
        if trace_files:
            trace.save(trace_files[position], model.name, shape.layers)
        statistics.append(measure(trace, before, bands, settings))
        before = trace
    listed_ids = repeated_ids(token_ids, settings.min_occurrences)
    return RoutingAnalysis(models, statistics, shape.layers, occurrences, bands, listed_ids, pieces)
