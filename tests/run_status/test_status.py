"""The status of a run shows what the files of its folder hold, and never changes them."""

import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from support.paths import ROOT
from support.run_folders import write_arguments, write_checkpoint, write_events, write_journal
from support.system import held_lock
from torch.utils.tensorboard import SummaryWriter

from maskmoe.errors import UserError
from maskmoe.files.run_folder import Entry, Kind
from maskmoe.processes.folder_lock import locked_folder
from maskmoe.run_status.events import read_events
from maskmoe.run_status.report import render_text
from maskmoe.run_status.status import Progress, RunArguments, read_liveness, read_status


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


def test_relative_folder_of_non_persistent_checkpoints_is_that_of_the_start(run, tmp_path):
    frequent = write_checkpoint(tmp_path / "frequent", 25)
    folders = {"non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": "frequent"}
    write_arguments(run, f"# Relative paths are relative to {tmp_path}", **folders)
    assert read_status(run).checkpoints.next_start == frequent


@pytest.mark.parametrize("load", ["other", "link"])
def test_restart_loads_from_load(run, tmp_path, load):
    """Every start loads from `--load` if it is another folder than `--save`; a link to `--save` is no other folder."""
    (tmp_path / "link").symlink_to(run / "checkpoints")
    write_arguments(run, f"# Relative paths are relative to {tmp_path}", load=load, save=run / "checkpoints")
    expected = "a restart loads iter_0000020" if load == "link" else f"every start loads from {tmp_path / load}"
    assert f"{expected}\n" in render_text(read_status(run))


def test_arguments_with_thousands_of_datasets_are_read(tmp_path):
    write_arguments(tmp_path, data_path=[f"/data/{'x' * 100}{number}_text_document" for number in range(20_000)])
    assert RunArguments.read(tmp_path).number("train_iters") == 40


@pytest.mark.parametrize(("name", "end"), [("null \0", ""), ("x" * 300, ""), ("save", "\0")], ids=ascii)
def test_folders_that_cannot_be_read_are_left_out(run, tmp_path, name, end):
    folders = dict.fromkeys(("save", "tensorboard_dir", "non_persistent_global_ckpt_dir"), name)
    write_arguments(
        tmp_path, f"# Relative paths are relative to {tmp_path}{end}", **folders, non_persistent_ckpt_type="global"
    )
    assert read_status(tmp_path).checkpoints.folder is None
    (tmp_path / "args.yaml").replace(run / "args.yaml")
    assert read_status(run).progress.iteration == 20


@pytest.mark.parametrize("wall_time", [math.nan, math.inf, -1e300, 1e17])
def test_impossible_times_of_events_are_not_shown(tmp_path, wall_time):
    write_arguments(tmp_path)
    with SummaryWriter(tmp_path / "tensorboard") as writer:
        for step, when in enumerate((time.time(), wall_time, wall_time), start=1):
            writer.add_scalar("lm loss", 1.0, step, walltime=when)
    write_journal(tmp_path, (Kind.STARTED, time.time(), "2 ranks train", 0, {}))  # so that the run seems to run
    assert "iteration   3 of 40\n" in render_text(read_status(tmp_path))


def test_json_has_all_parts(run):
    content = json.loads(json.dumps(read_status(run).to_json(), allow_nan=False))
    assert content.keys() == {
        *("name", "read", "liveness", "progress", "history", "warnings", "checkpoints"),
    }
    assert (content["progress"]["iteration"], content["progress"]["seconds_left"]) == (20, pytest.approx(5))
    assert content["liveness"]["state"] == "ended"
    assert content["checkpoints"]["next_start"] == str(run / "checkpoints" / "iter_0000020")
    assert content["history"][0]["facts"] == {"ranks": 2}


def test_control_characters_do_not_reach_the_terminal(run):
    write_journal(run, (Kind.WARNED, time.time(), "a spike of the loss\x1b[31m\x07", 7, {}), name="b-1")
    text = render_text(read_status(run))
    assert "a spike of the loss" in text
    assert not {"\x1b", "\x07"} & set(text)


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


