"""The console of a rank, its header, its log, and the saved arguments."""

import io
import logging
import os
import shlex
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from megatron.training.arguments import parse_args, validate_args

from maskmoe.files.run_folder import run_folder
from maskmoe.launch.model_file import ModelFile, flag_words, split_flags
from maskmoe.training.settings.flags import add_maskmoe_arguments, add_pretraining_arguments
from maskmoe.training.settings.saved_arguments import arguments_text
from maskmoe.training.watch.console import Console
from maskmoe.training.watch.header import ParameterCounts, describe_run

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
    Console().route(stdout)
    print("  num_layers ..... 4")
    assert stdout.getvalue() == "  num_layers ..... 4\n"


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
    assert console.iteration.loss == 7.729889
    assert console.validation.loss == 5.654449


def test_unwritable_log_is_no_failure(console, emit, stdout, tmp_path):
    (tmp_path / "logs").write_text("a file")
    console.open_log(tmp_path)
    emit("kept")
    assert "the log of this rank is not kept" in stdout.getvalue()


def test_full_disk_does_not_end_the_run(console, emit, stdout, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.log").symlink_to("/dev/full")
    emit("a line before")
    console.open_log(tmp_path)
    emit("a line after")
    assert stdout.getvalue() == ""
    with pytest.raises(OSError, match="No space left"):  # closed here, the file does not fail a later test
        console._log.close()


PROGRAM = """
import sys
from maskmoe.training.watch.console import console
from maskmoe.training.loop.rank_process import run_rank
def main():
    print("Megatron says why")
    {end}
run_rank(main, "pretrain")
"""


@pytest.mark.parametrize(
    ("end", "code", "last", "is_explained"),
    [
        ("raise ValueError('boom')", 1, "ValueError: boom", False),
        ("sys.exit(3)", 3, "Megatron says why", False),
        ("from maskmoe.errors import UserError; raise UserError('bad flag')", 2, "error: bad flag", True),
        ("from maskmoe.errors import RunFailure; raise RunFailure('full disk')", 1, "error: full disk", True),
        ("console.end_of_loading(); raise ValueError('boom')", 1, "ValueError: boom", True),
    ],
)
def test_last_words_of_a_process_are_shown(end, code, last, is_explained):
    """A process that ends while it loads, for a reason that we do not explain, shows its newest hidden lines."""
    command = [sys.executable, "-c", PROGRAM.format(end=end)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RANK": "0", "LOCAL_RANK": "0"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert process.returncode == code, process.stderr
    assert process.stderr.splitlines()[-1] == last
    assert ("Megatron says why" in process.stderr) != is_explained
    assert process.stdout == ""


def test_process_ends_after_all_exit_handlers():
    """Threads that live on, and handlers that were registered during the run, end before the process does."""
    program = PROGRAM.format(
        end="import atexit, threading, time\n"
        "    atexit.register(print, 'handler', file=sys.stderr)\n"
        "    threading.Thread(target=lambda: (time.sleep(0.3), print('thread', file=sys.stderr))).start()"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (process.returncode, process.stderr) == (0, "thread\nhandler\n")


MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 --mock-data
    --padded-vocab-size 256 --micro-batch-size 2 --lr 1e-3 --distributed-backend gloo
"""


@pytest.mark.parametrize(
    ("flags", "step", "tokens"),
    [
        ("--global-batch-size 8 --train-iters 5", "8 samples × 16 = 128 tokens", "640"),
        ("--global-batch-size 8 --train-samples 40", "8 samples × 16 = 128 tokens", "640"),
        # An incomplete batch is left out.
        ("--global-batch-size 8 --train-samples 47", "8 samples × 16 = 128 tokens", "640"),
        # Three iterations of 4 samples, and two of 1,000 samples.
        (
            "--step-batch-size-schedule '0:4 160:1000' --train-samples 2012",
            "4 to 1,000 samples × 16 = 64 to 16,000 tokens",
            "32,192",
        ),
    ],
)
def test_header_describes_steps_and_length(flags, step, tokens, monkeypatch):
    """Megatron computes the iterations of --train-samples only after the header."""
    monkeypatch.setattr(sys, "argv", ["pretrain", *shlex.split(f"{MODEL} {flags}")])
    args = parse_args(lambda parser: add_pretraining_arguments(add_maskmoe_arguments(parser)))
    args.rank, args.world_size = 0, 1
    validate_args(args)
    header = describe_run(args, None, None, ParameterCounts(1000, 0, 0), None)
    assert header["step"] == f"{step}, in micro-batches of 2; 5 iterations"
    assert header["data"] == f"mock data; {tokens} tokens in all"


def test_saved_arguments_are_a_model_file(tmp_path):
    words = [
        *("--save", str(tmp_path / "checkpoints"), "--lr", "4e-3", "--swiglu", "--data-path", "0.3", "a", "0.7", "b"),
        *("--hybrid-layer-pattern", "M*E-", "--wandb-project", "true", "--split=90,10,0", "--seed", "0"),
        *("--moe-layer-freq", "([0]+[1]*3)", "--note", "a $HOME: # 'text'", "--bias=-0.5,1"),
    ]
    text = arguments_text(Namespace(lr=0.004, rank=0, notes="two\nlines"), words, tmp_path)
    (tmp_path / "args.yaml").write_text(text)
    assert "\n# lr: 0.004\n# notes: two lines\n# rank: 0\n" in text
    read = ModelFile.read(tmp_path / "args.yaml", {"RUN_DIR": "/other"}).flags_for(1)
    expected = {**split_flags(words), "save": ("/other/checkpoints",)}
    assert split_flags(flag_words(read)) == expected


def test_saved_arguments_with_relative_paths_do_not_write_into_the_folder_of_the_first_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--save", "run/checkpoints", "--load", "../elsewhere", "--tensorboard-dir", "run/tensorboard"]
    words += ["--data-path", "run/data", "--data-cache-path", "cache"]
    (tmp_path / "args.yaml").write_text(arguments_text(Namespace(), words, Path("run")))
    read = ModelFile.read(tmp_path / "args.yaml", {"RUN_DIR": "/other"}).flags_for(1)
    assert split_flags(flag_words(read)) == {
        "save": ("/other/checkpoints",),
        "load": (str(tmp_path.parent / "elsewhere"),),
        "tensorboard-dir": ("/other/tensorboard",),
        "data-path": ("run/data",),
        "data-cache-path": (str(tmp_path / "cache"),),
    }


def test_saved_arguments_of_a_run_folder_with_dots_are_those_of_another_run(tmp_path):
    folder = tmp_path / "work" / ".." / "run"
    text = arguments_text(Namespace(), ["--save", str(folder / "checkpoints"), "--note", str(folder / "a")], folder)
    (tmp_path / "args.yaml").write_text(text)
    read = ModelFile.read(tmp_path / "args.yaml", {"RUN_DIR": "/other"}).flags_for(1)
    assert split_flags(flag_words(read)) == {"save": ("/other/checkpoints",), "note": ("/other/a",)}


@pytest.mark.parametrize(
    ("save", "variable", "folder"),
    [
        ("/run/checkpoints", None, "/run"),
        ("/run/save", None, "/run/save"),
        ("/run/save", "/other", "/other"),
        (None, None, None),
    ],
)
def test_run_folder(save, variable, folder, monkeypatch):
    monkeypatch.delenv("MASKMOE_RUN_DIR", raising=False)
    if variable:
        monkeypatch.setenv("MASKMOE_RUN_DIR", variable)
    assert run_folder(save) == (folder and Path(folder))
