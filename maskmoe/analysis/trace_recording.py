"""Runs a model over a probe and records the choices of its routers, through forward hooks."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from maskmoe.analysis.probe_text import Probe
from maskmoe.analysis.routing_trace import NO_EXPERT, RoutingTrace
from maskmoe.errors import UserError
from maskmoe.files.untrusted import reading
from maskmoe.huggingface import MaskMoEForCausalLM, MaskMoEModel
from maskmoe.huggingface.modeling_maskmoe import MaskMoETopKRouter, score


def load_decoder(folder: Path) -> MaskMoEModel:
    """Load the decoder of an exported model for inference, in the dtype of the stored weights.

    Raises:
        UserError: the model cannot be read.
    """
    logging.disable_progress_bar()
    with reading(f"{folder} is not a complete MaskMoE model: it", "export the model again"):
        model = MaskMoEForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    for part, parameter in model.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{folder} has weights that are NaN or infinite, such as {part}: they route to no expert")
    # Under the CPU adapter the current device is the CPU.
    device = torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return model.model.to(device).eval()


@torch.inference_mode()
def record_routing(model: MaskMoEModel, probe: Probe) -> RoutingTrace:
    """Record how a model routes all tokens of a probe.

    Args:
        model: the decoder of a model with experts.
        probe: the probe text, which the model reads window by window.
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
        for batch in probe.batches():
            model(input_ids=torch.from_numpy(batch).to(model.device), use_cache=False)

    arrays = {
        field: np.stack([np.concatenate([batch[field] for batch in batches]) for batches in recorded.values()])
        for field in ("experts", "weights", "entropy", "num_visible")
    }
    return RoutingTrace(probe.token_ids, **arrays, num_experts=model.config.num_experts)


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
