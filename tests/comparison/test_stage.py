"""Stages run once, resume, and are repeated with what they wrote before kept; their processes end with them."""

import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
from support.system import wait_until

from maskmoe.comparison import stage as stages
from maskmoe.comparison.stage import Stage, StageFolder, StatusLine, stopping_in_order
from maskmoe.errors import RunFailure, UserError
from maskmoe.launch.options import parse_options

COUNT = """
import pathlib, sys, time
output, end = pathlib.Path(sys.argv[1]), int(sys.argv[2])
print("counting", flush=True)
step = int(output.read_text()) if output.exists() else 0
while step < end or end < 0:
    step += 1
    output.with_suffix(".new").write_text(str(step))
    output.with_suffix(".new").replace(output)
    time.sleep(0.01)
"""


@pytest.fixture
def folder(tmp_path):
    return StageFolder(tmp_path / "run")


def stage(folder, name="count", program=COUNT, *, end=3, inputs=(), environment=None, is_resumable=False):
    output = folder.path / f"{name}.out"
    command = (sys.executable, "-c", program, str(output), str(end))
    return Stage(name, command, (output,), inputs, (), environment or {}, is_resumable)


def run(folder, *stages):
    return [*folder.finish(stages)]


def test_a_folder_in_a_checkpoint_is_refused(folder):
    (folder.path.parent / ".metadata").touch()
    with pytest.raises(UserError, match="is a checkpoint, which stays as it was saved"):
        folder.check((), ())


def test_a_finished_stage_does_not_run_again(folder, capsys):
    both = (stage(folder, "one"), stage(folder, "two", inputs=(folder.path / "one.out",)))
    assert folder.seconds(both[0]) is None
    folder.run(both, StatusLine(sys.stdout))
    assert "one finished in 00:0" in capsys.readouterr().out
    assert (folder.path / "two.out").read_text() == "3"
    assert folder.seconds(both[1]) > 0
    assert run(folder, *both) == []
    assert folder.log("one").read_text() == "counting\n"
    assert both[1].command[-1] in (folder.path / "commands.sh").read_text()


def test_a_changed_command_repeats_its_stage_and_keeps_the_result(folder, capsys):
    run(folder, stage(folder, end=3))
    assert capsys.readouterr().err == ""
    run(folder, stage(folder, end=5))
    place = folder.path / "previous" / "1"
    assert capsys.readouterr().err == f"count: the command line changed; the earlier files are now in {place}\n"
    assert (folder.path / "count.out").read_text() == "5"
    assert (folder.path / "previous" / "1" / "count.out").read_text() == "3"


def test_a_changed_input_repeats_its_stage(folder, tmp_path, capsys):
    source = tmp_path / "source"
    source.write_text("text")
    before = stage(folder, inputs=(source,))
    run(folder, replace(before, command=(*before.command, "--lr", "1", "--seed", "2")))
    source.write_text("another text")
    again = replace(before, command=(*before.command, "--lr", "2", "--seed", "2"))
    assert folder.seconds(again) is None
    run(folder, again)
    assert f"count: --lr 2, {source} changed; the earlier files" in capsys.readouterr().err


def test_another_python_repeats_nothing(folder):
    """The job of a comparison may run in a container, whose Python has another path."""
    before = stage(folder)
    run(folder, before)
    after = replace(before, command=("/container/bin/python", *before.command[1:]))
    assert folder.seconds(after) == folder.seconds(before)
    assert folder.seconds(replace(after, command=(*after.command, "more"))) is None
    (folder.path / "count.out").unlink()
    assert "or a result is missing" in folder._reason_to_repeat(after)


def test_a_lost_result_repeats_its_stage(folder):
    run(folder, stage(folder))
    (folder.path / "count.out").unlink()
    assert folder.seconds(stage(folder)) is None


def test_files_of_somebody_else_are_set_aside(folder, capsys):
    folder.path.mkdir()
    (folder.path / "count.out").write_text("100")
    run(folder, stage(folder))
    assert (folder.path / "previous" / "1" / "count.out").read_text() == "100"
    assert capsys.readouterr().err.startswith("count: this run folder has no record of the stage; ")


@pytest.mark.parametrize("is_resumable", [True, False])
def test_a_stopped_stage_resumes_or_starts_again(folder, is_resumable, capsys):
    endless = stage(folder, end=10**6, is_resumable=is_resumable)
    count = folder.path / "count.out"
    work = folder.finish([endless])
    wait_until(lambda: next(work) and count.exists() and int(count.read_text()) > 20)
    work.close()
    before = int(count.read_text())
    work = folder.finish([endless])
    wait_until(lambda: next(work) and count.exists() and int(count.read_text()) != before)
    assert (int(count.read_text()) > before) == is_resumable
    work.close()
    assert (folder.path / "previous").exists() == (not is_resumable)
    assert ("count: the stage was interrupted" in capsys.readouterr().err) == (not is_resumable)


