"""Computes how many iterations a run has, and how many samples they read."""

import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from maskmoe.errors import UserError, reason_of


class BatchSizes(NamedTuple):
    """The numbers of samples in the iterations of a run.

    Attributes:
        phases: for each phase of training, the smallest number of samples that are read before the phase begins, and
            the number of samples in an iteration of the phase. A run without `--step-batch-size-schedule` has one
            phase.
    """

    phases: tuple[tuple[int, int], ...]

    @classmethod
    def from_args(cls, args: Namespace) -> "BatchSizes":
        """Return the batch sizes that arguments describe.

        Args:
            args: arguments that Megatron has validated, or that have `--step-batch-size-schedule`.

        Raises:
            UserError: the schedule cannot be read.
        """
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

    def sizes_from(self, iteration: int) -> tuple[int, ...]:
        """Return the number of samples in an iteration of each phase that is not over after some iterations."""
        begin = self.samples(iteration)
        ends = [*(begin_of_next for begin_of_next, _ in self.phases[1:]), math.inf]
        return tuple(size for size, end in zip(self.sizes, ends, strict=True) if end > begin)

    def iterations(self, samples: int) -> int:
        """Return the number of whole iterations, from the beginning of a run, for which these samples are enough."""
        iterations = 0
        for size, most in self._lengths():
            of_phase = min(samples // size, most)
            iterations, samples = iterations + of_phase, samples - of_phase * size
            if of_phase < most:
                break
        return iterations

    def samples(self, iterations: int) -> int:
        """Return the number of samples that this number of iterations reads, from the beginning of a run."""
        samples = 0
        for size, most in self._lengths():
            of_phase = min(iterations, most)
            iterations, samples = iterations - of_phase, samples + of_phase * size
        return samples

    def _lengths(self) -> Iterator[tuple[int, int]]:
        """Yield the batch size of each phase, and its number of iterations, which is unlimited for the last phase."""
        samples = 0
        for (_, size), (end, _) in pairwise(self.phases):
            iterations = max(0, -(-(end - samples) // size))  # the iteration that reaches the end is whole
            yield size, iterations
            samples += iterations * size
        yield self.phases[-1][1], sys.maxsize


def training_iterations(args: Namespace) -> int:
    """Return the number of iterations of a run; 0 if the arguments do not say it.

    Megatron sets `args.train_iters` of a run with `--train-samples` only when it makes the optimizer.

    Args:
        args: arguments that Megatron has validated.
    """
    return args.train_iters or BatchSizes.from_args(args).iterations(args.train_samples or 0)


def trained_samples(args: Namespace) -> int:
    """Return the number of samples that a run reads in all its iterations.

    Args:
        args: arguments that Megatron has validated.
    """
    return BatchSizes.from_args(args).samples(training_iterations(args))
