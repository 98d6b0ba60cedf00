"""The event files of a run hold its last values, and a resumed run continues its Weights & Biases run."""

import os
import sys
import types
from argparse import Namespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from maskmoe.errors import UserError
from maskmoe.training.run_checks import run_folder_defaults
from maskmoe.training.watch import writers


def test_last_values_are_written(tmp_path, monkeypatch):
    with SummaryWriter(tmp_path) as writer:
        monkeypatch.setattr(writers, "get_tensorboard_writer", lambda: writer)
        writers.log_scalars({"lm loss": 1.5}, 3)
        writers.flush_event_files()
        logged = EventAccumulator(str(tmp_path)).Reload()
    assert [(value.step, value.value) for value in logged.Scalars("lm loss")] == [(3, 1.5)]


@pytest.fixture
def make_args(tmp_path, monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # and restore it after the test
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    settings = {"wandb_project": "p", "wandb_exp_name": None, "wandb_save_dir": None, "tensorboard_dir": None}
    settings |= {"save": str(tmp_path / "run" / "checkpoints"), "rank": 1, "world_size": 2}
    return lambda **changes: Namespace(**settings | changes)


def test_resumed_run_has_the_id_of_its_folder(make_args, tmp_path, monkeypatch):
    ids = []
    for _ in range(2):
        monkeypatch.setenv("WANDB_RUN_ID", "")
        defaults = run_folder_defaults(make_args())
        folder = str(tmp_path / "run")
        assert defaults == {
            "tensorboard_dir": f"{folder}/tensorboard",
            "wandb_exp_name": "run",
            "wandb_save_dir": folder,
        }
        assert os.environ["WANDB_RUN_ID"] == ""  # the run may still be refused
        writers.take_run_id(make_args())
        ids.append(os.environ["WANDB_RUN_ID"])
    assert ids[0] == ids[1] == (tmp_path / "run" / "wandb_run_id").read_text().strip()
    assert len(ids[0]) == 12


def test_flags_and_variables_of_the_user_stay(make_args, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    args = make_args(wandb_exp_name="name", wandb_save_dir="folder", tensorboard_dir="/tb")
    defaults = run_folder_defaults(args)
    writers.take_run_id(args)
    assert defaults == {}
    assert os.environ["WANDB_RUN_ID"] == "mine"
    assert not (tmp_path / "run").exists()


def test_ranks_that_do_not_log_leave_no_file(make_args, tmp_path):
    writers.take_run_id(make_args(rank=0))
    assert not (tmp_path / "run").exists()


def test_run_without_a_folder_is_refused(make_args):
    assert run_folder_defaults(make_args(wandb_project=None, save=None)) == {}
    with pytest.raises(UserError, match="--wandb-project needs a run folder"):
        run_folder_defaults(make_args(save=None))
