"""Computes the memory of one rank of each pipeline stage, by purpose."""

from argparse import Namespace
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from maskmoe.training.preflight.activations import ActivationModel
from maskmoe.training.preflight.parameters import ModelParameters
from maskmoe.training.settings.layout import Layout

# The purposes of memory, and how the report for people calls them. `ActivationModel` estimates the second group.
EXACT = {
    "weights": "weights and buffers",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "routing_mask": "routing mask",
}
ESTIMATED = {
    "activations": "activations in flight",
    "recomputation": "recomputed at one time",
    "logits": "logits and cross entropy",
    "dispatch": "rows being dispatched",
}
_FP32_BYTES = 4
# The moments that each optimizer keeps for a parameter. Other optimizers keep at most as much as Adam.
_STATES = {"adam": ("exp_avg_dtype", "exp_avg_sq_dtype"), "sgd": ("exp_avg_dtype",), "lion": ("exp_avg_dtype",)}


@dataclass(frozen=True)
class StageMemory:
    """The bytes needed by one rank of a pipeline stage.

    Weights (with buffers), gradients and the routing mask are exact. The optimizer is exact as a mean: the distributed
    optimizer pads its buckets, so its ranks differ by the padding.

    Attributes:
        weights, gradients, optimizer, routing_mask: bytes that are allocated once and kept.
        activations: bytes that the backward passes of all micro-batches in flight will read.
        recomputation: bytes of all activations of the layers that are recomputed at one time.
        logits: bytes of the logits of one micro-batch, and of their softmax if the loss keeps it.
        dispatch: bytes of the rows that a layer sends to experts and gets back.
        doubled_rows: additional bytes if the experts of the rank get twice their share of rows.
        micro_batches_in_flight: the largest number of micro-batches with kept activations.
    """

    weights: int
    gradients: int
    optimizer: int
    routing_mask: int
    activations: int
    recomputation: int
    logits: int
    dispatch: int
    doubled_rows: int
    micro_batches_in_flight: float

    @property
    def total(self) -> int:
        """Return the sum of all bytes, without those of doubled rows."""
        return sum(getattr(self, purpose) for purpose in EXACT | ESTIMATED)


@dataclass(frozen=True)
class MemoryReport:
    """The memory of a run.

    Attributes:
        stages: one rank of each pipeline stage.
        rows_per_token: mean number of rows that a token has on experts.
    """

    stages: tuple[StageMemory, ...]
    rows_per_token: float

    @property
    def largest_stage(self) -> int:
        """Return the number of the pipeline stage that needs most memory, from 0."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].total)


def compute_memory(args: Namespace, config: TransformerConfig, model: ModelParameters) -> MemoryReport:
    """Compute the memory of one rank of every pipeline stage.

    Args:
        args: arguments that Megatron has validated.
        config: the model's configuration.
        model: the parameters of the stages.
    """
    layout = Layout.from_args(args)
    activations = ActivationModel(args, config, layout, model.expert_use.mean)
    weight, gradient, optimizer = bytes_of_parameter(args)
    # The number of ranks among which the optimizer is divided, for dense parameters and for experts.
    share = expert_share = 1
    if args.use_distributed_optimizer:
        share = layout.data * layout.context // args.num_distributed_optimizer_instances
        expert_share = layout.expert_data // args.num_distributed_optimizer_instances
    stages = []
    for stage, chunks in enumerate(model.stages):
        experts = sum(chunk.expert_parameters for chunk in chunks)
        dense = sum(chunk.num_parameters for chunk in chunks) - experts
        memory = StageMemory(
            weights=(dense + experts) * weight + sum(chunk.buffer_bytes for chunk in chunks),
            gradients=(dense + experts) * gradient,
            optimizer=-(-dense * optimizer // share) - (-experts * optimizer // expert_share),
            routing_mask=model.mask_bytes * len(chunks),
            micro_batches_in_flight=layout.micro_batches_in_flight(stage),
            **activations.of_stage(stage, chunks),
        )
        stages.append(memory)
    return MemoryReport(tuple(stages), activations.experts_per_token)


def bytes_of_parameter(args: Namespace) -> tuple[int, int, int]:
    """Return the bytes of a parameter, of its gradient, and of its state in the optimizer.

    These are the bytes that Megatron's `DistributedDataParallel` and optimizers allocate for bf16, fp16 or fp32. The
    state consists of moments, and of a main copy unless the parameter is fp32.
    """
    weight = args.params_dtype.itemsize
    states = _STATES.get(args.optimizer, _STATES["adam"])
    if args.use_precision_aware_optimizer:
        main = args.main_params_dtype.itemsize
        if args.bf16 and args.main_params_dtype == torch.float32:
            # No flag turns `store_param_remainders` off: the main copy holds only the bits that bf16 lacks.
            main -= weight
        moments = sum(getattr(args, name).itemsize for name in states)
    else:
        main = _FP32_BYTES if weight < _FP32_BYTES else 0
        moments = _FP32_BYTES * len(states)
    return weight, _FP32_BYTES if args.accumulate_allreduce_grads_in_fp32 else weight, main + moments
