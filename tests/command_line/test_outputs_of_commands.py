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
from support.system import wait_until

from maskmoe.comparison.steps import maskmoe_command


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
]


@pytest.fixture
def folder(original_workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with copies of the text, the tokenizer, the dataset and the counts."""
    for name in ("tokenizer.model", "data.bin", "data.idx", "counts.safetensors"):
        shutil.copy(original_workshop / name, tmp_path / name.removesuffix(".safetensors"))
    (tmp_path / "short").write_text('{"prompt": "The quick"}\n')
    (tmp_path / "a_text_document.bin").write_text("The quick brown fox.\n" * 3)
    shutil.copy(original_workshop / "text.txt", tmp_path)
    np.save(tmp_path / "table.npy", np.zeros((400, 1), np.int64))
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


def test_a_report_of_a_check_is_not_written_over_its_model_file(folder: Path) -> None:
    (folder / "m.yaml").write_text("num-layers: 2\n")
    check = ("pretrain", "--check", "--nproc-per-node", "1", "m.yaml", "--json")
    before = contents(folder)
    run_command(*check, "m.yaml", "--force").assert_refused("it is an input of this command")
    assert contents(folder) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
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
