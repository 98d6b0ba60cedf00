"""Processes that write to the journal of one run."""

import subprocess
import sys
from pathlib import Path

from maskmoe.launch.journal import read_journal

WRITE = """
import os, pathlib, socket, sys
os.getpid, socket.gethostname = lambda: 7, lambda: "node"
from maskmoe.launch.journal import Journal, Kind
journal = Journal(pathlib.Path(sys.argv[1]))
journal.write(Kind.WARNED, f"first of {sys.argv[2]}")
journal.write(Kind.WARNED, f"second of {sys.argv[2]}")
"""


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
