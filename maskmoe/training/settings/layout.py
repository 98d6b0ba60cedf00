"""The arithmetic of a run: how ranks, batch and layers are divided."""

import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from maskmoe.errors import UserError
from maskmoe.training.settings.batch_sizes import BatchSizes
from maskmoe.training.settings.layer_division import divisors, num_segments

_GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"
_SCHEDULE = "--step-batch-size-schedule"


@dataclass(frozen=True)
class Layout:
    """The sizes of a run, taken from its command line; the sizes need not divide each other.

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
            global_batch=_largest_batch(args),
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

    def errors(self, batch_flag: str = "--global-batch-size") -> Iterator[str]:
        """Yield an error for each size that does not divide, with the nearest sizes that would.

        Args:
            batch_flag: the flag of the global batch size.
        """
        if self.ranks % self.ranks_step:
            yield (
                f"{self.ranks} ranks cannot be divided over TP {self.tensor} × PP {self.pipeline} × CP {self.context} "
                f"= {self.tensor * self.pipeline * self.context} for dense parts and ETP {self.expert_tensor} × EP "
                f"{self.expert} × PP {self.pipeline} = {self.expert_tensor * self.expert * self.pipeline} for experts; "
                f"{_nearest(self.ranks, self.ranks_step)} ranks would fit"
            )
        elif self.global_batch % (batch_step := self.micro_batch * self.data):
            yield (
                f"{batch_flag} {self.global_batch} is not divisible by --micro-batch-size {self.micro_batch} × "
                f"data parallel size {self.data} = {batch_step}; {_nearest(self.global_batch, batch_step)} would fit"
            )
        else:
            yield from self.errors_of_interleaving(batch_flag)

    def errors_of_interleaving(self, batch_flag: str) -> Iterator[str]:
        """Yield an error if an interleaved pipeline cannot divide the micro-batches of a step into groups.

        Args:
            batch_flag: the flag of the global batch size.
        """
        if self.virtual_pipeline == 1:
            return
        group, micro_batches, step = self.micro_batch_group, self.micro_batches, self.micro_batch * self.data
        if group < self.pipeline:
            yield (
                f"{_GROUP} {group} is less than --pipeline-model-parallel-size {self.pipeline}: pass {self.pipeline} "
                "or more, or leave the flag out"
            )
        elif self._enough_for_groups != micro_batches:
            below, above = micro_batches // group * group, self._enough_for_groups
            fitting = f"{below * step} or {above * step}" if below else above * step
            yield (
                f"{batch_flag} {self.global_batch} gives a rank {micro_batches} micro-batches a step, which an "
                f"interleaved pipeline cannot divide into groups of {group} ({_GROUP}, by default "
                f"--pipeline-model-parallel-size) with at least {self.pipeline} in the last group; {fitting} would fit"
            )

    @property
    def _enough_for_groups(self) -> int:
        """Return `micro_batches`, or the next larger number of micro-batches that an interleaved pipeline can group.

        All groups but the last have `micro_batch_group` micro-batches. The last group needs one for each stage or more.
        """
        groups, rest = divmod(self.micro_batches, self.micro_batch_group)
        if not groups:
            return self.micro_batch_group
        return self.micro_batches + (self.pipeline - rest if 0 < rest < self.pipeline else 0)

    def repaired(self) -> "Layout":
        """Return the layout with the next larger ranks, global batch and group of micro-batches that fit."""
        group = max(self.micro_batch_group, self.pipeline)
        layout = replace(self, ranks=_round_up(self.ranks, self.ranks_step), micro_batch_group=group)
        step = layout.micro_batch * layout.data
        layout = replace(layout, global_batch=_round_up(self.global_batch, step))
        return replace(layout, global_batch=layout._enough_for_groups * step) if self.virtual_pipeline > 1 else layout


def size_errors(args: Namespace, iteration: int = 0) -> Iterator[str]:
    """Yield an error for each size of a run that does not divide, with the nearest sizes that would.

    Megatron itself refuses wrong ranks and batches before training. The other errors make Megatron's first step fail.

    Args:
        args: parsed arguments; Megatron need not have validated them.
        iteration: the iteration from which the run resumes. Batch sizes of earlier iterations may be any.
    """
    layout = Layout.from_args(args)
    if args.decrease_batch_size_if_needed and layout.ranks % layout.ranks_step == 0:
        # Megatron uses the next smaller batch that the ranks divide.
        step = layout.micro_batch * layout.data
        layout = replace(layout, global_batch=layout.global_batch // step * step or layout.global_batch)
    if args.step_batch_size_schedule is None:
        yield from layout.errors()
    else:
        yield from _errors_of_schedule(args, layout, iteration)
    if not args.skip_train and args.step_batch_size_schedule is None:
        yield from _errors_of_length(args, layout)
    if layout.ranks % layout.ranks_step == 0:
        yield from _errors_of_evaluation(args, layout)
        yield from _errors_of_optimizer_instances(args, layout)
    yield from _errors_of_heads(args)
    yield from _errors_of_sequence(args, layout)


def _largest_batch(args: Namespace) -> int:
    """Return the largest global batch size of a run; 0 if none is given, or if the schedule cannot be read."""
    if args.step_batch_size_schedule is not None:
        with suppress(UserError):
            return max(BatchSizes.from_args(args).sizes)
    return args.global_batch_size or 0


def _errors_of_schedule(args: Namespace, layout: Layout, iteration: int) -> Iterator[str]:
    """Yield an error for each bad size in `--step-batch-size-schedule`, and for a run that ends within a step."""
    try:
        batches = BatchSizes.from_args(args)
    except UserError as error:
        yield str(error)
        return
    for size in sorted(set(batches.sizes_from(iteration))):
        yield from replace(layout, global_batch=size).errors(_SCHEDULE)
    for before, after in pairwise(batches.sizes):
        if after < before:
            yield (
                f"{_SCHEDULE} has batch size {after} after {before}: Megatron-Core's batches cannot become smaller, so "
                "pass sizes in ascending order"
            )
    if args.train_samples is not None:
        iterations = batches.iterations(args.train_samples)
        below, above = batches.samples(iterations), batches.samples(iterations + 1)
        if below != args.train_samples:
            fitting = f"{below} or {above}" if below else above
            yield f"--train-samples {args.train_samples} ends within a step of {_SCHEDULE}; {fitting} would fit"


def _errors_of_length(args: Namespace, layout: Layout) -> Iterator[str]:
    """Yield an error if `--train-samples` is less than the samples of one step."""
    if args.train_samples is not None and args.train_samples < layout.global_batch:
        yield (
            f"--train-samples {args.train_samples} is less than the {layout.global_batch} samples of one step "
            f"(--global-batch-size): pass {layout.global_batch} or more"
        )


def _errors_of_evaluation(args: Namespace, layout: Layout) -> Iterator[str]:
    """Yield an error if evaluation has a batch size of its own, which an interleaved pipeline cannot divide.

    Megatron itself reports a batch that its ranks do not divide.
    """
    if args.skip_train or not (args.eval_iters or args.full_validation):
        return
    batch = args.eval_global_batch_size or args.global_batch_size or layout.micro_batch * layout.data
    evaluation = replace(layout, micro_batch=args.eval_micro_batch_size or layout.micro_batch, global_batch=batch)
    if evaluation != layout and batch % (evaluation.micro_batch * evaluation.data) == 0:
        yield from evaluation.errors_of_interleaving("--eval-global-batch-size")


def _errors_of_optimizer_instances(args: Namespace, layout: Layout) -> Iterator[str]:
    """Yield an error if `--num-distributed-optimizer-instances` does not divide the ranks that share an optimizer."""
    instances, experts = args.num_distributed_optimizer_instances, layout.expert_data
    dense = layout.data * layout.context
    if dense % instances or experts % instances:
        yield (
            f"--num-distributed-optimizer-instances {instances} must divide data parallel size × context parallel size "
            f"= {dense} and the experts' data parallel size {experts}: "
            f"{divisors(math.gcd(dense, experts))} would fit"
        )


def _errors_of_heads(args: Namespace) -> Iterator[str]:
    """Yield an error if attention heads cannot be divided among query groups."""
    heads, groups, pattern = args.num_attention_heads, args.num_query_groups, args.hybrid_layer_pattern
    has_groups = args.group_query_attention and not args.multi_latent_attention
    if has_groups and heads and groups and heads % groups and (pattern is None or Symbols.ATTENTION in pattern):
        yield (
            f"--num-attention-heads {heads} is not divisible by --num-query-groups {groups}: {divisors(heads)} would "
            "fit"
        )


def _errors_of_sequence(args: Namespace, layout: Layout) -> Iterator[str]:
    """Yield an error if tensor-parallel ranks cannot divide a sequence.

    Megatron itself reports a sequence that context-parallel ranks do not divide.
    """
    tensor, context, length = layout.tensor, layout.context, layout.seq_length
    if not args.sequence_parallel or (context > 1 and length % (2 * context)):
        return
    if length // context % tensor:
        step = context * (math.lcm(2, tensor) if context > 1 else tensor)
        sizes = f"--tensor-model-parallel-size {tensor}"
        sizes += f" × --context-parallel-size {context} = {tensor * context}" if context > 1 else ""
        yield (
            f"--seq-length {length} is not divisible by {sizes}, as --sequence-parallel needs; "
            f"{_nearest(length, step)} would fit"
        )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _nearest(value: int, step: int) -> str:
    """Name the multiples of `step` next to `value`, such as `16 or 24`."""
    below, above = value // step * step, _round_up(value, step)
    return f"{below} or {above}" if below else str(above)
