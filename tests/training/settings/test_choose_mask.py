"""A run with `--change-routing-mask` continues from a checkpoint with another routing mask."""

from argparse import Namespace
from dataclasses import replace

import pytest
from support.training import TrainingOutcome

from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.checkpoint.series import checkpoint_path
from maskmoe.command_line.widen_routing_mask import read_mask
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.mask import MaskChange, RoutingMask
from maskmoe.routing_mask.widening import widen_routing_mask
from maskmoe.training.settings.choose_mask import find_routing_mask

# See test_composition.py.
FP32_ORDER_OF_SUMS = 2e-6


def output_of(run: TrainingOutcome) -> str:
    """Return what all ranks of a run wrote to stdout."""
    return "".join(log.read_text() for log in run.folder.glob("out*.log"))


def masks_of(workplace, *names: str) -> list[RoutingMask]:
    return [RoutingMask.load(workplace.folder / f"{name}.safetensors") for name in names]


@pytest.mark.runs("wider mask", "wider mask, reference", "fp32")
def test_losses_are_those_of_the_new_mask_with_the_weights_of_the_checkpoint(runs):
    """The reference puts the new mask's tables into the model that was loaded with the old mask."""
    changed, reference, unchanged = runs
    assert changed.iterations == reference.iterations == [8, 9, 10]
    assert changed.difference(reference) == 0
    assert changed.difference(unchanged, ["lm loss"]) > 50 * FP32_ORDER_OF_SUMS


@pytest.mark.runs("wider mask")
def test_start_reports_the_change_once(runs, workplace):
    (changed,) = runs
    old, new = masks_of(workplace, "mask", "wider")
    (line,) = [line for line in output_of(changed).splitlines() if line.startswith("note: routing mask: ")]
    assert line == (
        f"note: routing mask: {old.digest[:16]}… of the checkpoint → {new.digest[:16]}…: {MaskChange.between(old, new)}"
    )


@pytest.mark.runs("wider mask", "fp32")
def test_later_checkpoints_hold_the_new_mask(runs, workplace):
    changed, unchanged = runs
    old, new = masks_of(workplace, "mask", "wider")
    for run, iteration, mask in ((unchanged, 7, old), (changed, 8, new), (changed, 10, new)):
        saved = read_routing_mask(checkpoint_path(run.checkpoints, iteration))
        assert saved.digest == mask.digest
        assert (saved.visible_bits == mask.visible_bits).all()


@pytest.mark.runs("wider mask")
def test_mask_of_a_checkpoint_can_be_widened_again(runs, workplace):
    (changed,) = runs
    (wider,) = masks_of(workplace, "wider")
    mask = read_mask(changed.checkpoints)
    assert mask.digest == wider.digest
    again = widen_routing_mask(mask, frequent_visible_experts=7)
    assert [ancestor["digest"] for ancestor in again.provenance.widened_from][-1] == wider.digest


def arguments(mask: object, **further: object) -> Namespace:
    return Namespace(routing_mask=mask, num_experts=8, expert_model_parallel_size=2, **further)


@pytest.mark.runs("wider mask", "fp32")
def test_other_mask_is_refused_unless_the_flag_is_given(runs, workplace):
    changed, unchanged = runs
    old, new = masks_of(workplace, "mask", "wider")
    for run, given, own in ((changed, old, "mask"), (unchanged, new, "wider")):
        args = arguments(workplace.folder / f"{own}.safetensors", change_routing_mask=False)
        with pytest.raises(UserError, match=r"or leave --routing-mask out .*; pass --change-routing-mask to change"):
            find_routing_mask(args, run.checkpoints, pytest.fail)
        args.change_routing_mask = True
        reports = []
        assert find_routing_mask(args, run.checkpoints, reports.append).digest == given.digest
        assert "(id, layer) pairs change" in reports[0]
        # Evaluation and generation have no such flag, so their error does not name the flag.
        del args.change_routing_mask
        with pytest.raises(UserError, match=r"to use it$"):
            find_routing_mask(args, run.checkpoints, pytest.fail)


@pytest.mark.runs("wider mask")
def test_flag_changes_nothing_if_the_masks_are_equal(runs, workplace):
    (changed,) = runs
    for checkpoint in (changed.checkpoints, None):
        reports = []
        args = arguments(workplace.folder / "wider.safetensors", change_routing_mask=True)
        find_routing_mask(args, checkpoint, reports.append)
        assert len(reports) == 1
        assert "--change-routing-mask changes nothing" in reports[0]


@pytest.mark.runs("fp32")
def test_masks_of_other_sizes_are_refused(runs, tmp_path):
    (run,) = runs
    recipe = MaskRecipe.from_preset("hash", 8, 4)
    for change, vocab_size, message in (
        ({}, 500, "vocabulary size is 500, not 510"),
        ({"num_experts": 16}, 510, "number of experts is 16, not 8"),
        ({"shared_table": True}, 510, "number of tables is 1, not 4"),
    ):
        build_routing_mask(replace(recipe, **change), vocab_size=vocab_size).save(tmp_path / "mask.safetensors")
        args = arguments(tmp_path / "mask.safetensors", change_routing_mask=True)
        with pytest.raises(UserError, match=message):
            find_routing_mask(args, run.checkpoints, pytest.fail)


@pytest.mark.runs("fp32")
def test_report_says_whether_experts_are_on_one_rank(runs, workplace):
    (run,) = runs
    args = arguments(workplace.folder / "rank_local.safetensors", change_routing_mask=True)
    reports = []
    find_routing_mask(args, run.checkpoints, reports.append)
    assert reports[0].endswith("; the visible experts of each id are now on one rank")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.runs("wider mask", name))
        for name in ("wider mask, resumed", "wider mask, requeued")
    ],
)
def test_run_is_resumed_with_the_new_mask(runs, name):
    changed, resumed = runs
    assert resumed.iterations == [9, 10]
    assert resumed.difference(changed) == 0
    assert ("--change-routing-mask changes nothing" in output_of(resumed)) == (name == "wider mask, requeued")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.runs(reference, name))
        for reference, name in (
            ("dispatch without plans, on 1", "dispatch without plans"),
            ("dispatch without plans, on 1", "dispatch without plans, interleaved pipeline"),
            ("dispatch with plans again, on 1", "dispatch with plans again"),
        )
    ],
)
def test_change_agrees_between_layouts(runs, name):
    """Dispatch is planned before the change and not after the change, or the other way round."""
    reference, run = runs
    assert run.iterations == reference.iterations
    assert run.difference(reference) < FP32_ORDER_OF_SUMS
    if "pipeline" not in name:
        # Only the first rank prints the line.
        assert output_of(run).count("routing mask: ") == 1
        assert f"{'now' if 'again' in name else 'no longer'} on one rank" in output_of(run)


@pytest.mark.slow
@pytest.mark.runs("fp32")
def test_check_reports_the_change(runs, workplace, tmp_path, refusal):
    (run,) = runs
    flags = f"--check 2 --load {run.checkpoints} --change-routing-mask"
    mask = {"mask": "wider.safetensors", "saves": False}
    outcome = workplace.run(replace(refusal.run, flags=flags, **mask), tmp_path / "change")
    assert outcome.exit_codes == (0,), outcome.report()
    assert "(id, layer) pairs change" in output_of(outcome)
    outcome = workplace.run(replace(refusal.run, flags=flags.rpartition(" ")[0], **mask), tmp_path / "no flag")
    assert outcome.exit_codes == (2,), outcome.report()
