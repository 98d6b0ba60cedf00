"""Every command that writes files refuses an output that is an input, or that exists, and ends cleanly by a signal."""

import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.command_lines import run_command
from support.paths import EXPORTED_MODEL
from support.suites import result
from support.system import wait_until

from maskmoe.comparison.steps import maskmoe_command
from maskmoe.comparison.suite import Suite
from maskmoe.comparison.table import write_table


def is_alive(process: int) -> bool:
    """Return whether the process with this id exists and has not exited. A zombie has exited."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


TEXT = "The quick brown fox jumps over the lazy dog. " * 40
TOKENIZE = "--tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model"
MASK = "--num-experts 4 --num-layers 2 --output OUT"
# Commands, the first file that each writes, and inputs that OUT may not name.
WRITERS = [
    ("corpus --output OUT --max-bytes 100000", "OUT", ""),
    ("tokenizer --input text.txt --vocab-size 400 --output-prefix OUT", "OUT.model", ""),
    (
        f"preprocess --input a_text_document.bin {TOKENIZE} --output-prefix OUT --workers 1",
        "OUT_text_document.bin",
        "a",
    ),
    ("count --data-path data --vocab-size 400 --output OUT --workers 1", "OUT", "data.bin data.idx"),
    ("count --merge counts --output OUT", "OUT", "counts"),
    (f"mask --vocab-size 400 --preset hash {MASK}", "OUT", ""),
    (f"mask --token-frequency counts --preset hash-balanced {MASK}", "OUT", "counts"),
    (f"mask --expert-table table.npy {MASK}", "OUT", "table.npy"),
    (f"generate --load {EXPORTED_MODEL} --prompts-file short --max-new-tokens 1 --output OUT", "OUT", "short"),
    ("compare suite.yaml --table table --report --output-dir .", "README.md", ""),
]


@pytest.fixture
def folder(original_workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with copies of the text, the tokenizer, the dataset, the counts and a suite with a result."""
    for name in ("tokenizer.model", "data.bin", "data.idx", "counts.safetensors"):
        shutil.copy(original_workshop / name, tmp_path / name.removesuffix(".safetensors"))
    for name in ("short", "a_text_document.bin"):
        (tmp_path / name).write_text("The quick brown fox.\n" * 3)
    shutil.copy(original_workshop / "text.txt", tmp_path)
    shutil.copy(original_workshop / "laptop.yaml", tmp_path)
    np.save(tmp_path / "table.npy", np.zeros((400, 1), np.int64))
    suite = tmp_path / "suite.yaml"
    suite.write_text("data: {vocab-size: 400}\nmodel: laptop.yaml\nvariants: {one: {mask: {preset: smoe}}}\n")
    settings = {flag: " ".join(words) or "true" for flag, words in Suite.read(suite, {}).variants["one"].flags.items()}
    without_effect = ("num-workers", "keep-last-checkpoints", "save-interval", "log-interval")
    settings = {flag: value for flag, value in settings.items() if flag not in without_effect}
    write_table(tmp_path / "table", [result("one", 1, 3.0, {**settings, "mask.preset": "smoe"})])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("command", "output", "inputs"), WRITERS)
def test_an_output_is_no_input_and_an_existing_one_needs_force(folder, command, output, inputs):
    """tests/files/test_outputs.py has other spellings and links of an input."""
    (folder / output).write_text("precious")
    before = contents(folder)
    for name in inputs.split():
        outcome = run_command(*command.replace("OUT", name).split(), "--force")
        outcome.assert_refused("it is an input of this command")
    run_command(*command.split()).assert_refused(f"cannot write {output}: it exists", "--force")
    assert contents(folder) == before
    outcome = run_command(*command.split(), "--force")
    assert outcome.code == 0, outcome.errors
    assert (folder / output).read_bytes() != b"precious"
    assert not list(folder.glob(".*"))


def test_an_analysis_is_not_written_into_a_checkpoint(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    for output in ("checkpoints", "checkpoints/routing"):
        outcome = run_command(*f"analyze --load checkpoints --data-path data --output-dir {output}".split())
        outcome.assert_refused("lies inside --load checkpoints")
    assert not any((folder / "checkpoints").iterdir())


def test_a_comparison_replaces_its_own_report_only(folder: Path) -> None:
    compare = ["compare", "suite.yaml", "--table", "table", "--run-dir", ".", "--report"]
    for _ in range(2):
        outcome = run_command(*compare)
        assert outcome.code == 0, outcome.errors
    (folder / "report" / "README.md").write_text("precious")
    run_command(*compare).assert_refused("report/README.md: it exists")
    assert (folder / "report" / "README.md").read_text() == "precious"


def test_a_report_of_a_check_is_not_written_over_its_model_file(folder: Path) -> None:
    (folder / "m.yaml").write_text("num-layers: 2\n")
    check = ("pretrain", "--check", "--nproc-per-node", "1", "m.yaml", "--json")
    before = contents(folder)
    run_command(*check, "m.yaml", "--force").assert_refused("it is an input of this command")
    assert contents(folder) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_workers_and_leaves_no_temporary_file(folder: Path, number: signal.Signals) -> None:
    (folder / "large.txt").write_text(f"{TEXT}\n" * 20_000)
    words = f"--input large.txt {TOKENIZE} --output-prefix out --workers 2 --shuffle-seed 1"
    process = subprocess.Popen(maskmoe_command("preprocess", *words.split()), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(folder.glob(".unshuffled*/.*.tmp")))
    # multiprocessing's resource tracker and its fork server come before the workers.
    wait_until(lambda: len(psutil.Process(process.pid).children(recursive=True)) >= 3)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    wait_until(lambda: not any(is_alive(child.pid) for child in started))
    if number != signal.SIGKILL:  # after which the command cannot remove its files
        assert (process.returncode, errors) == (128 + number, "")
        assert not list(folder.glob(".*"))


def test_a_signal_ends_the_training_of_a_tokenizer_at_once(folder: Path) -> None:
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnop "), 5_000_000)
    (folder / "large.txt").write_text("".join(letters))
    words = "--input large.txt --vocab-size 8000 --output-prefix out"
    process = subprocess.Popen(maskmoe_command("tokenizer", *words.split()))
    wait_until(lambda: psutil.Process(process.pid).cpu_times().user > 1.5)
    process.terminate()
    assert process.wait(5) == -signal.SIGTERM
    assert not list(folder.glob("*out*"))
    assert not list(folder.glob(".*"))
