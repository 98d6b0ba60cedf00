"""The iterations of a run with a schedule of batch sizes, against Megatron's own count."""

from argparse import Namespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from maskmoe.errors import UserError
from maskmoe.training.settings.batch_sizes import BatchSizes, trained_samples, training_iterations

SEQ_LENGTH = 16


def arguments(schedule: str | None, **others: int) -> Namespace:
    lengths = {"train_iters": None, "train_samples": None, "global_batch_size": 4}
    return Namespace(step_batch_size_schedule=schedule, seq_length=SEQ_LENGTH, **lengths | others)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    iterations=st.integers(1, 60),
)
def test_iterations_are_those_of_megatron(sizes, lengths, iterations):
    """Megatron takes the batch size that holds for the number of samples before the iteration."""
    starts = [sum(lengths[:number]) for number in range(len(sizes))]
    schedule = " ".join(f"{start * SEQ_LENGTH}:{size}" for start, size in zip(starts, sizes, strict=True))
    calculator = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, schedule, SEQ_LENGTH)
    batches, samples = BatchSizes.from_args(arguments(schedule)), 0
    assert batches.sizes == tuple(sizes)
    for iteration in range(iterations):
        assert batches.samples(iteration) == samples
        remaining = batches.sizes_from(iteration)
        calculator.update(samples, consistency_check=False)
        samples += calculator.get_current_global_batch_size()
        assert remaining[0] == calculator.get_current_global_batch_size()
        assert remaining == batches.sizes[-len(remaining) :]
        assert batches.iterations(samples - 1) == iteration  # the last iteration is not whole
        assert batches.iterations(samples) == iteration + 1
    args = arguments(schedule, train_samples=samples)
    assert (training_iterations(args), trained_samples(args)) == (iterations, samples)


def test_lengths_with_one_batch_size():
    for length, iterations in (
        ({"train_iters": 5}, 5),
        ({"train_samples": 20}, 5),
        ({"train_samples": 23}, 5),
        ({}, 0),
    ):
        args = arguments(None, **length)
        assert (training_iterations(args), trained_samples(args)) == (iterations, 4 * iterations)


@pytest.mark.parametrize("schedule", ["", "4", "0:x", "16:4", "0:4 0:8", "0:4 1:8", "0:0", "0:inf"])
def test_schedule_that_cannot_be_read(schedule):
    with pytest.raises(UserError, match=r"^--step-batch-size-schedule '.*' cannot be read: [^\n]+$"):
        BatchSizes.from_args(arguments(schedule))
