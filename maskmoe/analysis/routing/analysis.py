"""Measures how each model of a series routes one probe text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskmoe.analysis.routing.models import ModelShape, ModelSource, common_shape, model_folder, tokenizer_folder
from maskmoe.analysis.routing.probe import Probe, ProbeText, read_pieces
from maskmoe.analysis.routing.recording import load_decoder, record_routing
from maskmoe.analysis.routing.settings import AnalysisSettings
from maskmoe.analysis.routing.statistics import measure, repeated_ids
from maskmoe.errors import UserError
from maskmoe.routing_mask.frequency import FrequencyBands, TokenFrequency


@dataclass(frozen=True, eq=False)
class Analysis:
    """The results of an analysis.

    The sizes are M models, L layers with experts, N experts and B frequency bands.

    Attributes:
        models: the models, in the order of the series.
        shape: the sizes of the models.
        probe: the probe text.
        bands: the frequency bands of the ids.
        settings: the settings of the analysis.
        micro_batch_tokens: number of tokens that share the capacity of the experts.
        statistics: the arrays that `measure` returns for a model, by name, with the axis of the models in front.
    """

    models: Sequence[ModelSource]
    shape: ModelShape
    probe: Probe
    bands: FrequencyBands
    settings: AnalysisSettings
    micro_batch_tokens: int
    statistics: dict[str, np.ndarray]

    def counted_ids(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the F ids that count for distinct experts, their occurrences and their bands, each int64 [F]."""
        ids, occurrences = repeated_ids(self.probe.token_ids, self.settings.min_occurrences)
        return ids, occurrences, self.bands.band_of_id[ids]


def analyze(
    models: Sequence[ModelSource],
    text: ProbeText,
    settings: AnalysisSettings,
    frequency: TokenFrequency | None = None,
    trace_files: Sequence[Path] = (),
    progress: bool = False,
) -> Analysis:
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
    micro_batch_tokens = settings.micro_batch_tokens or seq_length * settings.batch_size

    # The probe: the same token ids for all models.
    with tokenizer_folder(models[0], settings) as folder:
        sha256 = getattr(models[0].open().args, "tokenizer_sha256", None)
        token_ids = text.read(settings.tokens, seq_length, shape.vocab_size, folder, sha256)
        probe = Probe(token_ids, seq_length, settings.batch_size, text.source, read_pieces(folder, token_ids))
    occurrences = np.bincount(token_ids, minlength=shape.vocab_size).astype(np.float64)
    bands = FrequencyBands(occurrences if frequency is None else frequency.occurrences)

    # At most two traces are in memory at a time.
    measured = []
    before = None
    for position, model in enumerate(tqdm(models, desc="routing the probe", unit="model", disable=not progress)):
        with model_folder(model, settings) as folder:
            trace = record_routing(load_decoder(folder), probe, model.name, model.iteration)
        if trace_files:
            trace.save(trace_files[position])
        measured.append(measure(trace, before or trace, bands, micro_batch_tokens, settings))
        before = trace
    statistics = {name: np.stack([of_model[name] for of_model in measured]) for name in measured[0]}
    return Analysis(models, shape, probe, bands, settings, micro_batch_tokens, statistics)
