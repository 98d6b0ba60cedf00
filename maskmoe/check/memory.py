"""Computes the memory of one rank of each pipeline stage, by purpose."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from maskmoe.check.activations import ActivationModel, micro_batches_in_flight
from maskmoe.check.layout import Layout
from maskmoe.check.parameters import Chunk, ModelParameters

_FP32_BYTES = 4
# The moments that each optimizer keeps for a parameter. Other optimizers keep at most as much as Adam.
_STATES = {"adam": ("exp_avg_dtype", "exp_avg_sq_dtype"), "sgd": ("exp_avg_dtype",), "lion": ("exp_avg_dtype",)}


@dataclass(frozen=True)
class BytesPerParameter:
    """The bytes that training keeps for one parameter.

    Attributes:
        weight: bytes of the parameter.
        gradient: bytes in the gradient buffer.
        optimizer: bytes of the optimizer's moments, and of the main copy that a parameter has unless it is fp32.
    """

    weight: int
    gradient: int
    optimizer: int

    @classmethod
    def from_args(cls, args: Namespace) -> "BytesPerParameter":
        """Return the bytes that Megatron's `DistributedDataParallel` and optimizers allocate for bf16, fp16 or fp32."""
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
        return cls(
            weight=weight,
            gradient=_FP32_BYTES if args.accumulate_allreduce_grads_in_fp32 else weight,
            optimizer=main + moments,
        )


@dataclass(frozen=True)
class StageMemory:
    """The bytes needed by one rank of a pipeline stage.

    Weights (with buffers), gradients and the routing mask are exact. The optimizer is exact as a mean: the distributed
    optimizer pads its buckets, so its ranks differ by the padding. `ActivationModel` estimates everything else.

    Attributes:
        weights, gradients, optimizer, routing_mask: bytes that are allocated once and kept.
        activations: bytes that the backward passes of all micro-batches in flight will read.
        recomputation: bytes of all activations of the layers that are recomputed at one time.
        logits: bytes of the logits and their softmax, of one micro-batch.
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

    EXACT = ("weights", "gradients", "optimizer", "routing_mask")
    ESTIMATED = ("activations", "recomputation", "logits", "dispatch")

    @property
    def total(self) -> int:
        """Return the sum of all bytes, without those of doubled rows."""
        return sum(getattr(self, purpose) for purpose in (*self.EXACT, *self.ESTIMATED))


def stage_memory(
    args: Namespace, layout: Layout, model: ModelParameters, activations: ActivationModel, mask_bytes: int
) -> tuple[StageMemory, ...]:
    """Return the memory of one rank of every pipeline stage.

    Args:
        args: arguments that Megatron has validated.
        layout: how the run is divided; the sizes must divide each other.
        model: the parameters of the stages.
        activations: estimates the bytes that are not exact.
        mask_bytes: bytes of the routing mask in each model chunk.
    """
    each = BytesPerParameter.from_args(args)
    return tuple(
        _memory_of_stage(args, layout, each, stage, chunks, activations, mask_bytes)
        for stage, chunks in enumerate(model.stages)
    )


def not_modelled(args: Namespace) -> Iterator[str]:
    """Yield a clause for each setting that changes the memory of a run but not `StageMemory`."""
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
    """Return the memory of one rank of a pipeline stage."""
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
        doubled_rows=activations.bytes_of_doubled_rows(layout, stage, chunks),
        micro_batches_in_flight=micro_batches_in_flight(layout, stage),
    )


def _optimizer_shares(args: Namespace, layout: Layout) -> tuple[int, int]:
    """Return among how many ranks the optimizer is divided, for dense parameters and for experts."""
    if not args.use_distributed_optimizer:
        return 1, 1
    instances = args.num_distributed_optimizer_instances
    return layout.data * layout.context // instances, layout.expert_data // instances
