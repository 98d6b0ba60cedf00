"""A checkpoint holds its routing mask, and a run refuses to load it with another mask."""

from dataclasses import replace

import pytest

from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=pytest.mark.runs(name))
        for name in ("start", "pipeline 2", "experts on 2, distributed optimizer", "bf16, distributed optimizer")
    ],
)
def test_checkpoint_holds_the_mask(runs, workplace, layout):
    (run,) = runs
    original = RoutingMask.load(workplace.folder / "mask.safetensors")
    saved = read_routing_mask(run.checkpoints)
    assert saved.digest == original.digest
    assert (saved.row_of_id == original.row_of_id).all()
    assert (saved.visible_bits == original.visible_bits).all()


@pytest.mark.runs("start")
def test_other_mask_is_refused(runs, workplace, start, refusal, files_and_times):
    (run,) = runs
    before = files_and_times(run.checkpoints)
    flags = f"--load {run.checkpoints} --save {run.checkpoints}"
    message = refusal(start("refuse another mask", replace(refusal.run, flags=flags, mask="other_seed.safetensors")))
    for name in ("mask", "other_seed"):
        assert RoutingMask.load(workplace.folder / f"{name}.safetensors").digest[:16] in message
    assert files_and_times(run.checkpoints) == before


def test_folder_without_checkpoint(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        read_routing_mask(tmp_path)
