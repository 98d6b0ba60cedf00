"""The choice among the checkpoints of a run, compared with a choice by definition, and their removal."""

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
from support.runs import write_checkpoint

from maskmoe.checkpoint import integrity, series
from maskmoe.checkpoint.integrity import MANIFEST_FILE, Manifest, check_content, iteration_of
from maskmoe.checkpoint.reading import CheckpointError, UnfinishedCheckpointError
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

STATES = ("intact", "damaged", "unfinished", "missing", "unverified")


@dataclass(frozen=True)
class Series:
    """Checkpoints of a run: the state of each by its iteration, and the content of the tracker file."""

    states: dict[int, str]
    tracked: int | str | None
    folder: Path

    def check(self, checkpoint: Path) -> None:
        state = self.states.get(iteration_of(checkpoint) or 0, "missing")
        if state == "unfinished":
            raise UnfinishedCheckpointError(checkpoint, state)
        if state in ("damaged", "missing"):
            raise CheckpointError(checkpoint, state)

    def choose(self, step: int | None = None) -> Path | None:
        return choose_checkpoint(self.folder, step, self.check).checkpoint

    def expected(self, step: int | None = None) -> Path | None:
        """Return the newest intact checkpoint that the tracker file does not rule out, if possible one with digests."""
        choices = [
            (state == "intact", iteration)
            for iteration, state in self.states.items()
            if state in ("intact", "unverified") and step in (None, iteration)
            if step is not None or not isinstance(self.tracked, int) or iteration <= self.tracked
        ]
        return checkpoint_path(self.folder, max(choices)[1]) if choices else None

    def write(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for iteration, state in self.states.items():
            if state != "missing":
                checkpoint_path(self.folder, iteration).mkdir(parents=True)
                if state in ("intact", "damaged"):
                    Manifest(files={"file": "digest"}).save(checkpoint_path(self.folder, iteration))
        self.folder.mkdir(exist_ok=True)
        if self.tracked is not None:
            (self.folder / TRACKER).write_text(str(self.tracked))


@given(
    states=st.dictionaries(st.integers(1, 5), st.sampled_from(STATES)),
    tracked=st.sampled_from([None, "unusable", 1, 2, 3, 4, 5]),
    step=st.sampled_from([None, 1, 3, 5]),
)
def test_the_newest_intact_checkpoint_is_chosen_and_one_with_digests_before_all_without(
    tmp_path_factory, states, tracked, step
):
    series = Series(states, tracked, tmp_path_factory.getbasetemp() / "series")
    series.write()
    expected = series.expected(step)
    if expected is not None:
        assert series.choose(step) == expected
    # Nothing is intact: the run starts from the beginning only if no save was ever finished.
    elif tracked is not None or step is not None or "damaged" in states.values():
        with pytest.raises(UserError, match="holds no intact checkpoint"):
            series.choose(step)
    else:
        assert series.choose(step) is None


def test_unverified_checkpoint_does_not_outrank_a_verified_one(tmp_path, monkeypatch, capsys):
    """A flipped byte of the newest could not be noticed."""
    for iteration in (1, 2, 3):
        write_checkpoint(tmp_path, iteration)
    newest = checkpoint_path(tmp_path, 3)
    for manifest in (None, Manifest(files={})):
        (newest / MANIFEST_FILE).unlink()
        if manifest is not None:
            manifest.save(newest)
        choice = choose_checkpoint(tmp_path)
        assert choice.iteration == 2
        assert [(fault.checkpoint, fault.fault[:14]) for fault in choice.rejected] == [(newest, "has no digests")]
        with pytest.raises(UserError, match=f"{newest} has no digests.*name its folder: .*iter_0000002"):
            locate_checkpoint(tmp_path)
        assert remove_old_checkpoints(tmp_path, keep=2) == []
        manifest or (newest / MANIFEST_FILE).touch()
    monkeypatch.setattr(sys, "argv", ["maskmoe prune", "--load", str(tmp_path)])
    prune_checkpoints.main()
    assert saved_iterations(tmp_path) == [3, 2]
    assert f"warning: {newest} has no digests" in capsys.readouterr().err


def test_checkpoints_of_megatron_without_digests_are_chosen_and_removed(tmp_path):
    for iteration in (1, 2, 3):
        write_checkpoint(tmp_path, iteration, with_manifest=False)
    assert choose_checkpoint(tmp_path).iteration == 3
    assert remove_old_checkpoints(tmp_path, keep=1) == [checkpoint_path(tmp_path, step) for step in (2, 1)]


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


def test_pruning_counts_checkpoints_whose_content_is_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
