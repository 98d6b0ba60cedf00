"""Bytes that a rank of each pipeline stage needs, by what needs them."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from maskmoe.check.activations import ActivationModel
from maskmoe.check.layout import Layout
from maskmoe.check.parameters import Chunk, ModelParameters

_FP32_BYTES = 4
# What each optimizer keeps for a parameter besides the parameter itself; others keep at most what Adam keeps.
_STATES = {"adam": ("exp_avg_dtype", "exp_avg_sq_dtype"), "sgd": ("exp_avg_dtype",), "lion": ("exp_avg_dtype",)}


@dataclass(frozen=True)
class BytesPerParameter:
    """What training keeps for one parameter, in bytes.

    Attributes:
        weight: the parameter itself.
        gradient: its place in the gradient buffer.
        optimizer: its main copy, unless the parameter is fp32 itself, and the optimizer's moments.
    """

    weight: int
    gradient: int
    optimizer: int

    @classmethod
    def from_args(cls, args: Namespace) -> "BytesPerParameter":
        """As Megatron's `DistributedDataParallel` and its optimizers allocate them (bf16, fp16 or fp32)."""
        weight = args.params_dtype.itemsize
        states = _STATES.get(args.optimizer, _STATES["adam"])
        if args.use_precision_aware_optimizer:
            main = args.main_params_dtype.itemsize
            if args.bf16 and args.main_params_dtype == torch.float32:
                # Only the bits that the bf16 weight lacks: `store_param_remainders`, which no flag sets.
                main -= weight
            moments = sum(getattr(args, name).itemsize for name in states)
        else:
            main = _FP32_BYTES if weight < _FP32_BYTES else 0
            moments = _FP32_BYTES * len(states)
        return cls(
            weight=weight,
            gradient=_FP32_BYTES if args.accumulate_allreduce_grads_in_fp32 else weight,
            optimizer=main + moments,
        )


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of one pipeline stage.

    Weights with buffers, gradients and the routing mask are exact; so is the optimizer, but that the ranks among which
    the distributed optimizer divides it differ by the padding of its buckets. The rest is estimated, see
    `ActivationModel`.

    Attributes:
        weights, gradients, optimizer, routing_mask: allocated once, and kept.
        activations: what the backward pass will read, of all micro-batches in flight.
        recomputation: of the layers that are recomputed at one time, all activations.
        logits: logits and their softmax, of one micro-batch.
        dispatch: rows on their way to and from experts, in one layer.
    """

    weights: int
    gradients: int
    optimizer: int
    routing_mask: int
    activations: int
    recomputation: int
    logits: int
    dispatch: int

    EXACT = ("weights", "gradients", "optimizer", "routing_mask")

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def stage_memory(
    args: Namespace, layout: Layout, model: ModelParameters, activations: ActivationModel, mask_bytes: int
) -> tuple[StageMemory, ...]:
    """The memory of every pipeline stage.

    Args:
        args: validated by Megatron.
        mask_bytes: of the routing mask, in each model chunk.
    """
    each = BytesPerParameter.from_args(args)
    return tuple(
        _memory_of_stage(args, layout, each, stage, chunks, activations, mask_bytes)
        for stage, chunks in enumerate(model.stages)
    )


def not_modelled(args: Namespace) -> Iterator[str]:
    """What the run does with memory that is not in `StageMemory`, one line each."""
    settings = {
        "--fp8-format and --fp4-format": args.fp8 or args.fp4,
        f"--optimizer {args.optimizer} (counted as adam)": args.optimizer not in _STATES,
        "--optimizer-cpu-offload": args.optimizer_cpu_offload,
        "--fine-grained-activation-offloading": args.fine_grained_activation_offloading,
        "--cpu-offloading-num-layers": args.cpu_offloading_num_layers,
    }
    for setting, is_used in settings.items():
        if is_used:
            yield f"the memory does not take {setting} into account"


def _memory_of_stage(
    args: Namespace,
    layout: Layout,
    each: BytesPerParameter,
    stage: int,
    chunks: Sequence[Chunk],
    activations: ActivationModel,
    mask_bytes: int,
) -> StageMemory:
    dense = sum(chunk.dense_parameters for chunk in chunks)
    experts = sum(chunk.expert_parameters for chunk in chunks)
    share, expert_share = _optimizer_shares(args, layout)
    return StageMemory(
        weights=(dense + experts) * each.weight + sum(chunk.buffer_bytes for chunk in chunks),
        gradients=(dense + experts) * each.gradient,
        optimizer=-(-dense * each.optimizer // share) - (-experts * each.optimizer // expert_share),
        routing_mask=mask_bytes * len(chunks),
        activations=activations.in_flight(layout, stage, chunks),
        recomputation=max(activations.recomputed_at_once(chunk) for chunk in chunks),
        logits=max(activations.logits(chunk) for chunk in chunks),
        dispatch=activations.dispatch() if any(chunk.moe_layers or chunk.mtp_layers for chunk in chunks) else 0,
    )


def _optimizer_shares(args: Namespace, layout: Layout) -> tuple[int, int]:
    """Among how many ranks the optimizer of dense parameters and that of experts are divided."""
    if not args.use_distributed_optimizer:
        return 1, 1
    instances = args.num_distributed_optimizer_instances
    return layout.data * layout.context // instances, layout.expert_data // instances
