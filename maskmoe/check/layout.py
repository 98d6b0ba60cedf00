"""The arithmetic of a run: how ranks, batch and layers are divided."""

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The sizes of a run, taken from its command line; the sizes need not divide each other.

    Attributes:
        ranks: number of processes; each process has one GPU.
        tensor, pipeline, context, expert, expert_tensor: parallel sizes of these names.
        virtual_pipeline: number of model chunks on each pipeline stage; 1 unless the pipeline is interleaved.
        micro_batch_group: number of micro-batches that an interleaved pipeline computes before it turns to the next
            chunk.
        micro_batch, global_batch: numbers of samples.
        seq_length: number of tokens in a sample.
    """

    ranks: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int
    virtual_pipeline: int
    micro_batch_group: int
    micro_batch: int
    global_batch: int
    seq_length: int

    @classmethod
    def from_args(cls, args: Namespace) -> "Layout":
        """Return the layout that arguments describe.

        Missing batch sizes get the values that Megatron gives them.

        Args:
            args: parsed arguments; Megatron need not have validated them.
        """
        tensor, pipeline, context = (
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.context_parallel_size,
        )
        micro_batch = args.micro_batch_size or 1
        data = max(1, args.world_size // (tensor * pipeline * context))
        return cls(
            ranks=args.world_size,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=args.expert_model_parallel_size,
            expert_tensor=args.expert_tensor_parallel_size or tensor,
            virtual_pipeline=_virtual_pipeline(args),
            micro_batch_group=args.microbatch_group_size_per_vp_stage or pipeline,
            micro_batch=micro_batch,
            global_batch=args.global_batch_size or micro_batch * data,
            seq_length=args.seq_length or 0,
        )

    @property
    def data(self) -> int:
        """Return the data parallel size of the dense parts."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Return the data parallel size of the experts."""
        return self.ranks // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def ranks_step(self) -> int:
        """Return the smallest number of ranks over which both dense parts and experts can be divided."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert_tensor * self.expert)

    @property
    def num_micro_batches(self) -> int:
        """Return the number of micro-batches that a rank computes in one step."""
        return self.global_batch // (self.micro_batch * self.data)

    @property
    def tokens_per_step(self) -> int:
        """Return the number of tokens in a global batch."""
        return self.global_batch * self.seq_length

    def errors(self) -> Iterator[str]:
        """Yield an error for each size that does not divide, with the nearest sizes that would."""
        if self.ranks % self.ranks_step:
            yield (
                f"{self.ranks} ranks cannot be divided over TP {self.tensor} × PP {self.pipeline} × CP {self.context} "
                f"= {self.tensor * self.pipeline * self.context} for dense parts and ETP {self.expert_tensor} × EP "
                f"{self.expert} × PP {self.pipeline} = {self.expert_tensor * self.expert * self.pipeline} for experts; "
                f"{_nearest(self.ranks, self.ranks_step)} ranks would fit"
            )
            return
        batch_step = self.micro_batch * self.data
        if self.global_batch % batch_step:
            yield (
                f"--global-batch-size {self.global_batch} is not divisible by --micro-batch-size {self.micro_batch} × "
                f"data parallel size {self.data} = {batch_step}; {_nearest(self.global_batch, batch_step)} would fit"
            )

    def repaired(self) -> "Layout":
        """Return the layout with the next larger numbers of ranks and samples that divide."""
        ranks = _round_up(self.ranks, self.ranks_step)
        batch_step = self.micro_batch * (ranks // (self.tensor * self.pipeline * self.context))
        fields = vars(self) | {"ranks": ranks, "global_batch": _round_up(self.global_batch, batch_step)}
        return Layout(**fields)


def layer_errors(args: Namespace) -> Iterator[str]:
    """Yield an error if the layers cannot be divided evenly among the pipeline stages, with the sizes that would fit.

    A run that asks for stages of different length has no such errors.
    """
    stages, layers = args.pipeline_model_parallel_size, args.num_layers
    is_uneven = any(
        (
            args.decoder_first_pipeline_num_layers,
            args.decoder_last_pipeline_num_layers,
            args.pipeline_model_parallel_layout,
            args.account_for_embedding_in_pipeline_split,
            args.account_for_loss_in_pipeline_split,
        )
    )
    if not layers or is_uneven:
        return
    if layers % stages:
        divisors = ", ".join(str(size) for size in range(1, layers + 1) if layers % size == 0)
        yield (
            f"--num-layers {layers} is not divisible by --pipeline-model-parallel-size {stages}: {divisors} would fit, "
            "or stages of different length by --decoder-first-pipeline-num-layers, "
            "--decoder-last-pipeline-num-layers or --pipeline-model-parallel-layout"
        )
        return
    chunk = args.num_layers_per_virtual_pipeline_stage
    if chunk and (layers // stages) % chunk:
        divisors = ", ".join(str(size) for size in range(1, layers // stages + 1) if layers // stages % size == 0)
        yield (
            f"the {layers // stages} layers of a pipeline stage are not divisible by "
            f"--num-layers-per-virtual-pipeline-stage {chunk}: {divisors} would fit"
        )


def _virtual_pipeline(args: Namespace) -> int:
    """Return the number of model chunks on each pipeline stage, from whichever flag gives it."""
    chunk = args.num_layers_per_virtual_pipeline_stage
    if getattr(args, "virtual_pipeline_model_parallel_size", None):
        return args.virtual_pipeline_model_parallel_size
    if args.num_virtual_stages_per_pipeline_rank:
        return args.num_virtual_stages_per_pipeline_rank
    if chunk and args.num_layers:
        return max(1, args.num_layers // args.pipeline_model_parallel_size // chunk)
    return 1


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _nearest(value: int, step: int) -> str:
    """Name the multiples of `step` next to `value`, such as `16 or 24`."""
    below, above = value // step * step, _round_up(value, step)
    return f"{below} or {above}" if below else str(above)
