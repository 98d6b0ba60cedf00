"""The status of a run shows what the files of its folder hold, and never changes them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import ROOT
from support.report_pages import Page
from support.run_folders import read_status, write_checkpoint, write_events, write_journal
from support.training_lines import iteration_line, validation_line
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from maskmoe.command_line import status as command
from maskmoe.errors import UserError
from maskmoe.launch.journal import Kind
from maskmoe.run_status.checkpoints import Soundness
from maskmoe.run_status.liveness import State
from maskmoe.run_status.text import WIDTH, render_text

HOLD_LOCK = """
import sys, time
from pathlib import Path
from maskmoe.processes.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def maskmoe_status(monkeypatch, capsys):
    """Run the command, and return what it has printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["maskmoe status", *map(str, arguments)])
        command.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def hold_lock():
    """Start processes that hold the lock of a folder."""
    processes = []

    def hold_lock(folder):
        program = [sys.executable, "-c", HOLD_LOCK, folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        processes.append(process)
        assert process.stdout.readline() == b"locked\n"
        return process

    yield hold_lock
    for process in processes:
        process.kill()
        process.communicate()


def contents(folder):
    """Return the content and the time of the last change of each file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_values_are_those_of_tensorboard(run):
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    status = read_status(run)
    (*_, loss), (*_, held_out) = (accumulator.Scalars(tag) for tag in ("lm loss", "lm loss validation"))
    assert (status.progress.iteration, status.progress.loss) == (loss.step, loss.value)
    assert (status.progress.held_out_iteration, status.progress.held_out_loss) == (held_out.step, held_out.value)
    assert status.progress.total == 40
    assert status.progress.tokens_per_second == 16 * 32 * 4
    assert [load.layer for load in status.loads] == [0, 1, 2]
    for load in status.loads:
        for name in ("expert", "rank"):
            newest = accumulator.Scalars(f"moe/{name}_load_max_over_mean_layer_{load.layer}")[-1]
            assert (load.iteration, getattr(load, name)) == (newest.step, newest.value)
    assert status.curves["lm loss"].means.tolist() == [each.value for each in accumulator.Scalars("lm loss")]


def test_newest_loss_of_a_long_run_is_no_mean(tmp_path):
    write_events(tmp_path / "tensorboard", last=3000)
    status = read_status(tmp_path)
    assert len(status.curves["lm loss"]) < 3000
    assert status.progress.loss == pytest.approx(5 / 3000)


def test_loss_that_is_not_a_number_is_shown(tmp_path):
    (tmp_path / "run.log").write_text("\n".join([iteration_line(1), iteration_line(2, "nan"), validation_line(1)]))
    status = read_status(tmp_path)
    assert "loss        nan" in render_text(status)
    assert "alarm       1 logged values are NaN or infinite" in render_text(status)
    assert status.to_json()["progress"]["loss"] is None


def test_newest_iterations_come_from_the_logs(run):
    """Event files are written from time to time only."""
    (run / "out.log").write_text(
        "\n".join([iteration_line(21, "2.5"), iteration_line(22, "2.25"), validation_line(22)])
    )
    status = read_status(run)
    assert (status.progress.iteration, status.progress.loss, status.progress.total) == (22, 2.25, 40)
    assert (status.progress.held_out_iteration, status.progress.held_out_loss) == (22, 6.663481)
    assert status.progress.tokens_per_second == 16 * 32 * 4
    old = time.time() - 3600
    os.utime(run / "out.log", (old, old))
    assert read_status(run).progress.iteration == 20


def test_arguments_of_the_newest_start_count(run):
    (run / "args.yaml").write_text("# The flags of a run\ntrain-iters: '40'\n\n# train_iters: 50\n# seq_length: 64\n")
    status = read_status(run)
    assert status.progress.total == 50
    assert status.progress.tokens_per_second == 16 * 64 * 4


def test_resumed_run_shows_the_newest_start(tmp_path):
    write_events(tmp_path / "tensorboard", last=20)
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.1000000000.a"))
    write_events(tmp_path / "tensorboard", first=11, last=14)
    status = read_status(tmp_path)
    assert status.progress.iteration == 14
    assert [(start.first_iteration, start.last_iteration) for start in status.starts] == [(1, 20), (11, 14)]
    assert status.curves["lm loss"].steps.tolist() == list(range(1, 15))


