"""Training writes the page report.html, and continues when files cannot be written."""

import argparse
import errno
import sys
import time
import types

import psutil
import pytest
from megatron.training.global_vars import destroy_global_vars
from support.report_pages import check_page
from torch.utils.tensorboard import SummaryWriter

from maskmoe.command_line.parser import OneLineParser
from maskmoe.errors import UserError
from maskmoe.launch.run_folder import run_folder
from maskmoe.megatron_compat.globals import open_writers
from maskmoe.training.settings.pretraining_arguments import add_pretraining_arguments
from maskmoe.training.watch import wandb_run
from maskmoe.training.watch.run_report import RunReport, choose_event_folder, tolerate_write_errors


@pytest.mark.runs("expert parallel 2, undisturbed")
def test_page_has_the_values_of_the_log(runs):
    """The last of two ranks prints the lines, and is the only one that writes the page."""
    (run,) = runs
    values = check_page(run.checkpoints / "report.html", (run.folder / "out1.log").read_text())
    assert list(values) == list(range(1, 22))
    assert all(float(row["tokens/s"]) > 0 for step, row in values.items() if step > 1)
    assert [path.name for path in run.folder.rglob("*report.html*")] == ["report.html"]


@pytest.mark.runs("reference")
def test_no_page_if_it_is_not_wanted(runs):
    (run,) = runs
    assert not [*run.folder.rglob("*report.html*")]


@pytest.mark.parametrize(
    ("save", "tensorboard", "expected"),
    [
        ("/r/checkpoints", None, "/r"),
        ("/r/checkpoints", "/t/tensorboard", "/r"),
        ("/r/save", "/r/tensorboard", "/r/save"),
        (None, "/r/tensorboard", "/r"),
        (None, "/r/events", "/r/events"),
        (None, None, "None"),
    ],
)
def test_run_folder(save, tensorboard, expected):
    assert str(run_folder(save, tensorboard)) == expected


def test_full_disk_ends_the_events_and_not_the_training(tmp_path, capsys):
    writer = SummaryWriter(tmp_path)
    tolerate_write_errors(writer)
    writer.add_scalar("a", 1.0, 1)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    events = writer.file_writer.event_writer._events
    events.add_event = events.flush = fail
    for step in range(2, 5):
        writer.add_scalar("a", 1.0, step)
        writer.flush()
    writer.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: TensorBoard's events and report.html end here: [Errno 28] No space left on device")


def test_page_that_cannot_be_written_does_not_hold_up_training(tmp_path, monkeypatch):
    """The process that writes the page does not run at all; the training asks for more pages than a run ever does."""
    folders = {"save": str(tmp_path / "run" / "checkpoints"), "tensorboard_dir": None, "tensorboard_queue_size": 1000}
    args = argparse.Namespace(**folders, rank=0, world_size=1, report_interval=1e-9)
    args.wandb_project, args.enable_one_logger = "", False
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    choose_event_folder(args)
    try:
        open_writers(args)
        report = RunReport(args)
    finally:
        destroy_global_vars()
    process = psutil.Process(report._process.pid)
    assert process.nice() == 19
    process.suspend()
    start = time.monotonic()
    for _ in range(100):
        report()
    assert time.monotonic() - start < 1
    with report.following():
        process.resume()
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "a", ""])
def test_bad_interval_is_refused(text):
    parser = add_pretraining_arguments(OneLineParser())
    with pytest.raises(UserError, match=r"^--report-interval must be (a number|a finite number|at least 0), not "):
        parser.parse_args([f"--report-interval={text}"])


class TestWandbRun:
    @pytest.fixture
    def make_args(self, tmp_path, monkeypatch):
        for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
            monkeypatch.setenv(name, "")  # and restore it after the test
        monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
        monkeypatch.setattr(wandb_run, "find_spec", lambda name: object())
        settings = {"wandb_project": "p", "wandb_exp_name": None, "wandb_save_dir": None, "tensorboard_dir": None}
        settings |= {"save": str(tmp_path / "run" / "checkpoints"), "rank": 1, "world_size": 2}
        return lambda **changes: argparse.Namespace(**settings | changes)

    def test_resumed_run_has_the_id_of_its_folder(self, make_args, tmp_path, monkeypatch):
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

    def test_flags_and_variables_of_the_user_stay(self, make_args, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_RUN_ID", "mine")
        args = make_args(wandb_exp_name="name", wandb_save_dir="folder")
        defaults = wandb_run.wandb_defaults(args)
        wandb_run.take_run_id(args)
        assert defaults == {}
        assert wandb_run.os.environ["WANDB_RUN_ID"] == "mine"
        assert not (tmp_path / "run").exists()

    def test_ranks_that_do_not_log_leave_no_file(self, make_args, tmp_path):
        wandb_run.take_run_id(make_args(rank=0))
        assert not (tmp_path / "run").exists()

    def test_run_without_a_folder_or_without_the_package_is_refused(self, make_args, monkeypatch):
        assert wandb_run.wandb_defaults(make_args(wandb_project=None, save=None)) == {}
        with pytest.raises(UserError, match="--wandb-project needs a run folder"):
            wandb_run.wandb_defaults(make_args(save=None))
        monkeypatch.setattr(wandb_run, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install wandb"):
            wandb_run.wandb_defaults(make_args())
