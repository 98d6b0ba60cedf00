"""`maskmoe status` describes a real run after its end."""

import pytest
from support.runs import read_scalars

from maskmoe.run_status.status import read_status


@pytest.mark.runs("expert parallel 2, undisturbed")
def test_status_of_an_ended_run(runs):
    (run,) = runs
    logged = read_scalars(run.folder)
    status = read_status(run.checkpoints)
    assert status.liveness.state == "finished"
    newest = {tag: events[-1] for tag, events in logged.items()}
    assert (status.progress.iteration, status.progress.loss) == (21, pytest.approx(newest["lm loss"].value, rel=1e-5))
    assert status.progress.held_out_loss == newest["lm loss validation"].value
    assert status.logged.scalars["lm loss"] == logged["lm loss"]
    assert [each.iteration for each in status.checkpoints.saved] == [21, 14, 7]
    assert {each.soundness for each in status.checkpoints.saved} == {"complete"}
    for each in status.checkpoints.saved:
        assert each.size == sum(path.stat().st_size for path in each.path.iterdir() if path.is_file())
    assert status.checkpoints.next_start == run.checkpoints / "iter_0000021"
