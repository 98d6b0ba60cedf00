"""Outputs never replace inputs, replace other files only with `--force`, and are never incomplete."""

import os
import signal
import time
from pathlib import Path

import pytest

from maskmoe.errors import UserError
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import atomic_output, unwinding_on_signals


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "input.bin"
    path.write_text("precious")
    return path


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["same", "spelling", "symbolic link", "hard link", "linked folder"])
def test_an_input_is_never_an_output(source: Path, kind: str, force: bool):
    folder = source.parent
    (folder / "sub").mkdir()
    output = {"same": source, "spelling": folder / "sub" / ".." / source.name}.get(kind, folder / "other")
    if kind == "symbolic link":
        output.symlink_to(source)
    elif kind == "hard link":
        os.link(source, output)
    elif kind == "linked folder":
        output.symlink_to(folder)
        output /= source.name
    with pytest.raises(UserError, match="is an input"):
        check_outputs([folder / "new", output], [source], force)
    assert source.read_text() == "precious"


def test_a_file_of_an_input_folder_is_an_input(source: Path):
    folder = source.parent
    with pytest.raises(UserError, match="belongs to the input"):
        check_outputs([source], [folder], force=True)
    check_outputs([folder / "new"], [folder])


def test_a_checkpoint_gets_no_output(tmp_path: Path):
    checkpoint = tmp_path / "iter_0000008"
    (checkpoint / "sub").mkdir(parents=True)
    (checkpoint / ".metadata").touch()
    (tmp_path / "link").symlink_to(checkpoint)
    for path in (checkpoint / "new", checkpoint / "sub" / "new", tmp_path / "link" / "new"):
        with pytest.raises(UserError, match="is a checkpoint, which stays as it was saved"):
            check_outputs([path], force=True)
    (tmp_path / ".metadata").mkdir()  # as in a workspace of Eclipse
    check_outputs([tmp_path / "new"])


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_umask_decides_who_may_read_an_output(tmp_path: Path, umask: int):
    """Also if a library replaces the temporary file by a file that only its owner may read."""
    before = os.umask(umask)
    try:
        with atomic_output(tmp_path / "output") as temporary:
            (tmp_path / "other").touch(mode=0o600)
            (tmp_path / "other").replace(temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "output").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_existing_output_is_replaced_only_by_force(source: Path):
    with pytest.raises(UserError, match=r"it exists; .*--force"):
        check_outputs([source])
    check_outputs([source], force=True)
    dangling = source.with_name("dangling")
    dangling.symlink_to("nowhere")
    with pytest.raises(UserError, match="it exists"):
        check_outputs([dangling])


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/dev/null", "not a regular file"),
        ("pipe", "not a regular file"),
        (".", "a folder"),
        ("missing/file", "No such file"),
        ("input.bin/file", "Not a directory"),
        ("x" * 5000, "File name too long"),
        ("x" * 5000 + "/file", "File name too long"),
        ("/proc/file", "cannot write"),
    ],
)
def test_places_that_cannot_be_written(source: Path, name: str, problem: str, force: bool):
    os.mkfifo(source.parent / "pipe")
    path = source.parent / name
    with pytest.raises(UserError, match=problem), atomic_output(path):
        raise AssertionError("the output must not be opened")
    if len(path.name) < 5000:
        with pytest.raises(UserError, match=problem):
            check_outputs([path], force=force)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_remove_temporary_files(source: Path, number: signal.Signals):
    def write() -> None:
        with atomic_output(source) as temporary:
            temporary.write_text("incomplete")
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(SystemExit) as exit_request:
        write()
    assert exit_request.value.code == 128 + number
    assert os.listdir(source.parent) == [source.name]
    assert source.read_text() == "precious"
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_second_signal_does_not_interrupt_the_cleaning_up():
    cleaned = []

    def work() -> None:
        with unwinding_on_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGHUP)
                cleaned.append(True)

    with pytest.raises(SystemExit):
        work()
    assert cleaned
