"""The journal of a run keeps all entries of all processes, and survives unfinished and foreign lines."""

import json
import os
import subprocess
import sys

from hypothesis import example, given
from hypothesis import strategies as st

from maskmoe.launch import journal
from maskmoe.launch.journal import FOLDER, Entry, Journal, Kind, read_journal

ENTRY = {"kind": "saved", "text": "saved", "time": 1.0, "host": "a", "iteration": 7, "facts": {"seconds": 0.5}}
JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner), max_leaves=4)


def test_entries_of_several_processes_are_read_in_the_order_of_their_times(tmp_path):
    own = Journal(tmp_path)
    own.write(Kind.STARTED, "2 ranks train", ranks=2)
    program = "import sys, pathlib; from maskmoe.launch.journal import *; "
    program += "Journal(pathlib.Path(sys.argv[1])).write(Kind.SAVED, 'saved', 20, seconds=0.5, is_local=False)"
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    own.write(Kind.ENDED, "the run failed", 23, exit_code=1)
    entries = read_journal(tmp_path)
    assert [(entry.kind, entry.text, entry.iteration, dict(entry.facts)) for entry in entries] == [
        (Kind.STARTED, "2 ranks train", None, {"ranks": 2}),
        (Kind.SAVED, "saved", 20, {"seconds": 0.5, "is_local": False}),
        (Kind.ENDED, "the run failed", 23, {"exit_code": 1}),
    ]
    assert len(list((tmp_path / FOLDER).iterdir())) == 2


def test_journal_that_cannot_be_written_loses_entries_only(tmp_path):
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    Journal(tmp_path).write(Kind.SAVED, "saved")
    Journal(None).write(Kind.SAVED, "saved")
    assert read_journal(tmp_path) == []


def test_newest_entries_of_a_long_journal_are_read(tmp_path, monkeypatch):
    journal_file = tmp_path / FOLDER / "a-1.jsonl"
    journal_file.parent.mkdir()
    lines = [json.dumps(ENTRY | {"iteration": iteration, "time": float(iteration)}) for iteration in range(100)]
    journal_file.write_text("\n".join(lines))
    monkeypatch.setattr(journal, "_MAX_BYTES", 3 * len(lines[-1]) + 10)
    assert [entry.iteration for entry in read_journal(tmp_path)] == [97, 98, 99]


@example({"iteration": float("inf")}, b"")
@given(st.dictionaries(st.sampled_from([*ENTRY, "other"]), JSON), st.binary(max_size=40))
def test_damaged_lines_are_skipped(tmp_path_factory, changes, noise):
    folder = tmp_path_factory.mktemp("run") / FOLDER
    folder.mkdir()
    lines = [json.dumps(ENTRY | changes).encode(), noise, json.dumps(ENTRY).encode(), json.dumps(ENTRY).encode()[:-9]]
    (folder / "a-1.jsonl").write_bytes(b"\n".join(lines))
    assert Entry(Kind.SAVED, "saved", 1.0, "a", 7, {"seconds": 0.5}) in read_journal(folder.parent)
