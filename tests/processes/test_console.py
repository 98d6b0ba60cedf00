"""The console of a rank, and its log."""

import io
import logging
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from maskmoe.processes.console import Console

ITERATION = (
    " [2026-01-01 00:00:00] iteration        5/      20 | consumed samples:           40 | elapsed time per iteration "
    "(ms): 122.4 | learning rate: 3.6E-03 | global batch size:     8 | lm loss: 7.729889E+00 | loss scale: 1.0 |"
)
VALIDATION = " validation loss at iteration 10 | lm loss value: 5.654449E+00 | lm loss PPL: 2.855590E+02 | "
LOADED = "  successfully loaded checkpoint from /run/checkpoints [ t 1/1, p 1/1 ] at iteration 10"


@pytest.fixture
def stdout(monkeypatch) -> io.StringIO:
    """Replace what a process changes for itself, and return the console."""
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    return stream


@pytest.fixture
def console(stdout) -> Console:
    console = Console()
    console.route(stdout)
    return console


@pytest.fixture
def emit(console) -> Callable[..., None]:
    """Return `print` of a routed process; pytest itself replaces `sys.stdout` before a test begins."""
    return partial(print, file=sys.stdout)


def log_of(folder: Path) -> str:
    return (folder / "logs" / "rank0.log").read_text()


def test_last_lines_are_those_of_this_process(console, emit, tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.log").write_text("of an earlier process\n")
    emit("  num_layers ..... 4")
    console.open_log(tmp_path)
    emit("  hidden_size .... 8")
    console.show_last_lines()
    assert capsys.readouterr().err == "  num_layers ..... 4\n  hidden_size .... 8\n"


def test_lines_before_training_are_logged(console, emit, stdout, tmp_path):
    emit("  num_layers ..... 4")
    console.open_log(tmp_path)
    emit("\toutput_layer.weight (param.main_grad.dtype=torch.float32)")
    emit(LOADED)
    console.say("model  GPT")
    assert stdout.getvalue() == f"{LOADED}\nmodel  GPT\n"
    assert log_of(tmp_path).splitlines()[1:] == [
        "  num_layers ..... 4",
        "\toutput_layer.weight (param.main_grad.dtype=torch.float32)",
    ]


@pytest.mark.parametrize(
    "line",
    [
        ITERATION,
        VALIDATION,
        "[2026-01-01 00:00:00] saving checkpoint at iteration      10 to /run/checkpoints in torch_dist format",
        "a line that nobody knows",
    ],
)
def test_lines_of_training_are_unchanged(console, emit, stdout, line):
    console.end_of_loading()
    emit(line)
    assert stdout.getvalue() == f"{line}\n"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--------------------------------",
        "Number of parameters in transformer block in billions:  0.00",
        "Theoretical memory footprints: weight and optimizer=23.67 MB, activation=4.38 MB, total=28.05 MB",
        "[Rank 0] (before save_checkpoint for iteration 10) memory (MB) | allocated: 874.59",
    ],
)
def test_noise_of_training_is_logged(console, emit, stdout, tmp_path, line):
    console.open_log(tmp_path)
    console.end_of_loading()
    emit(line)
    assert stdout.getvalue() == ""
    assert log_of(tmp_path).splitlines()[1:] == [line]


def test_errors_and_own_warnings_of_logging_are_shown(console, emit, stdout, tmp_path):
    console.open_log(tmp_path)
    foreign, own = logging.getLogger("megatron.core"), logging.getLogger("maskmoe.transformer")
    foreign.warning("GPTModel IS DEPRECATED")
    foreign.error("a device\nis broken")
    own.warning("of ours")
    own.info("detail")
    console.end_of_loading()
    foreign.warning("the loss is unexpected")
    foreign.warning("Setting RerunStateMachine mode RerunMode.DISABLED")
    assert stdout.getvalue().splitlines() == [
        "ERROR:megatron.core:a device",
        "is broken",
        "WARNING:maskmoe.transformer:of ours",
        "WARNING:megatron.core:the loss is unexpected",
    ]
    assert "GPTModel IS DEPRECATED" in log_of(tmp_path)
    assert "RerunMode.DISABLED" in log_of(tmp_path)


