"""launch/quickstart.sh: its stages as real processes, what it does again and what not, and what it shows."""

import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maskmoe.data.indexed_dataset import IndexedDatasetWriter
from maskmoe.errors import UserError
from maskmoe.launch.devices import Devices
from maskmoe.quickstart.plan import Plan
from maskmoe.quickstart.report import Results, draw_loss_curve, entropy, render_report
from maskmoe.quickstart.settings import parse_settings
from maskmoe.workflow.failure import explain_failure
from maskmoe.workflow.lock import locked
from maskmoe.workflow.process import LogTail
from maskmoe.workflow.progress import (
    IterationRecord,
    ProgressLine,
    StageProgress,
    TrainingHistory,
    ValidationRecord,
    format_seconds,
    parse_line,
)
from maskmoe.workflow.record import RunRecord, describe_change
from maskmoe.workflow.runner import format_command
from maskmoe.workflow.split import choose_split
from maskmoe.workflow.stage import ROOT, Stage

ITERATION = (
    " [2026-01-31 15:40:33.899054] iteration       10/      20 | consumed samples:          160 | elapsed time per "
    "iteration (ms): 1250.0 | learning rate: 1.669740E-03 | global batch size:    16 | {loss}"
    "load_balancing_loss: 1.075320E+00 | loss scale: 1.0 | grad norm: 6.295 | number of skipped iterations:   0 | "
    "number of nan iterations:   0 |"
)
ITERATION_10 = ITERATION.format(loss="lm loss: 7.462409E+00 | ")
VALIDATION_10 = " validation loss at iteration 10 | lm loss value: 6.663481E+00 | lm loss PPL: 7.832730E+02 | "


def iteration_line(iteration, loss="5.0E+00", total=20):
    line = ITERATION.format(loss=f"lm loss: {loss} | ")
    return line.replace("      10/      20", f"{iteration:8d}/{total:8d}")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# ---- What training prints --------------------------------------------------------------------------------------------


def test_iteration_line_is_parsed():
    assert parse_line(ITERATION_10) == IterationRecord(iteration=10, total=20, seconds=1.25, batch=16, loss=7.462409)


def test_iteration_line_with_throughput_and_other_losses_is_parsed():
    line = ITERATION_10.replace("| learning", "| throughput per GPU (TFLOP/s/GPU): 12.3 | learning").replace(
        "lm loss", "mtp_1 loss: 9.1E+00 | lm loss"
    )
    assert parse_line(line) == parse_line(ITERATION_10)


def test_lines_of_a_launched_rank_are_parsed():
    """launch/pretrain.sh puts the rank in front of each line."""
    assert parse_line(f"[rank3]: {ITERATION_10}") == parse_line(ITERATION_10)
    assert parse_line(f"[rank0]: {VALIDATION_10}") == parse_line(VALIDATION_10)


@pytest.mark.parametrize("loss", ["", "lm loss: NAN | ", "lm loss: INF | "])
def test_loss_that_is_no_number_is_none(loss):
    assert parse_line(ITERATION.format(loss=loss)).loss is None


@pytest.mark.parametrize("place", ["iteration 10", "iteration 10 on validation set"])
def test_validation_line_is_parsed(place):
    assert parse_line(VALIDATION_10.replace("iteration 10", place)) == ValidationRecord(10, 6.663481)


@pytest.mark.parametrize("line", ["", "Evaluating iter 1/4", "(min, max) time across ranks (ms):", "iteration 3/4"])
def test_other_lines_say_nothing(line):
    assert parse_line(line) is None


def test_what_was_repeated_replaces_what_was_before():
    history = TrainingHistory([iteration_line(1, "9.0"), iteration_line(5, "7.0"), VALIDATION_10])
    history.add(iteration_line(5, "6.0"))
    assert {it: record.loss for it, record in history.iterations.items()} == {1: 9.0, 5: 6.0}
    assert history.validations[10].loss == 6.663481


def test_progress_shows_iteration_loss_speed_and_eta():
    clock = Clock()
    progress = StageProgress("[5/8] train", seq_length=100, clock=clock)
    clock.now += 7
    assert str(progress) == "[5/8] train 0:07"
    progress.read(iteration_line(1))
    assert "ETA ?" in str(progress)
    clock.now += 90
    progress.read(iteration_line(10, "4.5"))
    progress.read(VALIDATION_10)
    assert str(progress) == "[5/8] train 10/20 · loss 4.50 · 1,280 tokens/s · ETA 1:40 · valid 6.66"
    clock.now += 30
    assert "ETA 1:10" in str(progress)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (67, "1:07"), (3599.7, "1:00:00"), (3723, "1:02:03")])
