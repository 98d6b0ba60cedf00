"""Computes which settings decide the order in which Megatron reads the samples of its datasets."""

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron.core.datasets import blended_megatron_dataset_config as dataset_config
from megatron.core.datasets.utils import Split, normalize
from megatron.training.utils import get_blend_and_blend_per_split

from maskmoe.data.indexed_dataset import read_index

# Megatron shuffles the last epoch by itself if the run reads less than this share of its samples.
_SEPARATE_BELOW = 0.8
# Megatron prepares this share of samples more than the run reads of each dataset in a blend.
_SURPLUS = 0.005


class Epochs(NamedTuple):
    """The epochs that Megatron shuffles together for a run. Another value gives another order of the samples.

    Attributes:
        number: the number of epochs.
        last_is_separate: whether the last epoch is shuffled by itself.
    """

    number: int
    last_is_separate: bool

    @classmethod
    def for_samples(cls, num_samples: int, tokens_in_epoch: int, seq_length: int) -> "Epochs":
        """Return the epochs from which Megatron's `GPTDataset` takes samples.

        Args:
            num_samples: the number of samples that the run asks the dataset for.
            tokens_in_epoch: the number of tokens of the dataset's part.
            seq_length: the number of tokens in a sample.
        """
        # A sample has one more token, which is a label only.
        number = max(1, math.ceil((num_samples * seq_length + 1) / tokens_in_epoch))
        if number == 1:
            return cls(1, False)
        of_last_epoch = num_samples - ((number - 1) * tokens_in_epoch - 1) // seq_length
        return cls(number, of_last_epoch < int(_SEPARATE_BELOW * ((tokens_in_epoch - 1) // seq_length)))


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


def epochs_of_training_data(args: Namespace, num_samples: int) -> dict[str, Epochs]:
    """Return the epochs of each dataset of the training data; a dataset without a fixed share is left out.

    Args:
        args: arguments that Megatron has validated.
        num_samples: the number of samples that the run asks the training data for.

    Raises:
        UserError: a dataset cannot be read.
    """
    return {
        prefix: Epochs.for_samples(number, tokens, args.seq_length)
        for prefix, number, tokens in _requests(args, num_samples)
        if tokens
    }


def _requests(args: Namespace, num_samples: int) -> Iterator[tuple[str, int, int]]:
    """Yield the prefix of each training dataset, the number of its samples, and the tokens of its training part."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    bounds: Any = (0, 1)
    if blend_per_split is not None:
        blend = blend_per_split[Split.train.value]
    elif blend is not None:
        split = dataset_config.parse_and_normalize_split(args.split)
        bounds = dataset_config.convert_split_vector_to_split_matrix(split)[Split.train.value]
    if blend is None or bounds is None:
        return
    prefixes, weights = blend
    if weights is None and len(prefixes) > 1:
        return  # each dataset is read once
    for prefix, weight in zip(prefixes, normalize(weights) if weights else [None], strict=True):
        lengths = read_index(prefix).sequence_lengths
        first, last = (round(bound * len(lengths)) for bound in bounds)
        number = num_samples if weight is None else math.ceil(math.ceil(num_samples * weight) * (1 + _SURPLUS))
        yield prefix, number, int(lengths[first:last].sum())