def test_stale_load_of_ranks_is_not_shown(tmp_path):
    """After a start on one rank, which logs no load of ranks."""
    write_events(tmp_path / "tensorboard", last=4)
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.1000000000.a"))
    with SummaryWriter(tmp_path / "tensorboard") as writer:
        writer.add_scalar("moe/expert_load_max_over_mean_layer_0", 2.5, 5)
    load = read_status(tmp_path).loads[0]
    assert (load.iteration, load.expert, load.rank) == (5, 2.5, None)


def test_restarts_have_their_causes(run):
    first, second = read_status(run).starts
    assert (first.text, first.exit_code) == ("2 ranks train on 1 node", 1)
    assert first.end == "the run failed with exit code 1; node b was lost"
    assert (second.text, second.end) == ("1 rank trains", "stopped by SIGTERM with exit code 75")
    assert first.last_iteration == 9
    text = render_text(read_status(run))
    assert "iteration 7: the loss of iteration 7 is a spike" in text
    assert "node b was lost" in text


def test_start_without_an_end_was_killed(tmp_path):
    now = time.time()
    started = (Kind.STARTED, now - 5000, "2 ranks train", 0, {"ranks": 2})
    write_journal(tmp_path, started, (Kind.STARTED, now - 4000, "2 ranks train", 0, {"ranks": 2}))
    status = read_status(tmp_path)
    assert [start.end for start in status.starts] == [
        "the processes were killed, or a host failed",
        "",
    ]
    assert status.liveness.state is State.LOST


def test_run_under_torchrun_that_has_released_its_lock_is_ended(tmp_path):
    """Only launchers write the end of a run."""
    write_checkpoint(tmp_path / "checkpoints", 4)
    write_journal(tmp_path, (Kind.STARTED, time.time() - 5000, "2 ranks train", 0, {"ranks": 2}))
    liveness = read_status(tmp_path).liveness
    assert (liveness.state, liveness.reason) == (State.ENDED, "no process holds the lock")


@pytest.mark.parametrize(
    ("end", "failure", "ends"),
    [
        (75, 1, ["stopped on request with exit code 75", "rank 0 failed with exit code 1"]),
        (0, 2, ["complete", "refused with exit code 2"]),
        (None, 1, ["the processes were killed, or a host failed", "rank 0 failed with exit code 1"]),
    ],
)
def test_start_that_fails_before_training_is_a_start_of_its_own(tmp_path, end, failure, ends):
    now = time.time()
    launched = "the launcher starts 2 ranks on 1 node"
    first = [
        (Kind.LAUNCHED, now - 5020, launched, None, {"ranks": 2}),
        (Kind.STARTED, now - 5000, "2 ranks train", 0, {"ranks": 2}),
    ]
    if end is not None:
        first.append((Kind.ENDED, now - 4000, ends[0].partition(" with")[0], 9, {"exit_code": end}))
    # torchrun reports the rank that failed, and then the launcher reports the end.
    second = [
        (Kind.LAUNCHED, now - 500, launched, None, {"ranks": 2}),
        (Kind.ENDED, now - 490, ends[1].partition(" with")[0], None, {"exit_code": failure}),
        (Kind.ENDED, now - 480, "the run failed", None, {"exit_code": failure}),
    ]
    write_journal(tmp_path, *first, *second)
    status = read_status(tmp_path)
    assert [(start.text, start.end) for start in status.starts] == [("2 ranks train", ends[0]), (launched, ends[1])]
    assert [start.began for start in status.starts] == [now - 5000, now - 500]
    assert [start.exit_code for start in status.starts] == [end, failure]
    assert status.liveness.reason == ends[1]
    assert "starts      2" in render_text(status)


