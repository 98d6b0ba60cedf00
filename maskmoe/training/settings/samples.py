"""The batches, iterations and samples of a run."""

from argparse import Namespace
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from maskmoe.errors import UserError, reason_of


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
        iterations = read = 0
        for (_, size), (end, _) in pairwise((*self.phases, (samples, 0))):
            most = (samples - read) // size
            in_phase = min(most, max(0, -(-(end - read) // size)))  # the iteration that reaches the end is whole
            iterations, read = iterations + in_phase, read + in_phase * size
            if read < end:
                break
        return iterations


def training_iterations(args: Namespace) -> int:
    """Return the number of iterations of a run, also with `--train-samples`; 0 if the arguments have neither."""
    return args.train_iters or BatchSizes.from_args(args).iterations(args.train_samples or 0)


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
    if not args.skip_train:
        before_first = (max(1, args.start_eval_at_iter or 0) - 1) // args.eval_interval
        passed = max(before_first, args.iteration // args.eval_interval)
        evaluations = max(0, args.train_iters // args.eval_interval - passed + 1)
        remaining = evaluations * args.eval_iters * args.eval_global_batch_size
        # Megatron refuses data of which all samples are consumed, even with `--eval-iters 0`.
        validation = max(validation, args.consumed_valid_samples + max(1, remaining))
    return [training, max(1, validation), max(1, test)]
