"""How a run is divided into ranks, batches and samples, against Megatron's own counts."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from megatron.training import training as megatron_training

from maskmoe.errors import UserError
from maskmoe.training.preflight.layout import Layout
from maskmoe.training.preflight.memory import micro_batches_in_flight
from maskmoe.training.settings.samples import BatchSizes, samples_to_request, training_iterations

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
        calculator.update(samples, consistency_check=False)
        samples += calculator.get_current_global_batch_size()
        assert batches.iterations(samples - 1) == iteration  # the last iteration is not whole
        assert batches.iterations(samples) == iteration + 1
    assert training_iterations(arguments(schedule, train_samples=samples)) == iterations


def test_lengths_with_one_batch_size():
    for length, iterations in (({"train_iters": 5}, 5), ({"train_samples": 23}, 5), ({}, 0)):
        assert training_iterations(arguments(None, **length)) == iterations


@pytest.mark.parametrize("schedule", ["", "4", "0:x", "16:4", "0:4 0:8", "0:4 1:8", "0:0", "0:inf"])
def test_schedule_that_cannot_be_read(schedule):
    with pytest.raises(UserError, match=r"^--step-batch-size-schedule '.*' cannot be read: [^\n]+$"):
        BatchSizes.from_args(arguments(schedule))


@pytest.mark.parametrize(
    ("changes", "training", "validation"),
    [
        ({}, 168, 40),
        ({"consumed_valid_samples": 0}, 168, 40),
        ({"global_batch_size": 4, "eval_global_batch_size": 4}, 56 + 14 * 4, 20 + 4),
        ({"global_batch_size": 16, "eval_global_batch_size": 16}, 336, 80),
        ({"eval_interval": 100}, 168, 8 + 8),
        ({"eval_iters": 0}, 168, 9),
        ({"eval_iters": 0, "consumed_valid_samples": 0}, 168, 1),
        ({"eval_interval": 2, "start_eval_at_iter": 6}, 168, 72),
        ({"eval_interval": 2, "start_eval_at_iter": 7, "consumed_valid_samples": 16}, 168, 64 + 16),
        ({"train_samples": 170}, 170, 40),
        ({"consumed_train_samples": 168}, 168 + 14 * 8, 40),
        ({"iteration": 0, "consumed_train_samples": 0, "consumed_valid_samples": 0}, 168, 40),
        ({"iteration": 0, "consumed_valid_samples": 0, "eval_interval": 2, "start_eval_at_iter": 6}, 56 + 168, 72),
        ({"iteration": 21, "consumed_train_samples": 168, "consumed_valid_samples": 32}, 168, 40),
        ({"skip_train": True, "consumed_valid_samples": 100}, 168, 8),
    ],
)
def test_requested_samples_last_to_the_end(monkeypatch, changes, training, validation):
    """The checkpoint is from iteration 7 of a run of 21 iterations with 8 samples each, evaluated in iteration 5."""
    args = Namespace(iteration=7, train_iters=21, train_samples=None, global_batch_size=8, consumed_train_samples=56)
    vars(args).update(eval_interval=5, eval_iters=1, eval_global_batch_size=8, consumed_valid_samples=8)
    vars(args).update(start_eval_at_iter=None, skip_train=False, full_validation=False)
    vars(args).update({"phase_transition_iterations": None} | changes)
    monkeypatch.setattr(megatron_training, "get_args", lambda: args)
    requested = megatron_training.get_train_valid_test_num_samples()
    assert samples_to_request(args, requested) == [training, validation, max(1, requested[2])]


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("group", [4, 6])
@pytest.mark.parametrize("micro_batches", [1, 4, 8, 64])
def test_micro_batches_in_flight(chunks, group, micro_batches):
    for stage in range(4):
        layout = Layout(4, 1, 4, 1, 1, 1, chunks, group, 1, micro_batches, 8)
        communicator = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: 4, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        )
        _, _, warm_up, remaining = get_pp_rank_microbatches(micro_batches, chunks, group, p2p_communicator=communicator)
        # After the warm-up, a backward pass follows every forward pass.
        assert micro_batches_in_flight(layout, stage) * chunks == pytest.approx(warm_up + (remaining > 0))