def test_launch_and_its_ranks_are_one_start(tmp_path):
    """After a failure, in training or before, torchrun starts the ranks again. The next launch may not train yet."""
    now = time.time()
    launched = (Kind.LAUNCHED, now - 100, "the launcher starts 2 ranks on 1 node", None, {"ranks": 2})
    started = [(Kind.STARTED, now - seconds, f"{seconds} s ago", 0, {"ranks": 2}) for seconds in (90, 70, 30)]
    failed = [(Kind.ENDED, now - seconds, "a rank failed", None, {"exit_code": 1}) for seconds in (80, 60, 20)]
    write_journal(tmp_path, launched, started[0], failed[0], started[1], failed[1], failed[2])
    assert [start.text for start in read_status(tmp_path).starts] == ["90 s ago", "70 s ago"]
    again = (Kind.LAUNCHED, now - 50, "again", None, {"ranks": 2})
    write_journal(tmp_path, launched, failed[0], started[1], failed[1], again, name="a-1")
    status = read_status(tmp_path)
    assert [(start.text, bool(start.end)) for start in status.starts] == [
        ("the launcher starts 2 ranks on 1 node", True),
        ("70 s ago", True),
        ("again", False),
    ]
    assert status.liveness.state is State.RUNNING
    write_journal(tmp_path, launched, failed[0], started[1], failed[1], again, started[2])
    assert [start.text for start in read_status(tmp_path).starts][1:] == ["70 s ago", "30 s ago"]


def test_launchers_of_all_nodes_report_one_end(tmp_path):
    now = time.time()
    started = (Kind.STARTED, now - 50, "4 ranks train on 2 nodes", 0, {"ranks": 4})
    write_journal(tmp_path, started, (Kind.ENDED, now - 20, "node a ended", 5, {"exit_code": 0}))
    write_journal(tmp_path, (Kind.ENDED, now - 19, "node b ended", 5, {"exit_code": 1}), name="b-1")
    (start,) = read_status(tmp_path).starts
    assert (start.exit_code, start.end) == (1, "node b ended with exit code 1")


def test_lost_node_is_the_cause_of_the_next_start(tmp_path):
    """A killed node writes no end; the remaining node starts again."""
    now = time.time()
    write_journal(tmp_path, (Kind.STARTED, now - 100, "4 ranks", 0, {"ranks": 4}))
    lost = (Kind.NODES, now - 60, "a gave no sign of life for 30 s", None, {})
    alone = (Kind.NODES, now - 40, "training on 1 node (b), 2 ranks", None, {"nodes": 1})
    write_journal(tmp_path, lost, alone, name="b-1")
    write_checkpoint(tmp_path / "checkpoints", 5)
    (tmp_path / "checkpoints" / ".run.lock").write_text("{}")
    status = read_status(tmp_path)
    assert status.liveness.state is State.RUNNING
    assert status.liveness.reason == "its nodes meet again: training on 1 node (b), 2 ranks"
    write_journal(tmp_path, lost, alone, (Kind.STARTED, now - 20, "2 ranks", 5, {"ranks": 2}), name="b-1")
    status = read_status(tmp_path)
    assert [start.end for start in status.starts] == [
        "the processes were killed, or a host failed; a gave no sign of life for 30 s; training on 1 node (b), 2 ranks",
        "",
    ]
    assert status.liveness.state is State.LOST  # no process holds the lock


def test_faults_of_checkpoints_are_named(run):
    folder = run / "checkpoints"
    for iteration in (30, 40, 50):
        write_checkpoint(folder, iteration)
    (folder / "iter_0000050" / "metadata.json").unlink()
    (folder / "iter_0000040" / "__0_0.distcp").write_bytes(bytes(999))
    (folder / "iter_0000030" / ".metadata").unlink()
    found = {each.iteration: (each.soundness, each.fault) for each in read_status(run).checkpoints.saved}
    assert found == {
        50: (Soundness.UNFINISHED, "was not finished: it has no metadata.json"),
        40: (Soundness.DAMAGED, "__0_0.distcp has 999 of 1000 bytes"),
        30: (Soundness.DAMAGED, ".metadata is missing"),
        20: (Soundness.COMPLETE, ""),
        10: (Soundness.COMPLETE, ""),
    }
    assert "a restart loads iter_0000020" in " ".join(render_text(read_status(run)).split())
    shutil.rmtree(folder / "iter_0000020")
    shutil.rmtree(folder / "iter_0000010")
    status = read_status(run)
    assert status.checkpoints.next_start is None
    assert "holds no sound checkpoint" in status.checkpoints.problem


def test_flipped_byte_is_found_by_verify(run, maskmoe_status):
    file = run / "checkpoints" / "iter_0000020" / "__0_0.distcp"
    file.write_bytes(bytes(999) + b"1")
    assert "complete" in maskmoe_status(run).split("iter_0000020")[-1].split("\n")[0]
    text = maskmoe_status(run, "--verify")
    assert "damaged: __0_0.distcp does not have the content" in " ".join(text.split())
    assert text.count("verified") == 1
    assert "a restart loads iter_0000010" in " ".join(text.split())


