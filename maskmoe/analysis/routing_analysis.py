"""Runs each model of a series over one probe text, records the choices of its routers, and measures them."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maskmoe.analysis.model_series import ModelSource, common_shape, model_folder, tokenizer_folder
from maskmoe.analysis.probe_text import DatasetText, read_pieces, windows_of
from maskmoe.analysis.routing_statistics import (
    NO_EXPERT,
    AnalysisSettings,
    RoutingStatistics,
    RoutingTrace,
    measure,
    repeated_ids,
)
from maskmoe.conversion.model_files import load_exported_model
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEModel
from maskmoe.huggingface.modeling_maskmoe import MaskMoETopKRouter, score
from maskmoe.routing_mask.frequency import FrequencyBands, TokenFrequency


@dataclass(frozen=True, eq=False)
class RoutingAnalysis:
    """The results of an analysis.

    Attributes:
        models: The models, in the order of the series.
        statistics: The statistics of each model.
        layers: Numbers of the layers with experts, from 1.
        occurrences: Occurrences of each id in the probe, int64 [vocab].
        bands: The frequency bands of the ids.
        listed_ids: The ids that `RoutingStatistics.distinct` is about, int64 [F].
        pieces: The vocabulary's piece of every id that occurs; empty without a tokenizer.
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
    text: DatasetText,
    settings: AnalysisSettings,
    frequency: TokenFrequency | None = None,
    trace_files: Sequence[Path] = (),
) -> RoutingAnalysis:
    """Run each model over a probe text and measure how the model routes the text.

    Args:
        models: Models that differ only in their weights, in the order of the series.
        text: The dataset with the probe text.
        settings: The settings of the analysis.
        frequency: Token counts that define the frequency bands; None for the counts of the probe.
        trace_files: A file for the trace of each model; empty to write no traces.

    Raises:
        UserError: A setting, the text or a model does not fit. The error is raised before the first model runs, unless
            the weights of a model are damaged.
    """
    # Everything that can be checked is checked before the first model runs.
    shape, max_seq_length = common_shape(models)
    if frequency is not None and frequency.vocab_size != shape.vocab_size:
        raise UserError(f"--token-frequency counts {frequency.vocab_size:,} ids, the model has {shape.vocab_size:,}")
    # The text is read in at least eight windows: a single long window would show only one place of the text.
    seq_length = settings.seq_length or min(max_seq_length, max(1, settings.tokens // 8))
    if seq_length > max_seq_length:
        raise UserError(f"--seq-length is {seq_length}, but the model takes at most {max_seq_length} tokens")

    # The probe: the same token ids for all models.
    with tokenizer_folder(models[0], settings) as folder:
        sha256 = getattr(models[0].open().args, "tokenizer_sha256", None)
        counted_with = frequency.tokenizer if frequency is not None else None
        if counted_with is not None and sha256 not in (None, counted_with.sha256):
            raise UserError(f"--token-frequency was made with another tokenizer ({counted_with}) than the model's")
        token_ids = text.read(settings.tokens, seq_length, shape.vocab_size, sha256)
        pieces = read_pieces(folder, token_ids)
    occurrences = np.bincount(token_ids, minlength=shape.vocab_size)
    bands = FrequencyBands(occurrences.astype(np.float64) if frequency is None else frequency.occurrences)

    # At most two traces are in memory at a time.
    statistics, before = [], None
    for position, model in enumerate(tqdm(models, desc="routing the probe", unit="model")):
        with model_folder(model) as folder:
            decoder = load_exported_model(folder).model
            trace = record_routing(decoder, token_ids, seq_length, settings.batch_size)
        if trace_files:
            trace.save(trace_files[position], model.name, shape.layers)
        statistics.append(measure(trace, before, bands, settings))
        before = trace
    listed_ids = repeated_ids(token_ids, settings.min_occurrences)
    return RoutingAnalysis(models, statistics, shape.layers, occurrences, bands, listed_ids, pieces)


@torch.inference_mode()
def record_routing(model: MaskMoEModel, token_ids: np.ndarray, seq_length: int, batch_size: int) -> RoutingTrace:
    """Record how a model routes all tokens of a probe.

    Args:
        model: The decoder of a model with experts.
        token_ids: The probe text, int64 [tokens], which the model reads window by window.
        seq_length: Number of tokens in a window; the last window may have fewer.
        batch_size: Number of windows in a batch.
    """
    recorded = {module: [] for module in model.modules() if isinstance(module, MaskMoETopKRouter)}

    def record(
        router: MaskMoETopKRouter, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        _, visible = inputs  # bool [tokens, experts]
        logits, weights, indices = outputs
        scores = score(logits, router.scoring_func)  # 0 for invisible experts
        fields = {
            "experts": selected_experts(indices).short(),
            "weights": weights.float(),
            "entropy": torch.special.entr(scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)).sum(dim=-1),
            "num_visible": visible.sum(dim=-1).short(),
        }
        recorded[router].append({name: values.cpu().numpy() for name, values in fields.items()})

    with ExitStack() as hooks:
        for router in recorded:
            hooks.enter_context(router.register_forward_hook(record))
        for batch in windows_of(token_ids, seq_length, batch_size):
            model(input_ids=torch.from_numpy(batch).to(model.device), use_cache=False)

    arrays = {
        field: np.stack([np.concatenate([batch[field] for batch in batches]) for batches in recorded.values()])
        for field in ("experts", "weights", "entropy", "num_visible")
    }
    return RoutingTrace(token_ids, **arrays, num_experts=model.config.num_experts)


def selected_experts(indices: Tensor) -> Tensor:
    """Return the selected experts, [tokens, k], with `NO_EXPERT` where the router had no further expert to select.

    A router without a further expert repeats its best expert, and it never repeats another expert. So a repetition is
    not a choice, whatever its weight.

    Args:
        indices: int64 [tokens, k], as the router returns them.
    """
    is_repeated = indices == indices[:, :1]
    is_repeated[:, 0] = False
    return indices.masked_fill(is_repeated, NO_EXPERT)
