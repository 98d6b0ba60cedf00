"""Runs a model over a probe and records the choices of its routers, through forward hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import softplus
from transformers.utils import logging

from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEForCausalLM, MaskMoEModel
from maskmoe.huggingface.modeling_maskmoe import MaskMoESparseMoeBlock, MaskMoETopKRouter
from maskmoe.routing_analysis.probe import Probe
from maskmoe.routing_analysis.trace import NO_EXPERT, RoutingTrace


def load_decoder(folder: Path) -> MaskMoEModel:
    """Load the decoder of an exported model for inference, in the dtype of the stored weights.

    Raises:
        UserError: the model cannot be read, or lacks weights.
    """
    logging.disable_progress_bar()
    try:
        model, info = MaskMoEForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is not a complete MaskMoE model: {' '.join(str(error).split())}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{folder} lacks weights, such as {missing[0]}; export the model again")
    # Under the CPU adapter the current device is the CPU.
    device = torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return model.model.to(device).eval()


@torch.inference_mode()
def record_routing(model: MaskMoEModel, probe: Probe, name: str, iteration: int | None = None) -> RoutingTrace:
    """Record how a model routes all tokens of a probe.

    Args:
        model: the decoder of a model with experts.
        probe: the probe text, which the model reads window by window.
        name: the name of the model in the trace.
        iteration: the iteration of the model in the trace; None if it is unknown.
    """
    with _recording(model) as recorders:
        for batch in probe.batches():
            model(input_ids=torch.from_numpy(batch).to(model.device), use_cache=False)
    layers = [recorder.result() for recorder in recorders.values()]
    stacked = {field: np.stack([layer[field] for layer in layers]) for field in layers[0]}
    return RoutingTrace(
        token_ids=probe.token_ids,
        layers=tuple(recorders),
        **stacked,
        num_experts=model.config.num_experts,
        name=name,
        iteration=iteration,
    )


@contextmanager
def _recording(model: MaskMoEModel) -> Iterator[dict[int, "_RouterRecorder"]]:
    """Attach a recorder to every router during the block; yield the recorders by the numbers of their layers."""
    recorders, handles = {}, []
    for number, layer in enumerate(model.layers, start=1):
        if isinstance(layer.mlp, MaskMoESparseMoeBlock):
            recorders[number] = _RouterRecorder()
            handles.append(layer.mlp.gate.register_forward_hook(recorders[number]))
    try:
        yield recorders
    finally:
        for handle in handles:
            handle.remove()


class _RouterRecorder:
    """A forward hook that keeps the choices of one router."""

    def __init__(self) -> None:
        self._batches: list[dict[str, np.ndarray]] = []

    def __call__(
        self, router: MaskMoETopKRouter, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        _, visible = inputs  # bool [tokens, experts]
        logits, weights, indices = outputs
        fields = {
            "experts": selected_experts(indices).short(),
            "weights": weights.float(),
            "entropy": torch.special.entr(_probabilities(logits, router.scoring_func)).sum(dim=-1),
            "num_visible": visible.sum(dim=-1).short(),
        }
        self._batches.append({name: values.cpu().numpy() for name, values in fields.items()})

    def result(self) -> dict[str, Any]:
        """Return the arrays of a `RoutingTrace` for this layer, without the axis of layers."""
        return {name: np.concatenate([batch[name] for batch in self._batches]) for name in self._batches[0]}


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


def _probabilities(logits: Tensor, scoring_func: str) -> Tensor:
    """Return the normalised scores, [tokens, experts]; 0 for invisible experts, whose logits are -inf."""
    if scoring_func == "softmax":
        return logits.softmax(dim=-1)
    scores = logits.sigmoid() if scoring_func == "sigmoid" else softplus(logits).sqrt()
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
