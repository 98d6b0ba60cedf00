"""Computes how many samples a run asks its datasets for."""

from argparse import Namespace
from collections.abc import Sequence


def requested_training_samples(args: Namespace, iteration: int = 0, consumed: int = 0) -> int:
    """Return the number of samples that a run asks its training data for.

    With `--train-iters`, Megatron asks for samples as if all iterations had the batch size of this run. If earlier
    iterations had larger batches, a run asks for the samples of its remaining iterations in addition to the consumed
    samples.

    Args:
        args: arguments that Megatron has validated.
        iteration: the iteration from which the run resumes.
        consumed: the number of samples that were consumed before this iteration.
    """
    batch, iterations = args.global_batch_size or 0, args.train_iters or 0
    return args.train_samples or max(iterations * batch, consumed + (iterations - iteration) * batch)


def samples_to_request(args: Namespace, num_samples: Sequence[int | None]) -> list[int | None]:
    """Return the numbers of samples of each dataset that last to the end of a run, at least the given numbers.

    Megatron asks for the samples that the run would need if the run had had its settings from the beginning. A run that
    resumes with a smaller batch or with fewer evaluations would then run out of samples. Without such a change, the
    numbers do not change, and neither does the order of the samples.

    Args:
        args: Megatron's arguments after the checkpoint is loaded.
        num_samples: the numbers of samples that Megatron asks the training, validation and test data for; None for one
            epoch.
    """
    training, validation, test = num_samples
    # Megatron also sets `train_iters` of a run with `--train-samples`. With `--phase-transition-iterations`, Megatron
    # asks for the samples of one phase only.
    if training is not None and not (args.train_samples or args.phase_transition_iterations):
        training = max(training, requested_training_samples(args, args.iteration, args.consumed_train_samples))
    if validation is not None and not args.skip_train:
        before_first = (max(1, args.start_eval_at_iter or 0) - 1) // args.eval_interval
        evaluations = max(0, args.iteration // args.eval_interval - before_first)
        surplus = args.consumed_valid_samples - evaluations * args.eval_iters * args.eval_global_batch_size
        if surplus > 0:
            # Megatron refuses data of which all samples are consumed, even with `--eval-iters 0`.
            validation = max(validation + surplus, args.consumed_valid_samples + 1)
    return [training, validation, test]