def test_flipped_byte_of_a_layout_is_found_without_verify(run):
    file = run / "checkpoints" / "iter_0000020" / ".metadata"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    newest = read_status(run).checkpoints.saved[0]
    assert (newest.soundness, newest.fault) == (
        Soundness.DAMAGED,
        ".metadata does not have the content that was saved",
    )


def test_checkpoint_without_digests_is_checked_by_its_layout(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoints", 5, with_manifest=False)
    assert read_status(tmp_path).checkpoints.saved[0].soundness is Soundness.COMPLETE
    (checkpoint / "__0_0.distcp").write_bytes(bytes(10))
    assert read_status(tmp_path).checkpoints.saved[0].fault == "__0_0.distcp has 10 of at least 1000 bytes"


def test_non_persistent_checkpoint_may_be_the_next_start(tmp_path):
    write_events(tmp_path / "tensorboard", non_persistent_ckpt_type="global")
    write_checkpoint(tmp_path / "checkpoints", 10)
    frequent = write_checkpoint(tmp_path / "checkpoints" / "non_persistent", 15)
    status = read_status(tmp_path)
    assert status.checkpoints.next_start == frequent
    assert "non-persistent" in render_text(status)
    (frequent / "metadata.json").unlink()
    assert read_status(tmp_path).checkpoints.next_start == tmp_path / "checkpoints" / "iter_0000010"


def test_running_killed_and_ended_runs(run, hold_lock):
    """The status sees the lock of another process, and what a killed process has left behind."""
    (journal,) = (run / "journal").iterdir()
    journal.unlink()
    process = hold_lock(run / "checkpoints")
    status = read_status(run)
    assert status.liveness.state is State.RUNNING
    assert f"process {process.pid} on host" in status.liveness.reason
    assert "ETA" in render_text(status)
    process.send_signal(signal.SIGKILL)
    process.wait()
    status = read_status(run)
    assert status.liveness.state is State.LOST
    assert f"process {process.pid} on host" in status.liveness.reason
    assert "ETA" not in render_text(status)
    process = hold_lock(run / "checkpoints")
    process.communicate()
    assert read_status(run).liveness.state is State.ENDED
    write_events(run / "tensorboard", first=21, last=40)
    assert read_status(run).liveness.state is State.FINISHED


def test_status_of_other_hosts_needs_a_fresh_touch(run):
    (journal,) = (run / "journal").iterdir()
    journal.unlink()
    lock = run / "checkpoints" / ".run.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    assert read_status(run).liveness.state is State.RUNNING
    old = time.time() - 60
    os.utime(lock, (old, old))
    assert read_status(run).liveness.state is State.LOST


def test_silent_run_is_reported(run, hold_lock):
    hold_lock(run / "checkpoints")
    status = read_status(run)
    assert not status.liveness.is_silent
    for path in (run / "tensorboard").iterdir():
        path.unlink()
    (run / "run.log").write_text("\n".join([iteration_line(1), iteration_line(2)]))
    old = time.time() - 3600
    os.utime(run / "run.log", (old, old))
    (journal,) = (run / "journal").iterdir()
    journal.unlink()
    text = render_text(read_status(run))
    assert "alarm       the run has logged nothing for much longer than an iteration takes" in text


def test_start_succeeds_while_the_status_is_read(run, hold_lock):
    """Another process reads the lock all the time while runs start; none is refused or delayed."""
    program = "import sys; from pathlib import Path; from maskmoe.processes.folder_lock import look_at_lock\n"
    program += "print(1, flush=True)\nwhile True: look_at_lock(Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader = subprocess.Popen(
        [sys.executable, "-c", program, run / "checkpoints"], stdout=subprocess.PIPE, env=environment
    )
    reader.stdout.readline()
    try:
        lock_once = (
            "import sys, time; from pathlib import Path; from maskmoe.processes.folder_lock import locked_folder\n"
            "for _ in range(200):\n"
            "    with locked_folder(Path(sys.argv[1])): pass\n"
        )
        subprocess.run([sys.executable, "-c", lock_once, run / "checkpoints"], check=True, env=environment, timeout=60)
        assert reader.poll() is None
    finally:
        reader.kill()
        reader.communicate()


