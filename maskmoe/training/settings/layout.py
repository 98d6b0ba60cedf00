"""How a run is divided: ranks, parallel sizes and pipeline stages, batches, iterations and samples."""

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from maskmoe.errors import UserError, reason_of


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

    def micro_batches_in_flight(self, stage: int) -> float:
        """Return the largest number of micro-batches whose backward pass a pipeline stage still has to compute.

        The schedule is one-forward-one-backward (`megatron.core.pipeline_parallel.schedules`). In an interleaved
        pipeline the result is the mean over the chunks of the stage.
        """
        stages_after, chunks = self.pipeline - stage - 1, self.virtual_pipeline
        if chunks == 1:
            return min(self.micro_batches, stages_after + 1)
        warm_up = 2 * stages_after + (chunks - 1) * self.micro_batch_group + 1
        return min(self.micro_batches * chunks, warm_up) / chunks


class BatchSizes(NamedTuple):
    """The numbers of samples in the iterations of a run.

    `phases` has, for each phase of training, the smallest number of samples that are read before the phase begins, and
    the number of samples in an iteration. A run without `--step-batch-size-schedule` has one phase.
    """

    phases: tuple[tuple[int, int], ...]

    @classmethod
    def from_args(cls, args: Namespace) -> "BatchSizes":
        """Return the batch sizes of arguments that are validated or have a schedule; raise `UserError` if it is bad."""
        schedule = args.step_batch_size_schedule
        if schedule is None:
            return cls(((0, args.global_batch_size),))
        try:
            # Megatron reads the schedule in its constructor. A micro-batch of 1 sample divides every size.
            calculator = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, schedule, args.seq_length)
        except (AssertionError, ValueError, OverflowError) as error:
            raise UserError(f"--step-batch-size-schedule {schedule!r} cannot be read: {reason_of(error)}") from error
        return cls(tuple(calculator.schedule))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of samples in an iteration of each phase."""
        return tuple(size for _, size in self.phases)

    def iterations(self, samples: int) -> int:
        """Return the number of whole iterations, from the beginning of a run, for which these samples are enough."""
        return [first + (samples - read) // size for first, read, size in self._begins() if read <= samples][-1]

    def samples(self, iterations: int) -> int:
        """Return the number of samples that this number of iterations reads, from the beginning of a run."""
        return [read + (iterations - first) * size for first, read, size in self._begins() if first <= iterations][-1]

    def _begins(self) -> Iterator[tuple[int, int, int]]:
        """Yield for each phase the iterations and the samples before the phase, and its batch size."""
        first = read = 0
        for (_, size), (end, _) in pairwise(self.phases):
            yield first, read, size
            iterations = max(0, -(-(end - read) // size))  # the iteration that reaches the end is whole
            first, read = first + iterations, read + iterations * size
        yield first, read, self.phases[-1][1]


def training_iterations(args: Namespace) -> int:
    """Return the number of iterations of a run, also with `--train-samples`; 0 if the arguments have neither."""
    return args.train_iters or BatchSizes.from_args(args).iterations(args.train_samples or 0)


def trained_samples(args: Namespace) -> int:
    """Return the number of samples that a run reads in all its iterations; the arguments are validated."""
    return BatchSizes.from_args(args).samples(training_iterations(args))


def requested_training_samples(args: Namespace, iteration: int = 0, consumed: int = 0) -> int:
    """Return the number of samples that a run, which resumes from `iteration`, asks its training data for.

    With `--train-iters`, Megatron asks for samples as if all iterations had the batch size of this run. If earlier
    iterations had larger batches, a run asks for the samples of its remaining iterations in addition to the `consumed`
    samples.
    """
    batch, iterations = args.global_batch_size or 0, args.train_iters or 0
    return args.train_samples or max(iterations * batch, consumed + (iterations - iteration) * batch)


def samples_to_request(args: Namespace, num_samples: Sequence[int]) -> list[int]:
    """Return the numbers of samples of each dataset that last to the end of a run, at least the given numbers.

    Megatron asks for the samples that the run would need if the run had had its settings from the beginning. A run that
    resumes with a smaller batch or with fewer evaluations would then run out of samples. Without such a change, the
    numbers, and so the order of the samples, do not change.
    """
    training, validation, test = num_samples
    # Megatron also sets `train_iters` of a run with `--train-samples`. With `--phase-transition-iterations`, Megatron
    # asks for the samples of one phase only.
    if not (args.train_samples or args.phase_transition_iterations):
        training = max(training, requested_training_samples(args, args.iteration, args.consumed_train_samples))
    if not (args.skip_train or args.phase_transition_iterations):
        # Megatron refuses data of which all samples are consumed, also to save a complete run into another folder.
        training = max(training, args.consumed_train_samples + 1)
    if not args.skip_train:
        before_first = (max(1, args.start_eval_at_iter or 0) - 1) // args.eval_interval
        per_evaluation = args.eval_iters * args.eval_global_batch_size
        # Megatron leaves out the evaluation in the iteration `start_eval_at_iter` itself.
        validation = max(validation, (args.train_iters // args.eval_interval - before_first + 1) * per_evaluation)
        evaluations = max(0, args.iteration // args.eval_interval - before_first)
        surplus = args.consumed_valid_samples - evaluations * per_evaluation
        if surplus > 0:
            # Megatron refuses data of which all samples are consumed, even with `--eval-iters 0`.
            validation = max(validation + surplus, args.consumed_valid_samples + 1)
    # Without evaluations, too, Megatron refuses data without samples.
    return [training, max(1, validation), max(1, test)]
