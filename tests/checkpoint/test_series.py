"""The choice among checkpoints of both kinds, compared with a choice by definition, and the removal of checkpoints."""

import errno
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.run_folders import write_checkpoint

from maskmoe.checkpoint import integrity, series
from maskmoe.checkpoint.integrity import Damage, Unfinished, check_content, iteration_of
from maskmoe.checkpoint.series import (
    TRACKER,
    checkpoint_path,
    choose_checkpoint,
    locate_checkpoint,
    read_tracker,
    remove_old_checkpoints,
    saved_iterations,
)
from maskmoe.command_line import prune_checkpoints
from maskmoe.errors import UserError

STATES = ("sound", "damaged", "unfinished", "missing")
PERSISTENT, LOCAL = "checkpoints", "local"


@dataclass(frozen=True)
class Folders:
    """Checkpoints of both kinds: the state of each by its kind and iteration, and the persistent tracker file."""

    states: dict[tuple[str, int], str]
    tracked: int | str | None
    root: Path

    def path(self, kind: str, iteration: int) -> Path:
        return checkpoint_path(self.root / kind, iteration)

    def check(self, checkpoint: Path) -> None:
        state = self.states.get((checkpoint.parent.name, iteration_of(checkpoint) or 0), "missing")
        if state == "unfinished":
            raise Unfinished(checkpoint, state)
        if state != "sound":
            raise Damage(checkpoint, state)

    def choose(self, step: int | None = None) -> Path | None:
        return choose_checkpoint(self.root / PERSISTENT, step, self.check, self.root / LOCAL).checkpoint

    def expected(self, step: int | None = None) -> Path | None:
        """Return the newest sound checkpoint that the tracker file does not rule out."""
        sound = [
            (iteration, kind == PERSISTENT)
            for (kind, iteration), state in self.states.items()
            if state == "sound" and step in (None, iteration)
            if kind == LOCAL or step is not None or not isinstance(self.tracked, int) or iteration <= self.tracked
        ]
        if not sound:
            return None
        iteration, is_persistent = max(sound)
        return self.path(PERSISTENT if is_persistent else LOCAL, iteration)


@st.composite
def folders(draw, root):
    states = draw(
        st.dictionaries(st.tuples(st.sampled_from([PERSISTENT, LOCAL]), st.integers(1, 5)), st.sampled_from(STATES))
    )
    tracked = draw(st.sampled_from([None, "unusable", 1, 2, 3, 4, 5]))
    return Folders(states, tracked, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("series")


def write(folders: Folders) -> None:
    for kind in (PERSISTENT, LOCAL):
        folder = folders.root / kind
        if folder.exists():
            for path in folder.iterdir():
                path.rmdir() if path.is_dir() else path.unlink()
        folder.mkdir(exist_ok=True)
    for (kind, iteration), state in folders.states.items():
        if state != "missing":
            folders.path(kind, iteration).mkdir()
    if folders.tracked is not None:
        (folders.root / PERSISTENT / TRACKER).write_text(str(folders.tracked))


@given(data=st.data(), step=st.sampled_from([None, 1, 3, 5]))
def test_the_newest_sound_checkpoint_of_both_kinds_is_chosen(root, data, step):
    of_run = data.draw(folders(root))
    write(of_run)
    expected = of_run.expected(step)
    if expected is not None:
        assert of_run.choose(step) == expected
        return
    # Nothing is sound: the run starts from the beginning only if no save was ever finished.
    was_saved = of_run.tracked is not None or step is not None or "damaged" in of_run.states.values()
    if was_saved:
        with pytest.raises(UserError, match="holds no sound checkpoint"):
            of_run.choose(step)
    else:
        assert of_run.choose(step) is None


def test_a_released_checkpoint_is_older_than_non_persistent_ones(root):
    of_run = Folders({(LOCAL, 1): "sound", (PERSISTENT, 0): "sound"}, "release", root)
    write(of_run)
    assert of_run.choose() == of_run.path(LOCAL, 1)
    del of_run.states[LOCAL, 1]
    assert of_run.choose() == root / PERSISTENT / "release"


def test_pruning_reports_a_checkpoint_that_cannot_be_removed(tmp_path, monkeypatch, capsys):
    for iteration in (1, 2, 3, 4):
        write_checkpoint(tmp_path, iteration)
    unlink, protected = os.unlink, [(checkpoint_path(tmp_path, iteration)) for iteration in (2, 3)]
    inodes = [(folder / "__0_0.distcp").stat().st_ino for folder in protected]

    def refuse(path, *, dir_fd=None):
        if os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino in inodes:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(sys, "argv", ["maskmoe prune", "--load", str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(UserError) as error:
            prune_checkpoints.main()
    assert str(error.value).startswith(f"cannot remove all files of {protected[1]}; ")
    assert capsys.readouterr().out == f"removed  {checkpoint_path(tmp_path, 1)}\n"
    assert saved_iterations(tmp_path) == [4, 3, 2]
    prune_checkpoints.main()
    assert saved_iterations(tmp_path) == [4]


def test_pruning_counts_checkpoints_whose_content_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content of no more checkpoints than needed is read, and of each one only once."""
    for iteration in (1, 2, 3, 4, 5):
        write_checkpoint(tmp_path, iteration)
    for iteration in (3, 5):
        (checkpoint_path(tmp_path, iteration) / "__0_0.distcp").write_bytes(bytes(999) + b"\1")
    check = Mock(wraps=check_content)
    monkeypatch.setattr(integrity, "check_content", check)
    monkeypatch.setattr(sys, "argv", ["maskmoe prune", "--load", str(tmp_path), "--keep-last-checkpoints", "2"])
    prune_checkpoints.main()
    assert saved_iterations(tmp_path) == [5, 4, 3, 2]
    assert [iteration_of(call.args[0]) for call in check.mock_calls] == [5, 4, 3, 2]


def test_no_checkpoint_is_checked_if_there_are_none_to_remove(tmp_path: Path) -> None:
    """All ranks wait meanwhile; checkpoints later than `newest` do not count."""
    for iteration in (1, 2, 3):
        write_checkpoint(tmp_path, iteration)
    assert remove_old_checkpoints(tmp_path, keep=2, newest=2, check=Mock(side_effect=AssertionError)) == []


def test_kept_checkpoint_is_on_the_disk_before_old_ones_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, kept = (write_checkpoint(tmp_path, iteration) for iteration in (1, 2))
    events = []
    monkeypatch.setattr(series, "sync_to_disk", lambda path: events.append(("synchronize", path)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: events.append(("remove", path)))
    remove_old_checkpoints(tmp_path, keep=1)
    assert events.pop() == ("remove", old)
    assert set(events) == {
        ("synchronize", path)
        for path in (kept / "integrity.json", kept / "metadata.json", kept / ".metadata", kept, tmp_path)
    }


def test_folder_with_the_name_of_a_checkpoints_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".metadata").mkdir()
    newest = write_checkpoint(tmp_path, 2)
    assert locate_checkpoint(tmp_path) == newest


def test_tracker_of_odd_bytes(tmp_path: Path) -> None:
    tracker = tmp_path / TRACKER
    for content in ("9" * 5000, "٣", "\0", "../x"):
        tracker.write_text(content)
        assert read_tracker(tmp_path) is None
    tracker.write_text("9" * 90)
    assert read_tracker(tmp_path) == int("9" * 90)
    tracker.unlink()
    os.mkfifo(tracker)
    assert read_tracker(tmp_path) is None
    (tmp_path / "iter_٣").mkdir()
    assert saved_iterations(tmp_path) == []
