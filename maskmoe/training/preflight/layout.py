"""How a run is divided: ranks, parallel sizes and pipeline stages."""

import math
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass

from maskmoe.errors import UserError
from maskmoe.training.settings.samples import BatchSizes


@dataclass(frozen=True)
class Layout:
    """The sizes of a run, taken from its command line.

    Attributes:
        ranks: Number of processes; each process has one GPU.
        virtual_pipeline: Number of model chunks on each pipeline stage; 1 unless the pipeline is interleaved.
        micro_batch_group: Number of micro-batches that an interleaved pipeline computes before it changes the chunk.
        micro_batch, global_batch: Numbers of samples; `global_batch` is the largest batch size of a schedule.
        seq_length: Number of tokens in a sample.
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
        """Return the layout of parsed arguments; missing batch sizes get Megatron's values.

        The number of model chunks on a stage is known after Megatron has validated the arguments.
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