SAVES = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(3)))
print('ready', flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_that_the_stage_ends_first(folder, number, capsys):
    class Line(StatusLine):
        def update(self, state):
            if "ready" in state:
                signal.raise_signal(number)

    with pytest.raises(SystemExit) as end, stopping_in_order():
        folder.run([stage(folder, program=SAVES)], Line(sys.stdout))
    assert end.value.code == 128 + number
    assert capsys.readouterr().err.startswith("\nstopping: the stage in progress ends first")
    assert folder.log("count").read_text() == "ready\nsaved\n"


TWO_RUNS = """
import sys, time
from pathlib import Path
from maskmoe.comparison.stage import Stage, StageFolder, stopping_in_order

PROGRAM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)"

def states(name):
    stage = Stage(name, (sys.executable, "-c", PROGRAM + "; time.sleep(600)"), ())
    for state in StageFolder(Path(sys.argv[1])).finish([stage]):
        yield f"{name}: {state}"

works = [states("a"), states("b")]
with stopping_in_order():
    try:
        while True:
            print(*map(next, works), flush=True)
            time.sleep(0.05)
    finally:
        for work in works:
            work.close()
"""


def test_a_second_signal_kills_the_stages_of_all_runs(tmp_path):
    """Python drops exceptions that are raised while it closes an iterator of an iterator."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", TWO_RUNS, tmp_path / "run"]
    with open(log, "w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        wait_until(lambda: re.search("ready .*ready", log.read_text()), has_ended=lambda: process.poll() is not None)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping: " in log.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    assert not any(child.is_running() for child in children)
    assert "Traceback" not in log.read_text()


def test_a_stage_has_time_to_end_in_order(folder):
    assert parse_options("maskmoe pretrain", ["laptop.yaml"], {}).shutdown_timeout < stages._SECONDS_TO_END
    work = folder.finish([stage(folder, program=SAVES)])
    wait_until(lambda: "ready" in next(work))
    work.close()
    assert folder.log("count").read_text() == "ready\nsaved\n"
    work = folder.finish([stage(folder, program=SAVES)])
    assert "saved" not in next(work)  # the last line of the attempt before
    work.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports a parent's end")
def test_a_stage_ends_with_a_killed_parent(folder):
    endless = stage(folder, end=-1)
    program = (
        "import time; from pathlib import Path; from maskmoe.comparison.stage import Stage, StageFolder\n"
        f"stage = Stage('count', {endless.command!r}, (Path({str(endless.results[0])!r}),))\n"
        f"for _ in StageFolder(Path({str(folder.path)!r})).finish([stage]): time.sleep(0.1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    wait_until(lambda: endless.results[0].exists(), has_ended=lambda: parent.poll() is not None)
    (child,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


def test_environment_is_extended_and_the_current_folder_hides_no_module(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong module')")
    program = "import os, pathlib, random, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['A'])"
    run(folder, stage(folder, program=program, environment={"A": "b c"}))
    assert (folder.path / "count.out").read_text() == "b c"


@pytest.mark.parametrize(
    ("program", "kind", "message"),
    [
        ("import sys; sys.exit('error: the text is empty')", UserError, "count: the text is empty (full output: "),
        ("print('x.py mask: error: bad flag'); raise SystemExit(2)", UserError, "count: bad flag (full output: "),
        ("print('[rank1]: error: bad\\nlater'); 1 / 0", UserError, "count: bad (full output: "),
        ("raise ValueError('wrong')", RunFailure, "count: ValueError: wrong (exit code 1) (full output: "),
        ("import os; os.kill(os.getpid(), 9)", RunFailure, "count: no output (exit code -9) (full output: "),
        ("pass", RunFailure, "count has not written "),
    ],
)
def test_a_failure_is_one_line_with_the_log(folder, program, kind, message):
    with pytest.raises(kind) as error:
        run(folder, stage(folder, program=program))
    assert type(error.value) is kind
    assert str(error.value).startswith(message)
    assert "count.log" in str(error.value)
    assert folder.seconds(stage(folder, program=program)) is None


def test_only_the_newest_output_explains_a_failure(folder):
    failing = stage(folder, program="import sys; sys.exit('error: the text is empty')")
    with pytest.raises(UserError):
        run(folder, failing)
    with pytest.raises(RunFailure, match="ValueError: later"):
        run(folder, stage(folder, program="raise ValueError('later')"))


@pytest.mark.parametrize(
    "content", ["{", '{"a": 1}', "[1]", "7", '{"settings": {}, "seconds": 1}', "[" * 100_000], ids=lambda text: text[:9]
)
def test_a_damaged_record_is_named(folder, content):
    run(folder, stage(folder))
    (folder.path / "stages" / "count.json").write_text(content)
    with pytest.raises(UserError, match=r"count\.json is damaged \(.*\); delete it to repeat the stage count$"):
        folder.seconds(stage(folder))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_one_line(monkeypatch):
    monkeypatch.setattr(stages, "get_terminal_size", lambda: os.terminal_size((10, 24)))
    stream = Terminal()
    line = StatusLine(stream)
    line.update("step 1 of 100")
    line.print("done")
    assert stream.getvalue() == "\r\x1b[Kstep 1 of\r\x1b[Kdone\n"


def test_a_log_gets_a_line_every_minute(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    line = StatusLine(stream)
    for seconds in (0, 1, 59, 61):
        now[0] = 100.0 + seconds
        line.update(f"after {seconds} s")
    assert stream.getvalue() == "after 0 s\nafter 61 s\n"
