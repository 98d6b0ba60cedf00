"""Why training ends early: the exit code, and the error that is reported."""

import errno
from argparse import Namespace

import pytest
import torch

from maskmoe.checkpoint.saver import SaveError
from maskmoe.errors import RunFailure
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.training.watch.early_ends import report_early_end


@pytest.fixture
def report_end(monkeypatch):
    """Return the context manager for some arguments of a run; it ends no process of the test."""
    monkeypatch.setattr("multiprocessing.active_children", list)
    return lambda **args: report_early_end(Namespace(**{"save": None} | args))


@pytest.mark.parametrize(
    ("minutes", "last_step", "code"),
    [(5, 7, EXIT_REQUEUE), (5, 8, 0), (None, 7, 0), (0, 7, 0)],
    ids=["early", "complete", "no limit", "0 is no limit"],
)
def test_run_that_is_out_of_time_asks_for_a_new_start(report_end, minutes, last_step, code):
    """Megatron exits with 0 after --exit-duration-in-mins."""
    args = {"exit_signal_handler": False, "exit_duration_in_mins": minutes, "train_iters": 9}
    with pytest.raises(SystemExit) as end, report_end(**args, curr_iteration=last_step):
        raise SystemExit(0)
    assert end.value.code == code


def test_save_to_a_folder_that_has_vanished_fails_in_one_line(report_end, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    args = {"save": str(tmp_path / "gone")}
    message = r"^cannot save a checkpoint to .*/gone: no such folder\. There is no checkpoint yet$"
    with pytest.raises(RunFailure, match=message), report_end(**args):
        raise SaveError("no such folder")


def test_full_disk_beside_a_save_is_not_a_failed_save(report_end, tmp_path):
    """The disk of a cache may be full."""
    with pytest.raises(OSError, match="'/tmp/cache'"), report_end(save=str(tmp_path)):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/cache")
