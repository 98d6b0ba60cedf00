"""The state of long work on a terminal and in a log."""

import io

from maskmoe.comparison import status_line
from maskmoe.comparison.status_line import StatusLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_one_line(monkeypatch):
    monkeypatch.setattr(status_line, "get_terminal_size", lambda: __import__("os").terminal_size((10, 24)))
    stream = Terminal()
    line = StatusLine(stream)
    line.update("step 1 of 100")
    line.print("done")
    assert stream.getvalue() == "\r\x1b[Kstep 1 of\r\x1b[Kdone\n"


def test_a_log_gets_a_line_every_minute(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(status_line.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    line = StatusLine(stream)
    for seconds in (0, 1, 59, 61):
        now[0] = 100.0 + seconds
        line.update(f"after {seconds} s")
    assert stream.getvalue() == "after 0 s\nafter 61 s\n"
