"""Measures how each model of a series routes one probe text."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from maskmoe.errors import UserError
from maskmoe.routing_analysis.models import ModelSource, common_shape, model_folder, tokenizer_folder, tokenizer_sha256
from maskmoe.routing_analysis.probe import Probe, ProbeText, read_pieces
from maskmoe.routing_analysis.recording import load_decoder, record_routing
from maskmoe.routing_analysis.settings import AnalysisSettings, Conversion
from maskmoe.routing_analysis.statistics import (
    DistinctExperts,
    Entropy,
    TopIds,
    coactivation,
    dropped_share,
    expert_load,
    fluctuation,
    id_information,
    mean_where,
    mutual_information,
    transitions,
)
from maskmoe.routing_analysis.trace import RoutingTrace
from maskmoe.routing_mask.frequency import FrequencyBands, TokenFrequency


@dataclass(frozen=True, eq=False)
class CheckpointStatistics:
    """The statistics of one model over the probe.

    The sizes are L layers with experts, N experts and B frequency bands.

    Attributes:
        name, iteration: name and iteration of the model.
        load: int64 [L, B, N], number of assignments.
        dropped: float64 [capacity factors, L], share of the assignments that experts of limited capacity would drop.
        entropy: the entropy of the routers.
        id_information: float64 [L], mutual information of the id and the experts of a token, in nats.
        layer_information: float64 [L - 1], mutual information of a token's best experts in consecutive layers with
            experts, in nats.
        top_ids: the most frequent ids of each expert.
        distinct_experts: the number of experts of each id.
        coactivation: int64 [L, N, N], number of tokens that chose two experts together.
        transitions: int64 [L - 1, N, N], number of tokens by their best experts in consecutive layers with experts.
    """

    name: str
    iteration: int | None
    load: np.ndarray
    dropped: np.ndarray
    entropy: Entropy
    id_information: np.ndarray
    layer_information: np.ndarray
    top_ids: TopIds
    distinct_experts: DistinctExperts
    coactivation: np.ndarray
    transitions: np.ndarray


@dataclass(frozen=True, eq=False)
class Fluctuation:
    """The share of its experts that a token changed from one model to the next, as means over tokens.

    The sizes are L layers with experts and B frequency bands.

    Attributes:
        before, after: names of the two models.
        by_layer: float64 [L], mean over all tokens.
        routable_by_layer: float64 [L], mean over the tokens that see two or more experts in either model; NaN without
            such tokens.
        by_band: float64 [B, L], means over the tokens of a frequency band; NaN if a band has no token.
    """

    before: str
    after: str
    by_layer: np.ndarray
    routable_by_layer: np.ndarray
    by_band: np.ndarray


@dataclass(frozen=True, eq=False)
class Analysis:
    """The results of an analysis.

    Attributes:
        probe: the probe text.
        bands: the frequency bands of the ids.
        settings: the settings of the analysis.
        vocab_size: number of token ids of the models.
        num_experts: number of experts in a layer, N.
        topk: number of experts of a token, k.
        layers: numbers of the layers with experts, from 1.
        checkpoints: statistics of the models, in their order.
        fluctuation: the changes from each model to the next.
    """

    probe: Probe
    bands: FrequencyBands
    settings: AnalysisSettings
    vocab_size: int
    num_experts: int
    topk: int
    layers: tuple[int, ...]
    checkpoints: tuple[CheckpointStatistics, ...]
    fluctuation: tuple[Fluctuation, ...]

    @property
    def micro_batch_tokens(self) -> int:
        """Return the number of tokens that share the capacity of the experts."""
        return _micro_batch_tokens(self.settings, self.probe)


def analyze(
    models: Sequence[ModelSource],
    text: ProbeText,
    settings: AnalysisSettings | None = None,
    frequency: TokenFrequency | None = None,
    conversion: Conversion | None = None,
    keep_trace: Callable[[int, RoutingTrace], None] = lambda position, trace: None,
    progress: bool = False,
) -> Analysis:
    """Run each model over a probe text and measure how the model routes the text.

    Args:
        models: models that differ only in their weights, in the order of the series.
        text: the source of the probe text.
        settings: the settings of the analysis.
        frequency: token counts that define the frequency bands; None for the counts of the probe.
        conversion: how Megatron checkpoints are converted.
        keep_trace: a function that gets the position in `models` and the trace of every model.
        progress: whether to show a progress bar on stderr.

    Raises:
        UserError: a setting, the text or a model does not fit. The error is raised before the first model runs, unless
            the weights of a model are damaged.
    """
    settings, conversion = settings or AnalysisSettings(), conversion or Conversion()
    settings.check()
    # Everything that can be checked is checked before the first model runs.
    shape, max_seq_length = common_shape(models)
    if frequency is not None and frequency.vocab_size != shape.vocab_size:
        raise UserError(f"--token-frequency counts {frequency.vocab_size:,} ids, the model has {shape.vocab_size:,}")
    seq_length = settings.seq_length or max_seq_length
    if seq_length > max_seq_length:
        raise UserError(f"--seq-length is {seq_length}, but the model takes at most {max_seq_length} tokens")
    text.check(shape.vocab_size, tokenizer_sha256(models[0]))

    # The probe: the same token ids for all models.
    with tokenizer_folder(models[0], conversion) as folder:
        token_ids = text.read(settings.num_tokens, seq_length, shape.vocab_size, folder)
        probe = Probe(token_ids, seq_length, settings.batch_size, text.source, read_pieces(folder, token_ids))
    occurrences = np.bincount(token_ids, minlength=shape.vocab_size).astype(np.float64)
    bands = FrequencyBands.from_occurrences(occurrences if frequency is None else frequency.occurrences)

    # The traces are made one by one, while `measure` asks for them.
    def record(position: int, model: ModelSource) -> RoutingTrace:
        with model_folder(model, conversion) as folder:
            trace = record_routing(load_decoder(folder), probe, model.name, model.iteration)
        keep_trace(position, trace)
        return trace

    bar = tqdm(models, desc="routing the probe", unit="model", disable=not progress)
    checkpoints, changes = measure(map(record, itertools.count(), bar), probe, bands, settings)
    return Analysis(
        probe=probe,
        bands=bands,
        settings=settings,
        vocab_size=shape.vocab_size,
        num_experts=shape.num_experts,
        topk=shape.topk,
        layers=shape.layers,
        checkpoints=checkpoints,
        fluctuation=changes,
    )


def measure(
    traces: Iterable[RoutingTrace], probe: Probe, bands: FrequencyBands, settings: AnalysisSettings
) -> tuple[tuple[CheckpointStatistics, ...], tuple[Fluctuation, ...]]:
    """Measure each trace, and the changes from each trace to the next.

    At most two traces are in memory at a time.

    Args:
        traces: traces of the probe, in the order of the series.
        probe: the probe text.
        bands: the frequency bands of the ids.
        settings: the settings of the analysis.

    Returns:
        The statistics of every trace, and the changes between consecutive traces.
    """
    checkpoints, changes = [], []
    band_of_token = bands.band_of_id[probe.token_ids]
    before = None
    for trace in traces:
        checkpoints.append(_measure_checkpoint(trace, probe, band_of_token, len(bands.names), settings))
        if before is not None:
            changes.append(_measure_fluctuation(before, trace, band_of_token, len(bands.names)))
        before = trace
    return tuple(checkpoints), tuple(changes)


def _measure_checkpoint(
    trace: RoutingTrace, probe: Probe, band_of_token: np.ndarray, num_bands: int, settings: AnalysisSettings
) -> CheckpointStatistics:
    """Compute all statistics of one trace."""
    micro_batch_tokens = _micro_batch_tokens(settings, probe)
    next_layer = transitions(trace)
    return CheckpointStatistics(
        name=trace.name,
        iteration=trace.iteration,
        load=expert_load(trace, band_of_token, num_bands),
        dropped=np.array([dropped_share(trace, factor, micro_batch_tokens) for factor in settings.capacity_factors]),
        entropy=Entropy.from_trace(trace),
        id_information=id_information(trace),
        layer_information=mutual_information(next_layer),
        top_ids=TopIds.from_trace(trace, settings.num_top_ids),
        distinct_experts=DistinctExperts.from_trace(trace, settings.min_occurrences),
        coactivation=coactivation(trace),
        transitions=next_layer,
    )


def _measure_fluctuation(
    before: RoutingTrace, after: RoutingTrace, band_of_token: np.ndarray, num_bands: int
) -> Fluctuation:
    """Compute the means of the share of experts that each token changed."""
    changed = fluctuation(before, after)
    return Fluctuation(
        before=before.name,
        after=after.name,
        by_layer=changed.mean(axis=1, dtype=np.float64),
        routable_by_layer=mean_where(changed, before.is_routable | after.is_routable),
        by_band=np.stack([mean_where(changed, band_of_token == band) for band in range(num_bands)]),
    )


def _micro_batch_tokens(settings: AnalysisSettings, probe: Probe) -> int:
    return settings.micro_batch_tokens or probe.seq_length * probe.batch_size
