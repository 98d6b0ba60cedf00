"""Why training ends early: the exit code, and the error that is reported."""

import errno
import time
from argparse import Namespace

import pytest
import torch
from megatron.training import training

from maskmoe.checkpoint.saver import SaveError
from maskmoe.errors import RunFailure
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.training.watch.early_ends import explaining_early_ends


@pytest.fixture
def explaining(monkeypatch):
    """Return the context manager for some arguments of a run; it ends no process of the test."""
    monkeypatch.setattr("multiprocessing.active_children", list)
    return lambda **args: explaining_early_ends(Namespace(**{"save": None} | args))


@pytest.mark.parametrize(
    ("elapsed", "minutes", "last_step", "code"),
    [(301, 5, 7, EXIT_REQUEUE), (301, 5, 8, 0), (100, 5, 7, 0), (301, None, 7, 0), (301, 0, 7, 0)],
    ids=["time", "complete", "exit interval", "no limit", "0 is no limit"],
)
def test_run_that_is_out_of_time_asks_for_a_new_start(explaining, monkeypatch, elapsed, minutes, last_step, code):
    """Megatron exits with 0 after --exit-duration-in-mins, as after --exit-interval."""
    monkeypatch.setattr(training, "_TRAIN_START_TIME", time.time() - elapsed)
    args = {"exit_signal_handler": False, "exit_duration_in_mins": minutes, "train_iters": 9}
    with pytest.raises(SystemExit) as end, explaining(**args, curr_iteration=last_step):
        raise SystemExit(0)
    assert end.value.code == code


def test_save_to_a_folder_that_has_vanished_fails_in_one_line(explaining, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    args = {"save": str(tmp_path / "gone")}
    message = r"^cannot save a checkpoint to .*/gone: no such folder\. There is no checkpoint yet$"
    with pytest.raises(RunFailure, match=message), explaining(**args):
        raise SaveError("no such folder")


def test_full_disk_beside_a_save_is_not_a_failed_save(explaining, tmp_path):
    """The disk of a cache may be full."""
    with pytest.raises(OSError, match="'/tmp/cache'"), explaining(save=str(tmp_path)):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/cache")
