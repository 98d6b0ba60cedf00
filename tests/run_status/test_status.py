"""The status of a run shows what the files of its folder hold, and never changes them."""

import json
import os
import subprocess
import sys
import time

import pytest
from support.paths import ROOT
from support.run_folders import write_arguments, write_checkpoint, write_events, write_journal
from torch.utils.tensorboard import SummaryWriter

from maskmoe.errors import UserError
from maskmoe.files.run_folder import Kind
from maskmoe.run_status.status import LayerLoad, read_status
from maskmoe.run_status.text import render_text


def test_newest_load_of_each_layer(run):
    loads = [
        LayerLoad(layer, 20, pytest.approx(1.2 + layer), pytest.approx(1 + layer / 10), None) for layer in range(3)
    ]
    assert list(read_status(run).loads) == loads


def test_stale_load_of_ranks_is_not_shown(tmp_path):
    """After a start on one rank, which logs no load of ranks."""
    write_events(tmp_path / "tensorboard", last=4, start=1000)
    with SummaryWriter(tmp_path / "tensorboard") as writer:
        writer.add_scalar("moe/expert_load_max_over_mean_layer_0", 2.5, 5)
    assert read_status(tmp_path).loads[0] == LayerLoad(0, 5, 2.5, None, None)


def test_history_and_warnings_are_those_of_the_journal(run):
    status = read_status(run)
    texts = ["2 ranks train on 1 node", "node b was lost", "the run failed", "1 rank trains", "stopped by SIGTERM"]
    assert [entry.text for entry in status.history] == texts
    assert [entry.text for entry in status.warnings] == ["the loss of iteration 7 is a spike"]
    assert (status.liveness.state, status.liveness.reason) == ("ended", "stopped by SIGTERM")
    text = render_text(status)
    for part in (*texts, "iteration 7: the loss of iteration 7 is a spike", "a restart loads iter_0000020", "20 of 40"):
        assert part in text, part
    assert "ETA" not in text


def test_folders_elsewhere_are_found_by_the_arguments(tmp_path):
    run = tmp_path / "run"
    write_events(tmp_path / "tb")
    write_checkpoint(tmp_path / "save", 5)
    write_arguments(run, tensorboard_dir=tmp_path / "tb", save=tmp_path / "save")
    status = read_status(run)
    assert (status.progress.iteration, status.checkpoints.folder) == (20, tmp_path / "save")


def test_json_has_all_parts(run):
    (run / "checkpoints" / ".run.lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    content = json.loads(json.dumps(read_status(run).to_json(), allow_nan=False))
    assert content.keys() == {
        *("name", "read", "liveness", "progress", "loads", "history", "warnings", "checkpoints"),
    }
    assert (content["progress"]["iteration"], content["progress"]["seconds_left"]) == (20, pytest.approx(5))
    assert content["liveness"]["state"] == "running"
    assert content["checkpoints"]["next_start"] == str(run / "checkpoints" / "iter_0000020")
    assert content["history"][0]["facts"] == {"ranks": 2}


def test_control_characters_do_not_reach_the_terminal(run):
    write_journal(run, (Kind.WARNED, time.time(), "a spike of the loss\x1b[31m\x07", 7, {}), name="b-1")
    text = render_text(read_status(run))
    assert "a spike of the loss" in text
    assert text.isprintable() or not {"\x1b", "\x07"} & set(text)


def test_run_that_has_only_started(tmp_path):
    write_arguments(tmp_path)
    assert "nothing has been logged yet" in render_text(read_status(tmp_path))


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["a.log"], ["iter_x/file"]])
def test_folder_without_a_run_is_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hello\n")
    with pytest.raises(UserError, match="is not the folder of a run"):
        read_status(tmp_path)


def test_large_run_is_read_without_torch(tmp_path):
    write_events(tmp_path / "tensorboard", last=5_000)
    for iteration in range(500, 5_001, 500):
        write_checkpoint(tmp_path / "checkpoints", iteration)
    program = (
        "import sys; from maskmoe.command_line import status\n"
        "sys.argv = ['status', sys.argv[1]]; status.main()\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    words = [sys.executable, "-c", program, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    text = subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stdout
    assert "iteration   5,000\n" in text
    assert "checkpoints: 10 with" in text


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(b"\xff\x00{[1e999" * 20),
    "huge numbers": lambda path: path.write_bytes(
        path.read_bytes().replace(b"1", b"9" * 5000).replace(b"2", b"-1e999")
    ),
    "gone": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_of_a_run_are_read_without_a_traceback(run, damage):
    (run / "checkpoints" / ".run.lock").write_text("{}")
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        damage(path)
        status = read_status(run)
        render_text(status).encode()
        json.dumps(status.to_json(), allow_nan=False)


JOURNALS = [
    *({"time": 1e300}, {"time": float("nan")}, {"text": "\ud800 <script>"}, {"iteration": 1 << 60}),
    *({"facts": {"first": "x", "loss": "x"}}, {"facts": {"first": float("nan"), "loss": float("inf")}}),
]


@pytest.mark.parametrize("entry", JOURNALS, ids=str)
@pytest.mark.parametrize("kind", ["warned", "ended", "other"])
def test_any_journal_is_shown(run, entry, kind):
    base = {"kind": kind, "text": "a", "time": 1.0, "host": "h", "iteration": 1, "facts": {}}
    (path,) = (run / "journal").iterdir()
    path.write_text(json.dumps(base | entry))
    status = read_status(run)
    assert "{{" not in render_text(status)
    json.dumps(status.to_json(), allow_nan=False).encode()
