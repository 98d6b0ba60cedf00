"""The arithmetic of a run: how ranks, batch and layers are divided."""

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace

from maskmoe.training.layer_division import num_segments


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
        tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        # Several flags give the number of model chunks on a stage; validation derives it from the flags.
        layers_of_chunk = args.num_layers_per_virtual_pipeline_stage
        virtual_pipeline = (
            getattr(args, "virtual_pipeline_model_parallel_size", None)
            or args.num_virtual_stages_per_pipeline_rank
            or (layers_of_chunk and args.num_layers and args.num_layers // pipeline // layers_of_chunk)
            or num_segments(args) // pipeline
        )
        layout = cls(
            ranks=args.world_size,
            tensor=tensor,
            pipeline=pipeline,
            context=args.context_parallel_size,
            expert=args.expert_model_parallel_size,
            expert_tensor=args.expert_tensor_parallel_size or tensor,
            virtual_pipeline=virtual_pipeline or 1,
            micro_batch_group=args.microbatch_group_size_per_vp_stage or pipeline,
            micro_batch=args.micro_batch_size or 1,
            global_batch=args.global_batch_size or 0,
            seq_length=args.seq_length or 0,
        )
        return layout if layout.global_batch else replace(layout, global_batch=layout.micro_batch * max(1, layout.data))

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

    def errors(self) -> Iterator[str]:
        """Yield an error for each size that does not divide, with the nearest sizes that would."""
        if self.ranks % self.ranks_step:
            yield (
                f"{self.ranks} ranks cannot be divided over TP {self.tensor} × PP {self.pipeline} × CP {self.context} "
                f"= {self.tensor * self.pipeline * self.context} for dense parts and ETP {self.expert_tensor} × EP "
                f"{self.expert} × PP {self.pipeline} = {self.expert_tensor * self.expert * self.pipeline} for experts; "
                f"{_nearest(self.ranks, self.ranks_step)} ranks would fit"
            )
        elif self.global_batch % (batch_step := self.micro_batch * self.data):
            yield (
                f"--global-batch-size {self.global_batch} is not divisible by --micro-batch-size {self.micro_batch} × "
                f"data parallel size {self.data} = {batch_step}; {_nearest(self.global_batch, batch_step)} would fit"
            )

    def repaired(self) -> "Layout":
        """Return the layout with the next larger numbers of ranks and samples that divide."""
        layout = replace(self, ranks=_round_up(self.ranks, self.ranks_step))
        return replace(layout, global_batch=_round_up(self.global_batch, layout.micro_batch * layout.data))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _nearest(value: int, step: int) -> str:
    """Name the multiples of `step` next to `value`, such as `16 or 24`."""
    below, above = value // step * step, _round_up(value, step)
    return f"{below} or {above}" if below else str(above)
