"""The run folder, and its journal, which keeps all entries and survives unfinished and foreign lines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from maskmoe.files import run_folder as module
from maskmoe.files.run_folder import JOURNAL, Entry, Journal, Kind, read_journal, run_folder

WRITE = """
import os, pathlib, socket, sys
os.getpid, socket.gethostname = lambda: 7, lambda: "node"
from maskmoe.files.run_folder import Journal, Kind
journal = Journal(pathlib.Path(sys.argv[1]))
journal.write(Kind.WARNED, f"first of {sys.argv[2]}")
journal.write(Kind.WARNED, f"second of {sys.argv[2]}")
"""
ENTRY = {"kind": "saved", "text": "saved", "time": 1.0, "host": "a", "iteration": 7, "facts": {"seconds": 0.5}}
JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner), max_leaves=4)


def test_containers_with_equal_names_and_process_ids_write_to_files_of_their_own(tmp_path: Path):
    for process in "ab":
        subprocess.run([sys.executable, "-c", WRITE, str(tmp_path), process], check=True, timeout=60)
    assert len(list((tmp_path / "journal").glob("node-7-*.jsonl"))) == 2
    assert [entry.text for entry in read_journal(tmp_path)] == [
        "first of a",
        "second of a",
        "first of b",
        "second of b",
    ]


def test_entries_are_read_as_they_were_written(tmp_path):
    Journal(tmp_path).write(Kind.STARTED, "2 ranks train", ranks=2)
    Journal(tmp_path).write(Kind.SAVED, "saved", 20, seconds=0.5, is_local=False)
    assert [(entry.kind, entry.text, entry.iteration, dict(entry.facts)) for entry in read_journal(tmp_path)] == [
        (Kind.STARTED, "2 ranks train", None, {"ranks": 2}),
        (Kind.SAVED, "saved", 20, {"seconds": 0.5, "is_local": False}),
    ]


def test_journal_that_cannot_be_written_loses_entries_only(tmp_path):
    (tmp_path / JOURNAL).write_text("a file where the folder should be")
    Journal(tmp_path).write(Kind.SAVED, "saved")
    Journal(None).write(Kind.SAVED, "saved")
    assert read_journal(tmp_path) == []


def test_newest_entries_of_a_long_journal_are_read(tmp_path, monkeypatch):
    journal_file = tmp_path / JOURNAL / "a-1.jsonl"
    journal_file.parent.mkdir()
    lines = [json.dumps(ENTRY | {"iteration": iteration, "time": float(iteration)}) for iteration in range(100)]
    journal_file.write_text("\n".join(lines))
    monkeypatch.setattr(module, "_MAX_BYTES", 3 * len(lines[-1]) + 10)
    assert [entry.iteration for entry in read_journal(tmp_path)] == [97, 98, 99]


@example({"iteration": float("inf")}, b"")
@given(st.dictionaries(st.sampled_from([*ENTRY, "other"]), JSON), st.binary(max_size=40))
def test_damaged_lines_are_skipped(tmp_path_factory, changes, noise):
    folder = tmp_path_factory.mktemp("run") / JOURNAL
    folder.mkdir()
    lines = [json.dumps(ENTRY | changes).encode(), noise, json.dumps(ENTRY).encode(), json.dumps(ENTRY).encode()[:-9]]
    (folder / "a-1.jsonl").write_bytes(b"\n".join(lines))
    assert Entry(Kind.SAVED, "saved", 1.0, "a", 7, {"seconds": 0.5}) in read_journal(folder.parent)


@pytest.mark.parametrize(
    ("save", "tensorboard", "variable", "expected"),
    [
        ("/run/save", None, "/other", "/other"),
        ("/r/checkpoints", None, None, "/r"),
        ("/r/checkpoints", "/t/tensorboard", None, "/r"),
        ("/r/save", "/r/tensorboard", None, "/r/save"),
        (None, "/r/tensorboard", None, "/r"),
        (None, "/r/events", None, "/r/events"),
        (None, None, None, "None"),
    ],
)
def test_run_folder(save, tensorboard, variable, expected, monkeypatch):
    monkeypatch.delenv("MASKMOE_RUN_DIR", raising=False)
    if variable is not None:
        monkeypatch.setenv("MASKMOE_RUN_DIR", variable)
    assert str(run_folder(save, tensorboard)) == expected