def test_timers_are_shown_if_asked_for(console, emit, stdout):
    console.end_of_loading()
    timers = logging.getLogger("megatron.core.timers")
    timers.info("(min, max) time across ranks (ms): 1")
    console.shows_timers = True
    timers.info("(min, max) time across ranks (ms): 2")
    assert stdout.getvalue().splitlines() == ["INFO:megatron.core.timers:(min, max) time across ranks (ms): 2"]


def test_foreign_warnings_are_logged_and_ours_are_shown(console, emit, tmp_path, capsys):
    console.open_log(tmp_path)
    # pytest records warnings, so call the hook as Python does.
    warnings.showwarning("foreign", FutureWarning, "/site-packages/torch/x.py", 1)
    warnings.showwarning("ours", UserWarning, sys.modules[Console.__module__].__file__, 1)
    assert "FutureWarning: foreign" in log_of(tmp_path)
    assert "UserWarning: ours" in capsys.readouterr().err


def test_parts_of_lines_are_joined(console, emit, stdout):
    console.end_of_loading()
    emit("iteration 5", end="")
    emit(" of 20\nnext", flush=True)
    assert stdout.getvalue() == "iteration 5 of 20\nnext\n"


def test_verbose_shows_everything(stdout, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--verbose"])
    monkeypatch.setattr(sys, "stdout", stdout)
    console = Console()
    console.route(stdout)
    print("  num_layers ..... 4")
    print(ITERATION)
    assert stdout.getvalue() == f"  num_layers ..... 4\n{ITERATION}\n"
    assert console.losses["loss"] == 7.729889  # for the last line of the run


def test_result_goes_to_stdout_and_everything_else_to_stderr(stdout, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    console = Console()
    console.route(stderr)
    console.load("reading the model")
    print(LOADED)
    print("noise")
    console.end_of_loading()
    print("part of a text", end="")
    assert stdout.getvalue() == "part of a text"
    assert stderr.getvalue() == f"loading: reading the model\n{LOADED}\n"


def test_unfinished_line_of_a_dying_process_is_shown(console, emit, stdout):
    console.end_of_loading()
    emit("last words", end="")
    emit.keywords["file"].finish()
    assert stdout.getvalue() == "last words\n"


def test_only_one_rank_speaks(console, emit, stdout, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    console.say("first")
    console.say("last", rank=-1)
    assert stdout.getvalue() == "last\n"


def test_newest_losses_are_known(console, emit):
    console.end_of_loading()
    emit(ITERATION)
    emit(VALIDATION)
    assert console.losses["loss"] == 7.729889
    assert console.losses["validation loss"] == 5.654449
    emit(VALIDATION.replace("10 |", "10 on validation set |").replace("5.654449", "5.5"))
    emit(VALIDATION.replace("10 |", "10 on test set |"))
    assert console.losses["validation loss"] == 5.5
    emit(ITERATION.replace("7.729889", "0.000000"))  # all updates of the interval were skipped
    assert math.isnan(console.losses["loss"])


def test_unwritable_log_is_no_failure(console, emit, stdout, tmp_path):
    (tmp_path / "logs").write_text("a file")
    console.open_log(tmp_path)
    emit("kept")
    assert "the log of this rank is not kept" in stdout.getvalue()


def test_full_disk_of_the_output_does_not_end_the_run(stdout):
    console = Console()
    console.route(Mock(write=Mock(side_effect=OSError)))
    console.say("complete: 20 iterations")
    sys.stdout.write(f"{LOADED}\n")


def test_full_disk_of_the_log_does_not_end_the_run(console, emit, stdout, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.log").symlink_to("/dev/full")
    emit("a line before")
    console.open_log(tmp_path)
    emit("a line after")
    assert stdout.getvalue() == ""
    with pytest.raises(OSError, match="No space left"):  # closed here, the file does not fail a later test
        console.log.close()
