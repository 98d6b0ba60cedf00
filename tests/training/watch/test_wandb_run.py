"""A resumed run continues its Weights & Biases run."""

import argparse
import sys
import types

import pytest

from maskmoe.errors import UserError
from maskmoe.training.watch import wandb_run


@pytest.fixture
def make_args(tmp_path, monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # and restore it after the test
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    monkeypatch.setattr(wandb_run, "find_spec", lambda name: object())
    settings = {"wandb_project": "p", "wandb_exp_name": None, "wandb_save_dir": None, "tensorboard_dir": None}
    settings |= {"save": str(tmp_path / "run" / "checkpoints"), "rank": 1, "world_size": 2}
    return lambda **changes: argparse.Namespace(**settings | changes)


def test_resumed_run_has_the_id_of_its_folder(make_args, tmp_path, monkeypatch):
    ids = []
    for _ in range(2):
        monkeypatch.setenv("WANDB_RUN_ID", "")
        defaults = wandb_run.wandb_defaults(make_args())
        assert defaults == {"wandb_exp_name": "run", "wandb_save_dir": str(tmp_path / "run")}
        assert wandb_run.os.environ["WANDB_RUN_ID"] == ""  # the run may still be refused
        wandb_run.take_run_id(make_args())
        ids.append(wandb_run.os.environ["WANDB_RUN_ID"])
    assert ids[0] == ids[1] == (tmp_path / "run" / "wandb_run_id").read_text().strip()
    assert len(ids[0]) == 12


def test_flags_and_variables_of_the_user_stay(make_args, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    args = make_args(wandb_exp_name="name", wandb_save_dir="folder")
    defaults = wandb_run.wandb_defaults(args)
    wandb_run.take_run_id(args)
    assert defaults == {}
    assert wandb_run.os.environ["WANDB_RUN_ID"] == "mine"
    assert not (tmp_path / "run").exists()


def test_ranks_that_do_not_log_leave_no_file(make_args, tmp_path):
    wandb_run.take_run_id(make_args(rank=0))
    assert not (tmp_path / "run").exists()


def test_run_without_a_folder_or_without_the_package_is_refused(make_args, monkeypatch):
    assert wandb_run.wandb_defaults(make_args(wandb_project=None, save=None)) == {}
    with pytest.raises(UserError, match="--wandb-project needs a run folder"):
        wandb_run.wandb_defaults(make_args(save=None))
    monkeypatch.setattr(wandb_run, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        wandb_run.wandb_defaults(make_args())
