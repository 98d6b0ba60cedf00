"""The status names the faults of checkpoints, and the checkpoint that a restart would load."""

import shutil

import pytest
from support.run_folders import write_checkpoint

from maskmoe.run_status import checkpoints as module
from maskmoe.run_status.checkpoints import find_checkpoints, read_checkpoints


def read(folder, frequent=None, verify=False):
    return read_checkpoints(folder, frequent, verify)


def states(checkpoints):
    return {each.iteration: (each.soundness, each.fault) for each in checkpoints.saved}


@pytest.fixture
def folder(tmp_path):
    for iteration in (10, 20):
        write_checkpoint(tmp_path, iteration)
    return tmp_path


def test_faults_are_named(folder):
    for iteration in (30, 40, 50):
        write_checkpoint(folder, iteration)
    (folder / "iter_0000050" / "metadata.json").unlink()
    (folder / "iter_0000040" / "__0_0.distcp").write_bytes(bytes(999))
    (folder / "iter_0000030" / ".metadata").unlink()
    checkpoints = read(folder)
    assert states(checkpoints) == {
        50: ("unfinished", "was not finished: it has no metadata.json"),
        40: ("damaged", "__0_0.distcp has 999 of 1000 bytes"),
        30: ("damaged", ".metadata is missing"),
        20: ("complete", ""),
        10: ("complete", ""),
    }
    assert checkpoints.next_start == folder / "iter_0000020"
    assert [each.iteration for each in checkpoints.saved] == [50, 40, 30, 20, 10]
    newest = checkpoints.saved[3]
    assert newest.size == sum(path.stat().st_size for path in newest.path.iterdir())
    shutil.rmtree(folder / "iter_0000020")
    shutil.rmtree(folder / "iter_0000010")
    checkpoints = read(folder)
    assert checkpoints.next_start is None
    assert "holds no sound checkpoint" in checkpoints.problem


def test_flipped_byte_is_found_by_verification(folder):
    (folder / "iter_0000020" / "__0_0.distcp").write_bytes(bytes(999) + b"1")
    assert states(read(folder))[20] == ("complete", "")
    fault = "__0_0.distcp does not have the content that was saved"
    checkpoints = read(folder, verify=True)
    assert states(checkpoints) == {20: ("damaged", fault), 10: ("verified", "")}
    assert checkpoints.next_start == folder / "iter_0000010"


def test_non_persistent_checkpoint_may_be_the_next_start(folder):
    frequent = write_checkpoint(folder / "non_persistent", 25)
    assert read(folder, frequent.parent).next_start == frequent
    assert read(folder).next_start == folder / "iter_0000020"
    (frequent / "metadata.json").unlink()
    assert read(folder, frequent.parent).next_start == folder / "iter_0000020"


def test_checkpoints_may_vanish_while_they_are_read(folder, monkeypatch):
    """A checkpoint is removed right after it was found."""

    def find(_):
        shutil.rmtree(folder / "iter_0000020", ignore_errors=True)
        return [20, 10]

    monkeypatch.setattr(module, "saved_iterations", find)
    assert [each.iteration for each in read(folder).saved] == [10]


def test_folder_of_the_checkpoints(tmp_path):
    save = tmp_path / "elsewhere"
    assert find_checkpoints(tmp_path, None) is None
    for folder in (save, tmp_path, tmp_path / "checkpoints"):
        write_checkpoint(folder, 5)
        assert find_checkpoints(tmp_path, save) == folder
