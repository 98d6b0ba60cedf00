"""Runs may have a length in samples, and batches that grow."""

import pytest
from megatron.core.dist_checkpointing import load_common_state_dict
from support.runs import read_scalars

from maskmoe.checkpoint.series import checkpoint_path


@pytest.mark.slow
@pytest.mark.runs("reference", "length in samples")
def test_length_in_samples_is_the_length_in_iterations(runs):
    """170 samples are 21 iterations of 8 samples; Megatron leaves an incomplete batch out."""
    reference, in_samples = runs
    assert in_samples.iterations == reference.iterations == list(range(1, 22))
    assert in_samples.difference(reference) == 0
    output = (in_samples.folder / "out0.log").read_text()
    assert "micro-batches of 2; 21 iterations\n" in output
    assert "complete: 21 iterations, loss" in output


@pytest.mark.slow
@pytest.mark.runs("batches before they grow", "growing batches", "growing batches, resumed")
def test_growing_batches(runs):
    """Megatron saves before the batch size changes, here an iteration that is due anyway; it is saved only once."""
    before, growing, resumed = runs
    assert before.iterations == [1, 2, 3, 4]
    assert before.difference(growing) == 0
    assert growing.iterations == list(range(1, 13))
    assert [event.value for event in read_scalars(growing.folder)["batch-size"]] == [4] * 4 + [8] * 8
    assert resumed.iterations == list(range(5, 13))
    assert resumed.difference(growing) == 0
    assert load_common_state_dict(checkpoint_path(growing.checkpoints, 12))["args"].eval_global_batch_size == 8
    assert growing.saved == [4, 8, 12]
    output = (growing.folder / "out0.log").read_text()
    assert "4 to 8 samples × 32 = 128 to 256 tokens, in micro-batches of 2; 12 iterations\n" in output
