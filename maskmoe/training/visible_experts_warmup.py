"""Tells a model's routing mask the training iteration, on which visible experts depend during their warm-up."""

from argparse import Namespace
from typing import Any, cast

import torch
from megatron.core.utils import unwrap_model


def set_iteration_of_visible_experts(args: Namespace, model: torch.nn.Module) -> None:
    """Set the iteration of a model's routing mask: the iteration in training, or else the last trained iteration.

    Evaluation, during training and of a checkpoint, therefore routes by the visible sets of the last trained iteration.

    Args:
        args: Megatron's arguments: the number of trained iterations of the loaded checkpoint, and in training the
            iteration, counted from 0.
        model: one pipeline stage, in its wrappers; may be a model without experts.
    """
    stage: Any = unwrap_model(cast(Any, model))
    if (visible_experts := getattr(stage, "routing_mask", None)) is not None:
        visible_experts.iteration = max(getattr(args, "curr_iteration", 0), args.iteration - 1)
