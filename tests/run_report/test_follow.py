"""The process that keeps the page of a running training up to date."""

import subprocess
import sys

import pytest
from support.report_pages import Page
from support.waiting import wait_until

from maskmoe.run_report.follow import END, UPDATE, Follower


@pytest.fixture
def start(resumed_run):
    """Start the process as training does; return the process and the page."""
    path = resumed_run / "report.html"

    def start() -> tuple:
        program = [sys.executable, "-m", "maskmoe.run_report.follow", resumed_run / "tensorboard", "name", path]
        return subprocess.Popen(program, stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, text=False), path

    return start


def test_page_is_written_during_the_run_and_at_its_end(start):
    process, path = start()
    process.stdin.write(UPDATE)
    wait_until(path.exists, "a page", timeout=60, report=lambda: "")
    assert "Training is running." in Page(path).text
    assert 'http-equiv="refresh"' in path.read_text()
    process.stdin.write(END)
    assert process.wait(60) == 0
    page = Page(path)
    assert "Training is not running." in page.text
    assert "refresh" not in path.read_text()
    assert page.values[15]
    assert process.stderr.read() == b""


def test_killed_training_gets_its_last_page(start):
    process, path = start()
    process.stdin.close()
    assert process.wait(60) == 0
    assert Page(path).values[15]


def test_page_that_cannot_be_written_is_one_line(resumed_run, capsys):
    (resumed_run / "report.html").mkdir()
    follower = Follower(resumed_run / "tensorboard", "name", resumed_run / "report.html")
    for _ in range(3):
        follower.update(is_last=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {resumed_run}/report.html is not up to date: ")


def test_pages_take_a_hundredth_of_the_time(resumed_run, monkeypatch):
    now, work, written = [0.0], [0.0], []

    def write(*arguments, **options):
        written.append(now[0])
        work[0] += 2.0

    monkeypatch.setattr("maskmoe.run_report.follow.write_page", write)
    path = resumed_run / "report.html"
    follower = Follower(resumed_run / "tensorboard", "name", path, lambda: now[0], lambda: work[0])
    for now[0] in range(0, 1000, 60):
        follower.update()
    assert written == [0, 240, 480, 720, 960]
    follower.update(is_last=True)
    assert len(written) == 6
