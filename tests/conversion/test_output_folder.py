"""The folder of a result appears under its name only when it is complete."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from maskmoe.conversion.output_folder import UNFINISHED, output_folder
from maskmoe.errors import UserError


@pytest.mark.parametrize("is_there", [False, True])
def test_folder_gets_its_name_when_it_is_complete(tmp_path, is_there):
    save = tmp_path / "made" / "model"
    if is_there:
        save.mkdir(parents=True)
    with output_folder(save) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("content")
        assert not (save / "part").exists()
    assert (save / "part" / "file").read_text() == "content"
    assert os.listdir(save.parent) == ["model"]


def fill(save, failure=None, meanwhile=lambda: None):
    """Write a file into an output folder; then call a function, and raise an exception if one is given."""
    with output_folder(save) as folder:
        (folder / "file").write_text("content")
        meanwhile()
        if failure is not None:
            raise failure


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), UserError("NaN")])
def test_failure_leaves_nothing(tmp_path, failure):
    with pytest.raises(type(failure)):
        fill(tmp_path / "model", failure)
    assert os.listdir(tmp_path) == []


def test_full_disk_is_one_line_of_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*model: No space left on device$"):
        fill(tmp_path / "model", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert os.listdir(tmp_path) == []


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / f"model{UNFINISHED}").mkdir()
    for name, words in (("whole", "is not empty"), ("file", "is not empty"), ("model", "a conversion is writing it")):
        with pytest.raises(UserError, match=words):
            fill(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", f"model{UNFINISHED}", "whole"]


def test_folder_that_was_filled_meanwhile_stays(tmp_path):
    def fill_meanwhile():
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "file").write_text("of another program")

    with pytest.raises(UserError, match=r"cannot write .*model: Directory not empty$"):
        fill(tmp_path / "model", meanwhile=fill_meanwhile)
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "of another program"


FILLING = """
import sys, time
from pathlib import Path
from maskmoe.conversion.output_folder import output_folder
with output_folder(Path(sys.argv[1])) as folder:
    (folder / "file").touch()
    time.sleep(60)
"""


def test_sigterm_leaves_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", FILLING, tmp_path / "model"])
    deadline = time.monotonic() + 60
    while not (tmp_path / f"model{UNFINISHED}" / "file").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []
