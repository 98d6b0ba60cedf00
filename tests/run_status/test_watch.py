"""`maskmoe status --watch` follows a run until it ends."""

import io
import os
import pty
import signal
import subprocess
import sys
from types import SimpleNamespace

from support.paths import ROOT
from support.run_folders import write_events

from maskmoe.run_status.liveness import State
from maskmoe.run_status.watch import Screen, follow


def shown_states(*states):
    """Return how many of the given states are shown, when 50 s lie between two of them."""
    now, shown = [0.0], []
    remaining = iter(states)

    def sleep(seconds):
        now[0] += seconds

    def read():
        return SimpleNamespace(liveness=SimpleNamespace(state=next(remaining)))

    follow(read, lambda status: shown.append(status.liveness.state), 50, sleep, lambda: now[0])
    return len(shown)


def test_watch_ends_with_the_run():
    running, ended, finished, lost = State.RUNNING, State.ENDED, State.FINISHED, State.LOST
    assert shown_states(ended, running) == 1
    assert shown_states(running, running, finished, running) == 3
    # A run that is restarted within two minutes is watched further.
    assert shown_states(running, lost, ended, running, finished) == 5
    assert shown_states(running, ended, ended, ended, running) == 4


def test_output_that_is_no_terminal_has_one_text_after_another():
    stream = io.StringIO()
    for text in ("a\n", "b\n"):
        Screen(stream).show(text)
    assert stream.getvalue() == "a\n\nb\n\n"


def test_ctrl_c_ends_the_watching_silently(tmp_path):
    """On a terminal, each text replaces the one before."""
    write_events(tmp_path / "tensorboard")  # a short time ago, so the run counts as running
    page = tmp_path / "status.html"
    main, child = pty.openpty()
    words = [sys.executable, "-m", "maskmoe", "status", tmp_path, "--watch", "1", "--html", page]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LINES": "60", "COLUMNS": "80"}
    process = subprocess.Popen(words, stdout=child, stderr=subprocess.PIPE, env=environment)
    os.close(child)
    output = b""
    while output.count(b"\x1b[H") < 2:
        output += os.read(main, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read() == b""
    process.stderr.close()
    os.close(main)
    assert b"iteration 20 of 40" in output
    assert 'http-equiv="refresh" content="1"' in page.read_text()
