"""The console of a rank, and its log."""

import io
import logging
import sys
import warnings
from unittest.mock import Mock

import pytest

from maskmoe.processes.console import Console

LOADED = "  successfully loaded checkpoint from /run/checkpoints [ t 1/1, p 1/1 ] at iteration 10"
VALIDATION = " validation loss at iteration 10 | lm loss value: 5.654449E+00 | lm loss PPL: 2.855590E+02 | "


@pytest.fixture
def stdout(monkeypatch) -> io.StringIO:
    """Replace what a process changes for itself, and return the console."""
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    monkeypatch.setattr(logging, "_warnings_showwarning", None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    return stream


def print_everything(console: Console) -> None:
    """Print, log and warn as a run does before and during training; the marked lines are for the console."""
    for line in ("  num_layers ..... 4", LOADED, " [2026-01-01] iteration 5/20 | lm loss: 7.7E+00 |", VALIDATION):
        print(line, file=sys.stdout)  # pytest has bound `print` to another stream
    print("part of ", end="", file=sys.stdout)
    print("a line", file=sys.stdout)
    console.say("iteration 5/20 (25%)  loss 7.7299")
    console.say("of the last rank", rank=-1)
    foreign = logging.getLogger("megatron.core")
    foreign.warning("GPTModel IS DEPRECATED")
    foreign.error("a device\nis broken")


def test_console_shows_a_run_and_the_log_holds_the_rest(stdout, tmp_path, capsys):
    console = Console()
    console.route(stdout)
    print("before the folder is known", file=sys.stdout)
    console.open_log(tmp_path)
    print_everything(console)
    assert stdout.getvalue().splitlines() == [LOADED, VALIDATION, "iteration 5/20 (25%)  loss 7.7299"]
    assert capsys.readouterr().err == "ERROR:megatron.core:a device\nis broken\n"
    assert (tmp_path / "logs" / "rank0.log").read_text().splitlines()[1:] == [
        *("before the folder is known", "  num_layers ..... 4", LOADED),
        *(" [2026-01-01] iteration 5/20 | lm loss: 7.7E+00 |", VALIDATION, "part of a line"),
        *("WARNING:megatron.core:GPTModel IS DEPRECATED", "ERROR:megatron.core:a device", "is broken"),
    ]


def test_verbose_shows_everything(stdout, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--verbose"])
    monkeypatch.setattr(sys, "stdout", stdout)
    console = Console()
    console.route(stdout)
    console.open_log(tmp_path)
    print_everything(console)
    assert {"  num_layers ..... 4", LOADED, "part of a line"} <= {*stdout.getvalue().splitlines()}
    assert not [*tmp_path.iterdir()]


def test_warnings_are_logged(stdout, tmp_path, capsys):
    console = Console()
    console.route(stdout)
    console.open_log(tmp_path)
    # pytest records warnings, so call the hook as Python does.
    warnings.showwarning("foreign", FutureWarning, "/site-packages/torch/x.py", 1)
    assert "FutureWarning: foreign" in (tmp_path / "logs" / "rank0.log").read_text()
    assert capsys.readouterr().err == ""


def test_result_goes_to_stdout_and_everything_else_to_stderr(stdout, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    console = Console()
    console.route(stderr)
    console.load("reading the model")
    print(f"{LOADED}\nnoise", file=sys.stdout)
    print("a result", file=console.result)
    assert stdout.getvalue() == "a result\n"
    assert stderr.getvalue().startswith(f"loading: reading the model\n{LOADED}\n")


def test_full_disk_does_not_end_the_run(stdout, tmp_path):
    """The disk of the output, and the disk of the log, which may also be no folder at all."""
    console = Console()
    console.route(Mock(write=Mock(side_effect=OSError)))
    (tmp_path / "logs").write_text("a file")
    console.open_log(tmp_path)
    (tmp_path / "logs").unlink()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.log").symlink_to("/dev/full")
    print("a line before", file=sys.stdout)
    console.open_log(tmp_path)
    print_everything(console)
    with pytest.raises(OSError, match="No space left"):  # closed here, the file does not fail a later test
        console.log._file.close()
