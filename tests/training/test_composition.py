"""Layouts and settings that can be combined with a routing mask."""

import re

import pytest
from support.training_runs import COMPARED, RUNS

from maskmoe.routing_mask.dispatch_kind import DispatchKind

# fp32 numbers are 1.2e-7 apart, and layouts add them in different orders. The largest difference seen is 4.3e-7, and it
# does not grow over the steps. Another mask changes the loss by more than 1e-4, see
# settings/test_inputs.py.
FP32_ORDER_OF_SUMS = 2e-6

# Compared runs of the default test run; the remaining runs are for `--all`. Each kind of parallelism is in one of them.
FAST = {
    "expert parallel 2",
    "pipeline 2",
    "interleaved pipeline",
    "data parallel 2, distributed optimizer",
    "rich, tensor 2, expert parallel 2",
    "rich, pipeline 2",
    "groups, tensor 2, expert parallel 2",
    "experts of one rank, context parallel 2, expert parallel 2",
    "experts of one rank, selective recompute",
    "rich hybrid, tensor 2, expert parallel 2",
}


def compared_runs(in_bf16: bool = False) -> list:
    return [
        pytest.param(run, marks=[pytest.mark.runs(reference, run), *([] if run in FAST else [pytest.mark.slow])])
        for reference, runs in COMPARED.items()
        for run in runs
        if ("--bf16" in RUNS[reference].flags.split()) == in_bf16
    ]


@pytest.mark.runs("reference")
def test_reference_learns(runs):
    (reference,) = runs
    losses = reference.curves["lm loss"]
    assert reference.iterations == list(range(1, 22))
    assert losses[21] < losses[1] - 0.4


@pytest.mark.parametrize("name", compared_runs())
def test_layout_agrees_with_single_process(runs, name):
    reference, run = runs
    assert run.iterations == list(range(run.iterations[0], reference.iterations[-1] + 1))
    assert len(run.iterations) >= 4
    assert run.difference(reference) < FP32_ORDER_OF_SUMS


@pytest.mark.runs("planned dispatch, distributed optimizer", "planned dispatch, gathered parameters")
def test_every_module_waits_for_its_gathered_parameters(runs):
    reference, run = runs
    assert run.iterations[-1] == 8
    assert run.difference(reference) < FP32_ORDER_OF_SUMS


@pytest.mark.runs("rich, bf16, expert parallel 2", "rich, bf16, overlapped dispatch")
def test_dispatch_that_overlaps_with_another_micro_batch_computes_the_same_bits(runs):
    reference, run = runs
    assert run.iterations == list(range(1, 7))
    assert run.difference(reference) == 0


@pytest.mark.slow
@pytest.mark.runs("rich, bf16, prediction, one at a time", "rich, bf16, prediction, overlapped")
def test_overlapped_dispatch_with_multi_token_prediction(runs):
    """The schedules add the gradients of the embedding in another order, so only the first step has the same bits."""
    reference, run = runs
    losses = [name for name in reference.curves if "loss" in name and 1 in reference.curves[name]]
    assert "mtp_1 loss" in losses
    assert all(run.curves[name][1] == reference.curves[name][1] for name in losses)
    assert run.difference(reference, ["lm loss", "mtp_1 loss"]) < 5e-4  # 2e-5 was seen
    assert run.difference(reference, losses) < 1e-2  # bf16 numbers are 8e-3 apart


@pytest.mark.slow
@pytest.mark.runs("reference", "tensor 2, larger micro-batches in evaluation")
def test_validation_has_micro_batches_of_its_own(runs):
    reference, run = runs
    assert list(run.curves["lm loss validation"]) == [5]
    assert run.difference(reference) < FP32_ORDER_OF_SUMS


@pytest.mark.runs("second rank without tokens, on 1", "second rank without tokens")
def test_rank_without_tokens_agrees_with_single_process(runs):
    reference, run = runs
    assert run.iterations == list(range(8, 13))
    assert run.difference(reference) < FP32_ORDER_OF_SUMS


@pytest.mark.runs("reference", "bf16, distributed optimizer")
def test_bf16_with_distributed_optimizer_agrees_roughly(runs):
    reference, run = runs
    assert run.difference(reference, ["lm loss", "lm loss validation"]) < 5e-4  # 9e-5 was seen
    assert run.difference(reference) < 1e-2  # 5e-3 was seen; bf16 numbers are 8e-3 apart


@pytest.mark.parametrize("name", compared_runs(in_bf16=True))
def test_layout_in_bf16_agrees_roughly(runs, name):
    reference, run = runs
    assert run.iterations == list(range(5, 9))
    assert run.difference(reference, ["lm loss", "lm loss validation"]) < 5e-4  # 8e-6 was seen
    assert run.difference(reference) < 1e-2  # bf16 numbers are 8e-3 apart


@pytest.mark.slow
@pytest.mark.runs("reset masks", "packed documents as with reset masks", "documents that see each other")
def test_packed_documents_equal_reset_masks(runs):
    """Two ways to keep attention to documents agree, and differ from attention to whole samples."""
    masks, packed, whole = runs
    assert packed.iterations == masks.iterations
    assert packed.difference(masks) < FP32_ORDER_OF_SUMS
    assert whole.difference(masks, ["lm loss"]) > 1e2 * FP32_ORDER_OF_SUMS


@pytest.mark.runs("experts of one rank", "experts of one rank, selective recompute")
def test_dispatch_is_planned_where_it_can_be(runs):
    logs = ("\n".join(log.read_text() for log in run.folder.glob("*.log")) for run in runs)
    one_process, two_ranks = (re.search("^dispatch +(.*)", log, re.MULTILINE)[1] for log in logs)
    assert one_process == DispatchKind.ONE_RANK.value
    assert two_ranks == DispatchKind.PLANNED.value
