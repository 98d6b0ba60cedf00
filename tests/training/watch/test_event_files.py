"""The event files of a run hold its command, and a full disk ends them and not the training."""

import errno
import shlex
import sys
from argparse import Namespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from maskmoe.run_status.events import read_events
from maskmoe.training.watch import event_files
from maskmoe.training.watch.event_files import EventFiles, choose_event_folder


@pytest.fixture
def writer(tmp_path, monkeypatch):
    writer = SummaryWriter(tmp_path)
    monkeypatch.setattr(event_files, "get_tensorboard_writer", lambda: writer)
    return writer


def test_values_and_the_command_are_written_at_the_end(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data-path", "a b"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    files = EventFiles()
    files.on_start()
    writer.add_scalar("lm loss", 1.5, 3)
    files.on_end(None)
    logged = read_events(tmp_path)
    assert [(value.step, value.value) for value in logged.scalars["lm loss"]] == [(3, 1.5)]
    words = ["torchrun", "--nnodes", "2", "--nproc-per-node", "4", "-m", "maskmoe.training.pretrain"]
    assert shlex.split(logged.texts["command"]) == [*words, "--data-path", "a b"]
    assert "torch " in logged.texts["versions"]


def test_full_disk_ends_the_events_and_not_the_training(writer, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    events = writer.file_writer.event_writer
    monkeypatch.setattr(events, "add_event", fail)
    monkeypatch.setattr(events, "flush", fail)
    EventFiles().on_start()
    for step in range(2, 5):
        writer.add_scalar("a", 1.0, step)
        writer.flush()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: TensorBoard's events end here: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("report", "tensorboard_dir", "expected"),
    [(True, None, "/run/tensorboard"), (False, None, None), (True, "/tb", "/tb"), (False, "/tb", "/tb")],
)
def test_folder_of_the_event_files(report, tensorboard_dir, expected):
    args = Namespace(save="/run/checkpoints", tensorboard_dir=tensorboard_dir, report=report)
    choose_event_folder(args)
    assert args.tensorboard_dir == expected
