"""Runs a model over a probe and writes down what its routers do, from outside, through forward hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging

from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEForCausalLM, MaskMoEModel
from maskmoe.huggingface.modeling_maskmoe import MaskMoESparseMoeBlock, MaskMoETopKRouter
from maskmoe.routing_analysis.probe import Probe
from maskmoe.routing_analysis.trace import NO_EXPERT, RoutingTrace


def load_decoder(folder: Path) -> MaskMoEModel:
    """The decoder of an exported model, in the type that its weights are stored in, ready for inference.

    Raises:
        UserError: it cannot be read, or lacks weights.
    """
    logging.disable_progress_bar()
    try:
        model, info = MaskMoEForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is no whole MaskMoE model: {' '.join(str(error).split())}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{folder} lacks weights, such as {missing[0]}; export the model again")
    # Under the CPU adapter the current device is the CPU.
    device = torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return model.model.to(device).eval()


@torch.inference_mode()
def record_routing(model: MaskMoEModel, probe: Probe, name: str, iteration: int | None = None) -> RoutingTrace:
    """The routing of all tokens of a probe.

    Args:
        model: the decoder of a model with experts.
        probe: what it reads, window by window.
        name, iteration: of the trace.
    """
    with _recording(model) as recorders:
        for batch in probe.batches():
            model(input_ids=torch.from_numpy(batch).to(model.device), use_cache=False)
    routed = [recorder.result() for recorder in recorders.values()]
    stacked = {field: np.stack([of_layer[field] for of_layer in routed]) for field in routed[0]}
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
    """A recorder of every router, by the number of its layer from 1; at the end they are taken off."""
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
    """Keeps what one router returns; its forward hook."""

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
        """All batches' arrays as one, see `RoutingTrace`; of one layer."""
        return {name: np.concatenate([batch[name] for batch in self._batches]) for name in self._batches[0]}


def selected_experts(indices: Tensor) -> Tensor:
    """Experts [tokens, k], `NO_EXPERT` where the router was left without one to select.

    There it names its best once more, and it names no other twice; so whatever its weight, a repetition is no choice.

    Args:
        indices: int64 [tokens, k], as the router returns them.
    """
    is_repeated = indices == indices[:, :1]
    is_repeated[:, 0] = False
    return indices.masked_fill(is_repeated, NO_EXPERT)


def _probabilities(logits: Tensor, scoring_func: str) -> Tensor:
    """Normalised scores of the visible experts, [tokens, experts]; 0 for invisible ones, whose logits are -inf."""
    if scoring_func == "softmax":
        return logits.softmax(dim=-1)
    scores = logits.sigmoid() if scoring_func == "sigmoid" else F.softplus(logits).sqrt()
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