def test_seconds_are_formatted(seconds, text):
    assert format_seconds(seconds) == text


def test_plain_output_has_a_line_now_and_then():
    clock, stream = Clock(), io.StringIO()
    line = ProgressLine(stream, interval=10, clock=clock)
    for second in range(25):
        clock.now = 100.0 + second
        line.update(f"at {second}")
    line.print("done")
    assert stream.getvalue() == "at 10\nat 20\ndone\n"


def test_terminal_line_is_rewritten_and_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = io.StringIO()
    stream.isatty = lambda: True
    line = ProgressLine(stream)
    line.update("a" * 50)
    line.update("train 1/2 · loss 3 · 9 tokens/s")
    line.print("done")
    assert stream.getvalue() == f"\r{'a' * 19}\x1b[K\rtrain 1/2 · loss 3\x1b[K\r\x1b[Kdone\n"


def test_log_tail_gives_whole_lines_once(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\ntw")
    tail = LogTail(log)
    assert list(tail.new_lines()) == ["one"]
    with open(log, "ab") as stream:
        stream.write(b"o\nthree\n")
    assert list(tail.new_lines()) == ["two", "three"]


# ---- Why a stage failed ----------------------------------------------------------------------------------------------


def test_bad_input_is_told_from_what_follows_it():
    lines = [
        "W1124 torch/distributed/run.py] Setting OMP_NUM_THREADS",
        "error: dataset data does not exist",
        "Traceback (most recent call last):",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    ]
    failure = explain_failure(1, lines)
    assert (failure.message, failure.is_bad_input) == ("dataset data does not exist", True)
    assert explain_failure(2, ["usage: x", "x.py: error: bad flag"]).message == "bad flag"


def test_first_rank_to_fail_gives_the_reason():
    lines = [
        "[rank1]: Traceback (most recent call last):",
        "[rank1]: ValueError: the weights are wrong",
        "[rank0]: RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1",
        "raise ChildFailedError(",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    ]
    failure = explain_failure(1, lines)
    assert (failure.message, failure.is_bad_input) == ("ValueError: the weights are wrong", False)


@pytest.mark.parametrize(
    ("exit_code", "lines", "message"),
    [
        (1, ["traceback : Signal 9 (SIGKILL) received by PID 9"], "a process was killed"),
        (-9, [], "a process was killed"),
        (1, ["what it said", ""], "what it said"),
        (3, [], "exit code 3"),
    ],
)
def test_failure_without_an_exception(exit_code, lines, message):
    assert explain_failure(exit_code, lines).message.startswith(message)


# ---- Which text is held out ------------------------------------------------------------------------------------------


def write_dataset(prefix, lengths):
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in lengths:
            writer.add_document(np.zeros(length, np.uint16))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(16, 64))
def test_split_leaves_a_sample_to_both_parts(tmp_path_factory, lengths, seq_length):
    prefix = tmp_path_factory.mktemp("split") / "data"
    write_dataset(prefix, lengths)
    try:
        split = choose_split(prefix, seq_length)
    except UserError:
        assert all(min(sum(lengths[:cut]), sum(lengths[cut:])) <= seq_length for cut in range(1, len(lengths)))
        return
    train, held_out = lengths[: split.train_documents], lengths[split.train_documents :]
    assert split.flag == f"{len(train)},{len(held_out)},0"
    assert min(sum(train), sum(held_out)) > seq_length
    assert sum(held_out[1:]) < max(seq_length + 1, 0.02 * sum(lengths))


# ---- Settings and commands -------------------------------------------------------------------------------------------


