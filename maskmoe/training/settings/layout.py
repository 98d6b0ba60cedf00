"""The arithmetic of a run: how ranks and batch are divided."""

import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from maskmoe.errors import UserError
from maskmoe.training.settings.batch_sizes import BatchSizes


@dataclass(frozen=True)
class Layout:
    """The sizes of a run, taken from its command line.

    Attributes:
        ranks: number of processes; each process has one GPU.
        tensor, pipeline, context, expert, expert_tensor: parallel sizes of these names.
        virtual_pipeline: number of model chunks on each pipeline stage; 1 unless the pipeline is interleaved.
        micro_batch_group: number of micro-batches that an interleaved pipeline computes before it turns to the next
            chunk.
        micro_batch, global_batch: numbers of samples; `global_batch` is the largest batch size of a schedule.
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
            args: parsed arguments. The number of model chunks on a stage is known after Megatron has validated them.
        """
        tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        context = args.context_parallel_size
        micro_batch, sizes = args.micro_batch_size or 1, (args.global_batch_size,)
        if args.step_batch_size_schedule is not None:
            with suppress(UserError):
                sizes = BatchSizes.from_args(args).sizes
        return cls(
            ranks=args.world_size,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=args.expert_model_parallel_size,
            expert_tensor=args.expert_tensor_parallel_size or tensor,
            virtual_pipeline=getattr(args, "virtual_pipeline_model_parallel_size", None) or 1,
            micro_batch_group=args.microbatch_group_size_per_vp_stage or pipeline,
            micro_batch=micro_batch,
            global_batch=max(sizes) if all(sizes) else micro_batch * args.world_size // (tensor * pipeline * context),
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
    def micro_batches(self) -> int:
        """Return the number of micro-batches that a rank computes in one step."""
        return self.global_batch // (self.micro_batch * self.data)

    @property
    def tokens_per_step(self) -> int:
        """Return the number of tokens in a global batch."""
        return self.global_batch * self.seq_length

    def micro_batches_in_flight(self, stage: int) -> float:
        """Return the largest number of micro-batches whose backward pass a pipeline stage still has to compute.

        The schedule is one-forward-one-backward (`megatron.core.pipeline_parallel.schedules`). In an interleaved
        pipeline each chunk of a stage has its own micro-batches in flight, and the result is their mean over the
        chunks.
        """
        stages_after, chunks = self.pipeline - stage - 1, self.virtual_pipeline
        if chunks == 1:
            return min(self.micro_batches, stages_after + 1)
        warm_up = 2 * stages_after + (chunks - 1) * self.micro_batch_group + 1
        return min(self.micro_batches * chunks, warm_up) / chunks


def layout_errors(args: Namespace, iteration: int = 0) -> Iterator[str]:
    """Yield an error if the ranks cannot be divided, or else for each batch that cannot, with what would fit.

    Megatron reports these sizes late, or by flags that nobody passed.

    Args:
        args: parsed arguments; Megatron need not have validated them.
        iteration: the iteration from which the run resumes. Batch sizes of earlier iterations may be any.
    """
    layout = Layout.from_args(args)
    if layout.ranks % layout.ranks_step:
        yield (
            f"{layout.ranks} ranks cannot be divided over TP {layout.tensor} × PP {layout.pipeline} × CP "
            f"{layout.context} for dense parts and ETP {layout.expert_tensor} × EP {layout.expert} × PP "
            f"{layout.pipeline} for experts; {_nearest(layout.ranks, layout.ranks_step)} ranks would fit"
        )
        return
    flag, sizes, step = "--global-batch-size", [layout.global_batch], layout.micro_batch * layout.data
    if args.step_batch_size_schedule is not None:
        try:
            flag, sizes = "--step-batch-size-schedule", sorted(set(BatchSizes.from_args(args).sizes_from(iteration)))
        except UserError as error:
            yield str(error)
            return
    for size in sizes:
        if size % step and not args.decrease_batch_size_if_needed:
            yield (
                f"{flag} {size} is not divisible by --micro-batch-size {layout.micro_batch} × data parallel size "
                f"{layout.data} = {step}; {_nearest(size, step)} would fit"
            )


def _nearest(value: int, step: int) -> str:
    """Name the multiples of `step` next to `value`, such as `16 or 24`."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)
