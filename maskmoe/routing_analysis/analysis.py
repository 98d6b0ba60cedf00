"""The statistics of a series of models over one probe text."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from maskmoe.errors import UserError
from maskmoe.routing_analysis.models import (
    Conversion,
    ModelSource,
    common_shape,
    model_folder,
    tokenizer_folder,
    tokenizer_sha256,
)
from maskmoe.routing_analysis.probe import Probe, ProbeText, read_pieces
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
from maskmoe.routing_mask.frequency import TokenFrequency

if TYPE_CHECKING:
    from maskmoe.routing_mask.frequency_bands import FrequencyBands


@dataclass(frozen=True)
class AnalysisSettings:
    """What is measured.

    Attributes:
        num_tokens: of the probe text.
        seq_length: tokens of a window; None: what the model was made for.
        batch_size: windows that a model gets at a time.
        capacity_factors: for the share of dropped assignments.
        micro_batch_tokens: tokens that share experts' capacity; None: those of a batch.
        min_occurrences: of an id in the probe, for it to count in the distinct experts of ids.
        num_top_ids: most frequent ids that are listed for every expert.
    """

    num_tokens: int = 16384
    seq_length: int | None = None
    batch_size: int = 8
    capacity_factors: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0)
    micro_batch_tokens: int | None = None
    min_occurrences: int = 8
    num_top_ids: int = 10

    def check(self) -> None:
        """Raises UserError if a value is impossible."""
        sizes = {
            "--tokens": self.num_tokens,
            "--seq-length": self.seq_length,
            "--batch-size": self.batch_size,
            "--micro-batch-tokens": self.micro_batch_tokens,
            "--min-occurrences": self.min_occurrences,
            "--top-ids": self.num_top_ids,
        }
        for flag, value in sizes.items():
            if value is not None and value < 1:
                raise UserError(f"{flag} must be at least 1, not {value}")
        for factor in self.capacity_factors:
            if not 0 < factor < float("inf"):
                raise UserError(f"--capacity-factors must be positive numbers, not {factor}")


@dataclass(frozen=True, eq=False)
class CheckpointStatistics:
    """How one model routes the probe. L layers with experts, N experts, B frequency bands.

    Attributes:
        name, iteration: of the model.
        load: int64 [L, B, N], assignments.
        dropped: float64 [capacity factors, L], share of the assignments.
        entropy: see there.
        id_information: float64 [L], mutual information of a token's id and its experts, in nats.
        layer_information: float64 [L - 1], of its best expert in a layer and in the next.
        top_ids: see there.
        distinct_experts: see there.
        coactivation: int64 [L, N, N], see there.
        transitions: int64 [L - 1, N, N], see there.
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
    """How much of the experts changed from one model to the next. L layers with experts, B frequency bands.

    Attributes:
        before, after: names of the models.
        by_layer: float64 [L], mean over all tokens.
        routable_by_layer: float64 [L], over those that see two experts or more in either; NaN where there is none.
        by_band: float64 [B, L], NaN where a band has no token.
    """

    before: str
    after: str
    by_layer: np.ndarray
    routable_by_layer: np.ndarray
    by_band: np.ndarray


@dataclass(frozen=True, eq=False)
class Analysis:
    """All results.

    Attributes:
        probe: the text.
        bands: of ids by frequency.
        settings: what was measured.
        vocab_size: of the models.
        num_experts: N.
        topk: k.
        layers: numbers of those with experts, from 1.
        checkpoints: in order.
        fluctuation: between each and the next.
    """

    probe: Probe
    bands: "FrequencyBands"
    settings: AnalysisSettings
    vocab_size: int
    num_experts: int
    topk: int
    layers: tuple[int, ...]
    checkpoints: tuple[CheckpointStatistics, ...]
    fluctuation: tuple[Fluctuation, ...]

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that share experts' capacity."""
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
    """Run models over a probe text, one after the other, and measure how they route it.

    Args:
        models: in order, alike but for their weights.
        text: what they read.
        settings: what is measured.
        frequency: counts that define the frequency bands; None: those of the probe.
        conversion: how Megatron's checkpoints are converted.
        keep_trace: is given the routing of every model, with its position in `models`.
        progress: show a progress bar on stderr.

    Raises:
        UserError: something does not fit; before the first model runs, unless a model's weights are damaged.
    """
    settings, conversion = settings or AnalysisSettings(), conversion or Conversion()
    settings.check()
    shape, max_seq_length = common_shape(models)
    if frequency is not None and frequency.vocab_size != shape.vocab_size:
        raise UserError(f"--token-frequency counts {frequency.vocab_size:,} ids, the model has {shape.vocab_size:,}")
    seq_length = settings.seq_length or max_seq_length
    if seq_length > max_seq_length:
        raise UserError(f"--seq-length is {seq_length}, but the model takes at most {max_seq_length} tokens")
    text.check(shape.vocab_size, tokenizer_sha256(models[0]))
    with tokenizer_folder(models[0], conversion) as folder:
        token_ids = text.read(settings.num_tokens, seq_length, shape.vocab_size, folder)
        probe = Probe(token_ids, seq_length, settings.batch_size, text.source, read_pieces(folder, token_ids))

    from maskmoe.routing_analysis.recording import load_decoder, record_routing
    from maskmoe.routing_mask.frequency_bands import FrequencyBands

    def record(position: int, model: ModelSource) -> RoutingTrace:
        with model_folder(model, conversion) as folder:
            trace = record_routing(load_decoder(folder), probe, model.name, model.iteration)
        keep_trace(position, trace)
        return trace

    occurrences = np.bincount(token_ids, minlength=shape.vocab_size).astype(np.float64)
    bands = FrequencyBands.from_occurrences(occurrences if frequency is None else frequency.occurrences)
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
    traces: Iterable[RoutingTrace], probe: Probe, bands: "FrequencyBands", settings: AnalysisSettings
) -> tuple[tuple[CheckpointStatistics, ...], tuple[Fluctuation, ...]]:
    """The statistics of each trace, and of each and the next; no more than two traces are in memory.

    Args:
        traces: all of the probe, in order.
        probe: what was routed.
        bands: of ids by frequency.
        settings: what is measured.
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
    micro_batch_tokens = _micro_batch_tokens(settings, probe)
    next_layer = transitions(trace)
    return CheckpointStatistics(
        name=trace.name,
        iteration=trace.iteration,
        load=expert_load(trace, band_of_token, num_bands),
        dropped=np.array([dropped_share(trace, factor, micro_batch_tokens) for factor in settings.capacity_factors]),
        entropy=Entropy.of(trace),
        id_information=id_information(trace),
        layer_information=mutual_information(next_layer),
        top_ids=TopIds.of(trace, settings.num_top_ids),
        distinct_experts=DistinctExperts.of(trace, settings.min_occurrences),
        coactivation=coactivation(trace),
        transitions=next_layer,
    )


def _measure_fluctuation(
    before: RoutingTrace, after: RoutingTrace, band_of_token: np.ndarray, num_bands: int
) -> Fluctuation:
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