def test_command_lines_follow_settings_and_devices(tmp_path):
    write_dataset(tmp_path / "dataset_text_document", [5000, 5000])
    settings = parse_settings(["--run-dir", str(tmp_path), "--num-experts", "6", "--global-batch-size", "6"])
    train = Plan(settings, Devices(num_gpus=4, num_cores=8, has_transformer_engine=False)).train().command
    flags = dict(itertools.pairwise(train))
    assert flags["--nproc-per-node"] == "4"
    assert flags["--expert-model-parallel-size"] == "2"
    assert (flags["--micro-batch-size"], flags["--global-batch-size"]) == ("2", "8")
    assert flags["--transformer-impl"] == "local"
    on_cpu = Plan(settings, Devices(num_gpus=0, num_cores=8, has_transformer_engine=False)).train()
    assert on_cpu.environment == {"OMP_NUM_THREADS": "4"}
    assert "--bf16" not in on_cpu.command


def test_command_can_be_pasted_into_a_shell():
    words = ("-c", "import sys; print(sys.argv[1:])", "--prompt=it's\n$HOME", "--n", "1")
    stage = Stage("stub", (sys.executable, *words), (), (), environment={"A": "b c"})
    text = format_command(stage)
    assert text.startswith("A='b c' ")
    shown = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(list(words[2:]))


def test_changed_flags_are_named():
    old = ("python", "tool.py", "--vocab-size", "512", "--gone", "--prompt=a b")
    new = ("python", "tool.py", "--vocab-size", "600", "--prompt=c")
    assert describe_change(old, new) == "--vocab-size: 512 → 600, --gone:  → not given, --prompt: a b → c"


