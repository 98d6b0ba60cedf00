"""A checkpoint holds its routing mask, and a run refuses to load it with another mask."""

import pytest

from maskmoe.checkpoint.routing_mask import read_routing_mask
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