def test_run_is_read_without_torch(tmp_path):
    write_events(tmp_path / "tensorboard", last=1_000)
    for iteration in range(100, 1_001, 100):
        write_checkpoint(tmp_path / "checkpoints", iteration)
    program = (
        "import sys; from maskmoe.command_line import status\n"
        "sys.argv = ['status', sys.argv[1]]; status.main()\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    words = [sys.executable, "-c", program, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    text = subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stdout
    assert "iteration   1,000\n" in text
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


# How far a run is


@pytest.fixture
def measure(tmp_path):
    """Return the progress of a run that has logged 20 iterations of 0.25 s."""
    write_events(tmp_path / "tensorboard")
    write_arguments(tmp_path)
    return lambda end=None: Progress.of(read_events(tmp_path / "tensorboard"), end, RunArguments.read(tmp_path))


def test_progress_of_event_files(measure):
    progress = measure()
    assert (progress.iteration, progress.total, progress.loss) == (20, 40, 0.25)
    assert (progress.held_out_iteration, progress.held_out_loss) == (20, pytest.approx(0.3))
    assert progress.seconds_per_iteration == pytest.approx(0.25)
    assert progress.tokens_per_second == pytest.approx(16 * 32 * 4)
    assert progress.seconds_left == pytest.approx(5)


def test_speed_is_that_of_the_newest_iterations_of_a_long_start(tmp_path):
    """The batches have grown, and the iterations take longer."""
    steps = range(1, 3001)
    is_new = [step > 2800 for step in steps]
    times = np.cumsum([4.0 if new else 1.0 for new in is_new])
    writer = SummaryWriter(tmp_path)
    for step, new, seconds in zip(steps, is_new, times, strict=True):
        writer.add_scalar("lm loss", 1.0, step, walltime=seconds)
        writer.add_scalar("batch-size", 64 if new else 16, step, walltime=seconds)
    writer.close()
    write_arguments(tmp_path)
    progress = read_status(tmp_path).progress
    assert progress.seconds_per_iteration == pytest.approx(4.0)
    assert progress.tokens_per_second == pytest.approx(64 * 32 / 4.0)


def test_iteration_is_that_of_the_newest_loss_of_any_text(tmp_path):
    """With --tensorboard-log-interval 50, the last iterations have no loss of training."""
    writer = SummaryWriter(tmp_path)
    for tag, step in (("lm loss", 100), ("lm loss validation", 120)):
        writer.add_scalar(tag, 1.0, step)
    writer.close()
    write_arguments(tmp_path)
    assert read_status(tmp_path).progress.iteration == 120


def test_last_loss_is_that_of_the_console(measure):
    """With a log interval above 1, Megatron prints a mean."""
    for loss, expected in ((0.5, 0.5), ("damaged", 0.25)):
        assert measure(Entry(Kind.ENDED, "", 1.0, "h", facts={"loss": loss})).loss == expected


def test_last_iteration_is_that_of_the_end(measure):
    """With a --tensorboard-log-interval above 1, the last iterations may not be in the event files."""
    assert measure(Entry(Kind.ENDED, "", 1.0, "h", iteration=25)).iteration == 25


def test_time_between_two_starts_is_not_counted(tmp_path):
    write_events(tmp_path, start=1000)
    write_events(tmp_path, first=21, last=30, start=90_000)
    progress = Progress.of(read_events(tmp_path), None, RunArguments())
    assert progress.seconds_per_iteration == pytest.approx(0.25)


def test_arguments_of_a_run(tmp_path):
    assert RunArguments.read(tmp_path) == RunArguments()
    folder = f"# Relative paths are relative to {tmp_path}"
    (tmp_path / "a").mkdir()
    write_arguments(tmp_path, folder, save="a", tensorboard_dir=tmp_path, load=None, lr="0.1", layers="9" * 5000)
    arguments = RunArguments.read(tmp_path)
    paths = {name: arguments.path(name) for name in ("save", "tensorboard_dir", "load")}
    assert paths == {"save": tmp_path / "a", "tensorboard_dir": tmp_path, "load": None}
    assert [arguments.number(name) for name in ("train_iters", "lr", "layers", "other")] == [40, None, None, None]


# Whether a run is alive

UNDER_WAY = Progress(iteration=20, total=40, seconds_per_iteration=1.0)
COMPLETE = Progress(iteration=40, total=40)


def entry(kind, ago, text="an entry"):
    return Entry(kind, text, time.time() - ago, "host")


def test_running_killed_and_ended_runs(tmp_path):
    """The status sees the lock of another process, and what a killed process has left behind."""
    started = [entry(Kind.STARTED, 5000)]
    with held_lock(tmp_path) as process:
        liveness = read_liveness(tmp_path, started, time.time(), UNDER_WAY)
        assert liveness.state == "running"
        assert f"process {process.pid} on host {os.uname().nodename}" in liveness.reason
    liveness = read_liveness(tmp_path, started, time.time(), UNDER_WAY)
    assert liveness.state == "lost"
    ended = [*started, entry(Kind.ENDED, 1, "rank 1 was ended by signal 9")]
    assert read_liveness(tmp_path, ended, time.time(), UNDER_WAY).reason == "rank 1 was ended by signal 9"
    with locked_folder(tmp_path):
        pass
    killed = [*ended, entry(Kind.LAUNCHED, 5000)]
    assert read_liveness(tmp_path, killed, time.time() - 5000, UNDER_WAY).state == "lost"
    assert read_liveness(tmp_path, [], time.time(), UNDER_WAY).state == "ended"
    assert read_liveness(tmp_path, [], time.time(), COMPLETE).state == "finished"


# The newest entry of the journal, its exit code, whether a lock exists, and the state of a run whose last iteration is
# logged.
LAST_ITERATION_LOGGED = [
    (Kind.ENDED, 0, False, "finished"),
    (Kind.ENDED, 0, True, "finished"),  # a conversion was killed later
    (Kind.ENDED, 1, False, "ended"),
    (Kind.ENDED, 1, True, "ended"),
    (Kind.STARTED, None, True, "lost"),
    (Kind.STARTED, None, False, "lost"),
    (Kind.NODES, None, False, "finished"),
]


@pytest.mark.parametrize(("kind", "exit_code", "is_locked", "state"), LAST_ITERATION_LOGGED)
def test_run_may_fail_in_the_save_of_its_last_iteration(tmp_path, kind, exit_code, is_locked, state):
    newest = Entry(kind, "an entry", time.time() - 5000, "host", facts={"exit_code": exit_code})
    if is_locked:
        with held_lock(tmp_path):
            pass
    assert read_liveness(tmp_path, [newest], time.time() - 5000, COMPLETE).state == state


# A run without checkpoints, and so without a lock: its history, the age of what it wrote, and its state.
WITHOUT_LOCK = [
    ([], 10, "running", "it wrote something a short time ago"),
    ([], 5000, "unknown", "it has no lock"),
    ([], None, "unknown", "it has no lock"),
    ([Kind.LAUNCHED], 10, "running", "its journal has no end, and it wrote something a short time ago"),
    ([Kind.STARTED, Kind.WARNED], 10, "running", "its journal has no end, and it wrote something a short time ago"),
    ([Kind.STARTED], 5000, "lost", "its journal has no end, but it has written nothing for a while"),
    ([Kind.STARTED, Kind.ENDED], 10, "ended", "an entry"),
    ([Kind.STARTED, Kind.NODES], 5000, "running", "its nodes meet again: an entry"),
]


@pytest.mark.parametrize(("kinds", "age", "state", "reason"), WITHOUT_LOCK)
def test_run_without_a_lock(kinds, age, state, reason):
    last_sign = None if age is None else time.time() - age
    liveness = read_liveness(None, [entry(kind, 10) for kind in kinds], last_sign, UNDER_WAY)
    assert (liveness.state, liveness.reason) == (state, reason)


def test_slow_run_may_be_silent_for_longer():
    slow = Progress(iteration=20, total=40, seconds_per_iteration=600.0)
    assert read_liveness(None, [entry(Kind.STARTED, 9000)], time.time() - 5000, slow).state == "running"