def run_quickstart(*arguments, **options):
    command = [sys.executable, "-P", "-m", "maskmoe.quickstart", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--input", "."], "is a folder"),
        (["--run-dir", "file"], "is a file"),
        (["--hidden-size", "100"], "multiple of 32"),
        (["--frequent-visible-experts", "9"], "between 2 and --num-experts 8"),
        (["--train-iters", "0"], "at least 1"),
        (["--train-iters", "many"], "invalid int value"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    arguments = arguments if "--run-dir" in arguments else [*arguments, "--run-dir", "run"]
    result = run_quickstart(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_script_sets_up_and_passes_its_arguments_on(tmp_path):
    def script(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
        return path

    quickstart = script("launch/quickstart.sh", (ROOT / "launch" / "quickstart.sh").read_text())
    script("launch/setup.sh", "echo setup")
    script(".venv/bin/python", 'printf "<%s>" "$@"; exit 3')
    result = subprocess.run([quickstart, "--prompt", "a b"], capture_output=True, text=True, cwd="/")
    assert (result.stdout, result.returncode) == ("setup\n<-P><-m><maskmoe.quickstart><--prompt><a b>", 3)
    result = subprocess.run([quickstart, "--help"], capture_output=True, text=True)
    assert result.stdout.startswith("usage: launch/quickstart.sh") and result.returncode == 0


# ---- Stages as processes ---------------------------------------------------------------------------------------------

# A stage that says `NAME` in a file for every start and copies its input; with `--steps` it counts them in its output,
# goes on from where it was, and notes when it is asked to end. It leaves the work to a child, as torchrun does.
STUB = """
import argparse, pathlib, signal, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("--folder", type=pathlib.Path)
parser.add_argument("--input", type=pathlib.Path)
parser.add_argument("--setting")
parser.add_argument("--steps", type=int, default=0)
parser.add_argument("--fail")
parser.add_argument("--worker", action="store_true")
arguments = parser.parse_args()
output = arguments.folder / f"{arguments.name}.out"
if arguments.steps and not arguments.worker:
    worker = subprocess.Popen([sys.executable, *sys.argv, "--worker"], start_new_session=True)
    def forward(number, frame):
        worker.terminate()
    signal.signal(signal.SIGTERM, forward)
    sys.exit(worker.wait())
with open(arguments.folder / "starts", "a") as stream:
    print(arguments.name, file=stream)
print("says", arguments.name, flush=True)
if arguments.fail:
    sys.exit(arguments.fail)
step = int(output.read_text()) if arguments.steps and output.exists() else 0
is_asked_to_end = False
def ask(number, frame):
    global is_asked_to_end
    is_asked_to_end = True
signal.signal(signal.SIGTERM, ask)
while step < arguments.steps and not is_asked_to_end:
    time.sleep(0.02)
    if not (arguments.folder / "hold").exists() or step < arguments.steps // 2:
        step += 1
        output.write_text(str(step))
if is_asked_to_end:
    (arguments.folder / "ended-in-order").touch()
    sys.exit(1)
if not arguments.steps:
    output.write_text(arguments.input.read_text() if arguments.input else arguments.name)
"""

DRIVER = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from maskmoe.cli import run_tool
from maskmoe.workflow.entry import run_to_end
from maskmoe.workflow.lock import locked
from maskmoe.workflow.stage import Stage
from maskmoe.quickstart.settings import RunFiles

def paths(names):
    return tuple(map(Path, names))

stages = []
for values in json.loads(Path(sys.argv[2]).read_text()):
    stage = Stage(
        values["name"], tuple(values["command"]), paths(values["inputs"]), paths(values["outputs"]),
        continues=values["continues"],
    )
    stages.append(lambda stage=stage: stage)
files = RunFiles(Path(sys.argv[1]))
plan = SimpleNamespace(stages=tuple(stages), files=files, seq_length=8)
run_tool(lambda: run_to_end(plan, lambda plan, record: "the report"))
"""


class StubRun:
    """A quickstart of stub stages in a folder: `first`, then `steps`, which continues, then `last`."""

    def __init__(self, folder):
        self.folder = folder / "run"
        self.folder.mkdir()
        self.scripts = folder
        self.text = folder / "text"
        self.text.write_text("text")
        (folder / "stub.py").write_text(STUB)
        (folder / "driver.py").write_text(DRIVER)
        self.flags = {"first": [], "steps": [], "last": []}

    def start(self):
        stages = [
            self._stage("first", self.text, "--input", self.text),
            self._stage("steps", self.output("first"), "--steps", "10"),
            self._stage("last", self.output("steps"), "--input", self.output("steps")),
        ]
        plan = self.scripts / "plan.json"
        plan.write_text(json.dumps(stages))
        command = [sys.executable, self.scripts / "driver.py", self.folder, plan]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self):
        process = self.start()
        output, _ = process.communicate(timeout=60)
        return SimpleNamespace(returncode=process.returncode, output=output)

    def _stage(self, name, needs, *arguments):
        command = [sys.executable, self.scripts / "stub.py", name, "--folder", self.folder, *arguments]
        return {
            "name": name,
            "command": [*map(str, command), *self.flags[name]],
            "inputs": [str(needs)],
            "outputs": [str(self.output(name))],
            "continues": name == "steps",
        }

    def output(self, name):
        return self.folder / f"{name}.out"

    def starts(self):
        """Names of the stages that were started since the last call."""
        path = self.folder / "starts"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return names

    def hold(self):
        """Let `steps` stop half-way."""
        (self.folder / "hold").touch()

    def wait_for_half(self):
        wait_until(lambda: self.output("steps").exists() and self.output("steps").read_text() == "5")

    def release(self):
        (self.folder / "hold").unlink()


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)


@pytest.fixture
def stub_run(tmp_path):
    return StubRun(tmp_path)


def test_stages_run_in_order_once(stub_run):
    result = stub_run.run()
    assert result.returncode == 0, result.output
    assert stub_run.starts() == ["first", "steps", "last"]
    assert stub_run.output("last").read_text() == "10"
    assert result.output.endswith("\nthe report\n")
    assert (stub_run.folder / "logs" / "first.log").read_text() == "says first\n"
    result = stub_run.run()
    assert result.returncode == 0 and stub_run.starts() == []
    assert result.output.count("finished earlier") == 3


def test_commands_of_a_run_do_it_again_by_hand(stub_run):
    stub_run.run()
    stub_run.starts()
    commands = stub_run.folder / "commands.sh"
    subprocess.run(["bash", commands], check=True, cwd="/")
    assert stub_run.starts() == ["first", "steps", "last"]


def test_changed_setting_redoes_the_stage_and_later_ones(stub_run):
    stub_run.run()
    stub_run.starts()
    stub_run.flags["steps"] = ["--setting", "new"]
    result = stub_run.run()
    assert result.returncode == 0, result.output
    assert stub_run.starts() == ["steps", "last"]
    assert "steps     is done again, for its settings changed (--setting: not given → new)" in result.output
    assert "last      is done again, for its input changed" in result.output
    # From nothing, with the earlier result kept: a continued one would have nothing left to do.
    assert (stub_run.folder / "previous" / "steps.out").read_text() == "10"
    assert (stub_run.folder / "previous" / "steps.log").exists()


def test_changed_input_redoes_all_that_depends_on_it(stub_run):
    stub_run.run()
    stub_run.starts()
    stub_run.text.write_text("other text")
    assert stub_run.run().returncode == 0
    assert stub_run.starts() == ["first", "steps", "last"]
    assert stub_run.output("first").read_text() == "other text"


def test_lost_output_is_made_again(stub_run):
    stub_run.run()
    stub_run.starts()
    stub_run.output("last").unlink()
    result = stub_run.run()
    assert stub_run.starts() == ["last"]
    assert "its output was changed or removed" in result.output


@pytest.mark.parametrize(("message", "exit_code"), [("error: no such thing", 2), ("ValueError: broken", 1)])
def test_failure_is_one_line_and_the_next_run_starts_there(stub_run, message, exit_code):
    stub_run.flags["last"] = ["--fail", message]
    result = stub_run.run()
    assert result.returncode == exit_code
    log = stub_run.folder / "logs" / "last.log"
    assert result.output.splitlines()[-1] == (
        f"error: stage last failed: {message.removeprefix('error: ')} (full output: {log})"
    )
    assert stub_run.starts() == ["first", "steps", "last"]
    stub_run.flags["last"] = []
    assert stub_run.run().returncode == 0
    assert stub_run.starts() == ["last"]


def test_ctrl_c_ends_the_stage_in_order_and_the_next_run_continues(stub_run):
    stub_run.hold()
    process = stub_run.start()
    stub_run.wait_for_half()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output.endswith("interrupted; the same command goes on from here\n")
    assert (stub_run.folder / "ended-in-order").exists()
    stub_run.release()
    stub_run.starts()
    result = stub_run.run()
    assert result.returncode == 0, result.output
    assert stub_run.starts() == ["steps", "last"]
    assert stub_run.output("last").read_text() == "10"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_kill_ends_the_stage_too_and_the_next_run_waits_for_that(stub_run):
    stub_run.hold()
    process = stub_run.start()
    stub_run.wait_for_half()
    process.kill()
    process.communicate()
    stub_run.release()
    result = stub_run.run()
    assert result.returncode == 0, result.output
    assert (stub_run.folder / "ended-in-order").exists()
    assert stub_run.starts() == ["first", "steps", "steps", "last"]
    assert stub_run.output("last").read_text() == "10"


def worker_of(process):
    """The process that does the work of the stage that a quickstart runs."""
    (stage,) = psutil.Process(process.pid).children()
    (worker,) = stage.children()
    return stage, worker


def has_ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform != "linux", reason="processes that hold a lock are found on Linux only")
def test_workers_of_a_killed_stage_are_ended(stub_run):
    stub_run.hold()
    process = stub_run.start()
    stub_run.wait_for_half()
    stage, worker = worker_of(process)
    stage.kill()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a process was killed" in output
    wait_until(lambda: has_ended(worker))


@pytest.mark.skipif(sys.platform != "linux", reason="processes that hold a lock are found on Linux only")
def test_next_run_ends_the_workers_that_a_killed_one_has_left(stub_run):
    stub_run.hold()
    process = stub_run.start()
    stub_run.wait_for_half()
    stage, worker = worker_of(process)
    # In this order the stage cannot end its worker.
    stage.suspend()
    process.kill()
    process.communicate()
    stage.kill()
    assert not has_ended(worker)
    with locked(stub_run.folder / ".lock", seconds_to_end=0.1):
        wait_until(lambda: has_ended(worker))


def test_continuing_with_other_settings_starts_from_nothing(stub_run):
    stub_run.hold()
    process = stub_run.start()
    stub_run.wait_for_half()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    stub_run.release()
    stub_run.flags["steps"] = ["--setting", "new"]
    assert stub_run.run().returncode == 0
    assert (stub_run.folder / "previous" / "steps.out").read_text() == "5"


def test_second_quickstart_in_the_same_folder_is_refused(stub_run):
    stub_run.hold()
    process = stub_run.start()
    stub_run.wait_for_half()
    second = stub_run.run()
    assert second.returncode == 2
    assert second.output == (
        f"error: another command (process {process.pid}) is at work in {stub_run.folder}; give another --run-dir\n"
    )
    stub_run.release()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert stub_run.starts() == ["first", "steps", "last"]


def test_damaged_record_is_refused(tmp_path):
    path = tmp_path / "stages.json"
    for text in ("{", "[]", '{"stages": {"a": {}}}'):
        path.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            RunRecord(path)


# ---- The report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    lines = [iteration_line(it, f"{9 - it / 4:.2f}") for it in range(1, 21)]
    bands = [
        {"name": "top 40 %", "share": 0.4, "loss": 2.0, "perplexity": math.exp(2.0), "tokens": 4000},
        {"name": "last 10 %", "share": 0.6, "loss": float("nan"), "perplexity": float("nan"), "tokens": 0},
    ]
    evaluation = {
        "loss": 3.0,
        "perplexity": math.exp(3.0),
        "tokens": 10000,
        "bands": bands,
        "tokens_per_second": 1234.5,
    }
    evaluation["expert_load"] = [{"layer": 2, "max_over_mean": 1.25, "tokens_per_expert": [5000, 3000, 1000, 1000]}]
    return Results(
        history=TrainingHistory([*lines, VALIDATION_10]),
        evaluation=evaluation,
        unigram_loss=math.log(500),
        training_speed=5678.9,
        trained_tokens=1_000_000,
        stage_seconds={"corpus": 1.0, "train": 66.0},
        sample="def f():\n```\n    pass",
        settings="4 layers",
        paths={"checkpoint": tmp_path / "checkpoints"},
    )


def test_report_holds_the_numbers(results, tmp_path):
    report = render_report(results)
    for row in (
        "| top 40 %     |  40.0% |  4,000 | 2.000 |        7.4 |",
        "| last 10 %    |  60.0% |      0 |     – |          – |",
        "| all          | 100.0% | 10,000 | 3.000 |       20.1 |",
        "| 2     |     1.25 |                50 30 10 10 |",
        "| training   | 1,000,000 |    5,679 |",
        "Time: 1:07 (corpus 0:01, train 1:06).",
        f"- checkpoint: {tmp_path / 'checkpoints'}",
        "````text\ndef f():\n```\n    pass\n````",
    ):
        assert row in report
    assert "token frequencies only: 500.0" in report


@pytest.mark.parametrize("has_validation", [True, False])
def test_loss_curve_is_an_image(results, tmp_path, has_validation):
    if not has_validation:
        results.history.validations.clear()
    draw_loss_curve(results, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        image.load()
        assert image.format == "PNG" and image.width >= 1000


def test_entropy_of_even_counts_is_the_log_of_their_number():
    assert entropy(np.array([7.0, 0.0, 7.0, 7.0, 7.0])) == pytest.approx(math.log(4))


# ---- All of it, for real ---------------------------------------------------------------------------------------------


def write_text(path):
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    path.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in sources))


@pytest.mark.slow
def test_killed_in_training_and_started_again_it_finishes(tmp_path):
    text, run_dir = tmp_path / "text.jsonl", tmp_path / "a run"
    write_text(text)
    arguments = [
        *("--input", text, "--run-dir", run_dir, "--vocab-size", 512, "--train-iters", 60, "--hidden-size", 64),
        *("--num-layers", 2, "--seq-length", 64, "--num-experts", 4, "--frequent-visible-experts", 2),
    ]
    command = [sys.executable, "-P", "-m", "maskmoe.quickstart", *map(str, arguments)]
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: tracker.exists() and tracker.read_text(), seconds=120)
    first.kill()
    first.communicate()

    second = run_quickstart(*arguments)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("finished earlier") == 4
    assert "train     goes on where it was" in second.stdout
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["perplexity"] < 300
    assert len(evaluation["expert_load"]) == 2
    log = TrainingHistory((run_dir / "logs" / "train.log").read_text().splitlines())
    assert max(log.iterations) == 60
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("iter_*")) == ["iter_0000060"]
    assert (run_dir / "report.md").read_text() in second.stdout
    with Image.open(run_dir / "loss.png") as image:
        image.load()
    assert json.loads((run_dir / "model" / "config.json").read_text())["architectures"] == ["MaskMoEForCausalLM"]

    third = run_quickstart(*arguments, "--prompt", "-- import")
    assert third.returncode == 0
    assert third.stdout.count("finished earlier") == 7
    assert "sample    is done again, for its settings changed (--prompt" in third.stdout
    assert (run_dir / "sample.txt").read_text().startswith("-- import")