def test_nothing_is_changed(run, maskmoe_status):
    before = contents(run)
    maskmoe_status(run, "--verify")
    assert contents(run) == before


def test_page_has_the_values(run, maskmoe_status, tmp_path):
    path = tmp_path / "status.html"
    maskmoe_status(run, "--html", path)
    page = Page(path)
    page.assert_self_contained()
    assert page.titles == ["Loss", "Speed", "Load by layer"]
    words = " ".join(page.text.split())
    for part in ("20 of 40", "0.2500", "0.3000 at iteration 20", "2,048 tokens/s", "node b was lost", "exit code 75"):
        assert part in words, part
    checkpoints, loads = page.tables
    assert [row[0] for row in checkpoints] == ["checkpoint", "iter_0000020", "iter_0000010"]
    assert loads[1:] == [[str(layer), "20", f"{1.2 + layer:.3f}", f"{1 + layer / 10:.3f}", "-"] for layer in range(3)]
    assert "refresh" not in path.read_text()


def test_outputs_need_force_and_are_no_inputs(run, maskmoe_status, tmp_path):
    path = tmp_path / "status.json"
    maskmoe_status(run, "--json", path)
    with pytest.raises(UserError, match="it exists"):
        maskmoe_status(run, "--json", path)
    maskmoe_status(run, "--json", path, "--force")
    (events,) = (run / "tensorboard").iterdir()
    with pytest.raises(UserError, match="belongs to the input"):
        maskmoe_status(run, "--html", events, "--force")


def test_json_has_all_parts(run, maskmoe_status, tmp_path):
    content = json.loads(maskmoe_status(run, "--json", "-"))
    assert content["progress"]["iteration"] == 20
    assert content["liveness"]["state"] == "ended"
    assert content["checkpoints"]["next_start"] == str(run / "checkpoints" / "iter_0000020")
    assert [each["soundness"] for each in content["checkpoints"]["saved"]] == ["complete", "complete"]
    assert content["warnings"][0]["text"] == "the loss of iteration 7 is a spike"
    assert content["last_save"]["facts"] == {"seconds": 0.5, "is_local": False}


def test_text_fits_a_terminal(run):
    write_journal(run, (Kind.WARNED, time.time(), "a spike of the loss " * 20 + "\x1b[31m\x07", 7, {}), name="b-1")
    text = render_text(read_status(run))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "\x1b" not in text
    assert "\x07" not in text


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["a.log"], ["iter_x/file"]])
def test_folder_without_a_run_is_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hello\n")
    completed = subprocess.run(
        [sys.executable, "-m", "maskmoe", "status", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert completed.returncode == 2
    (line,) = completed.stderr.splitlines()
    assert "is not the folder of a run" in line


def test_run_that_has_only_started(tmp_path):
    (tmp_path / "args.yaml").write_text("lr: 1\n")
    text = render_text(read_status(tmp_path))
    assert "nothing has been logged yet" in text


def test_large_run_is_read_without_torch(tmp_path):
    write_events(tmp_path / "tensorboard", last=10_000)
    for iteration in range(500, 10_001, 500):
        write_checkpoint(tmp_path / "checkpoints", iteration)
    program = (
        "import sys; from maskmoe.command_line import status\n"
        "sys.argv = ['status', sys.argv[1]]; status.main()\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    text = subprocess.run(
        [sys.executable, "-c", program, tmp_path], check=True, capture_output=True, text=True, env=environment
    ).stdout
    assert "iteration 10,000" in text
    assert "checkpoints 20 with" in text


def test_files_may_vanish_while_they_are_read(run, monkeypatch):
    """Each checkpoint, log and event file is removed right after it was found."""
    import maskmoe.run_status.checkpoints as checkpoints

    (run / "run.log").write_text(iteration_line(1))

    def find(folder):
        found = [20, 10]
        shutil.rmtree(run / "checkpoints" / "iter_0000020", ignore_errors=True)
        return found

    monkeypatch.setattr(checkpoints, "saved_iterations", find)
    monkeypatch.setattr("maskmoe.run_status.logged.log_files", lambda folder: [Path(folder) / "gone.log"])
    assert [each.iteration for each in read_status(run).checkpoints.saved] == [10]
