"""Every command that writes files refuses an output that is an input, or that exists, and changes no file then."""

import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.command_lines import run_command
from support.paths import EXPORTED_MODEL
from support.system import wait_until

from maskmoe.command_line.main import SUBCOMMANDS
from maskmoe.comparison.stage import StageFolder, maskmoe_command
from maskmoe.errors import UserError
from maskmoe.processes.lifetimes import is_alive

MODULES = {name: module for name, (module, _) in SUBCOMMANDS.items()}
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def folder(original_workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with copies of the text, the tokenizer, the dataset, the counts and the mask."""
    for name in ("text.txt", "tokenizer.model", "data.bin", "data.idx", "counts.safetensors", "mask.safetensors"):
        shutil.copy(original_workshop / name, tmp_path / name.removesuffix(".safetensors"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    name = next(name for name in sorted(MODULES, key=len, reverse=True) if command.startswith(f"{name} "))
    monkeypatch.setattr(sys, "argv", [f"maskmoe {name}", *command.removeprefix(name).split()])
    import_module(f"maskmoe.{MODULES[name]}").main()


TOKENIZE = "--tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model"
SIMULATE = "simulate --data-path data --routing-mask mask --hidden-size 8 --num-gpus 8 --tokens-per-rank 4 --topk 1"

# Commands whose output OUT is one of their inputs.
OUTPUTS_THAT_ARE_INPUTS = {
    "dataset of count": ("count --data-path data --vocab-size 400 --output OUT", "data.bin data.idx"),
    "parts of count": ("count --merge counts --output OUT", "counts"),
    "counts of mask": ("mask --token-frequency counts --num-experts 4 --num-layers 2 --frequent-mass 0.4 "
                       "--frequent-visible-experts 2 --assignment balanced --output OUT", "counts"),
    "table of mask": ("mask --expert-table table.npy --num-experts 4 --num-layers 2 --output OUT", "table.npy"),
    "mask of widen": ("mask widen --routing-mask mask --token-frequency counts --frequent-mass 0.7 "
                      "--frequent-visible-experts 4 --output OUT", "mask counts"),
    "inputs of simulate": (f"{SIMULATE} --output OUT", "data.bin data.idx mask"),
    "prompts of generate": (f"generate --load {EXPORTED_MODEL} --prompts-file text.txt --output OUT", "text.txt"),
    "plot of simulate": (f"{SIMULATE} --plot OUT", "data.bin mask"),
    "text of preprocess": (f"preprocess --input a_text_document.bin {TOKENIZE} --output-prefix OUT", "a"),
    "model of preprocess": ("preprocess --input text.txt --tokenizer-type SentencePieceTokenizer "
                            "--tokenizer-model a_text_document.bin --output-prefix OUT", "a"),
    "text of compare": ("compare laptop.yaml --input README.md --report --output-dir .", "README.md"),
    "text of tokenizer": ("tokenizer --input tokenizer.model --vocab-size 300 --output-prefix OUT", "tokenizer"),
}  # fmt: skip
CASES = [(command, name) for command, names in OUTPUTS_THAT_ARE_INPUTS.values() for name in names.split()]


@pytest.mark.parametrize(("command", "name"), CASES)
def test_an_input_is_not_overwritten(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str) -> None:
    """tests/files/test_outputs.py has other spellings and links of an input."""
    np.save(folder / "table.npy", np.zeros((400, 1), np.int64))
    (folder / "a_text_document.bin").write_text(TEXT)
    (folder / "README.md").write_text(TEXT)
    before = contents(folder)
    with pytest.raises(UserError, match="it is an input of this command"):
        run(monkeypatch, command.replace("OUT", name) + " --force")
    assert contents(folder) == before


def test_an_analysis_is_not_written_into_a_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "checkpoints").mkdir()
    for output in ("checkpoints", "checkpoints/routing"):
        with pytest.raises(UserError, match="lies inside --load checkpoints"):
            run(monkeypatch, f"analyze --load checkpoints --data-path data --output-dir {output}")
    assert not any((folder / "checkpoints").iterdir())


@pytest.mark.parametrize("flag", ["--html", "--json"])
def test_a_status_is_not_written_over_the_files_of_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    files = [folder / "run" / name for name in ("tensorboard/events.out.tfevents.1", "logs/rank0.log", "args.yaml")]
    for path in (*files, folder / "save" / "common.pt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# save: {folder / 'save'}\n")
    (folder / "link").symlink_to("run/args.yaml")
    for output in (*files, folder / "run/logs/new", folder / "save/common.pt", folder / "save/new", folder / "link"):
        with pytest.raises(UserError, match="it belongs to the run"):
            run(monkeypatch, f"status run {flag} {output} --force")
    assert {path.read_text() for path in files} == {f"# save: {folder / 'save'}\n"}
    for _ in range(2):  # a page and a status in the run folder may be replaced
        run(monkeypatch, f"status run {flag} run/status.{flag.removeprefix('--')} --force")
    with pytest.raises(UserError, match="it exists"):
        run(monkeypatch, f"status run {flag} run/status.{flag.removeprefix('--')}")


QUICKSTART = "quickstart --run-dir . --input text.txt"
COMPARE = "compare laptop.yaml --run-dir . --input text.txt"


@pytest.mark.parametrize(
    ("command", "name", "stages"),
    [
        *((QUICKSTART, name, "stages") for name in ("commands.sh", "report.md", "loss.png", "sample.txt")),
        *((COMPARE, name, "data/stages") for name in ("data/commands.sh", "report/README.md", "report/losses.png")),
        (COMPARE.replace("--input", "--output-dir other --input"), "data/commands.sh", "data/stages"),
    ],
)
def test_a_run_folder_replaces_no_file_of_the_user(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str, stages: str
) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(TEXT)
    monkeypatch.setattr(StageFolder, "run", lambda *_: pytest.fail("a stage ran"))
    before = contents(folder)
    with pytest.raises(UserError, match=f"cannot write .*{name}: it exists, but no run has written it"):
        run(monkeypatch, f"{command} text.txt")
    (folder / stages).mkdir(parents=True)  # of an earlier start
    with pytest.raises(UserError, match=f"cannot write .*{name}: it is an input of this command"):
        run(monkeypatch, f"{command} {name}")
    assert (folder / name).read_text() == TEXT
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["args.yaml", "journal", "checkpoints"])
def test_quickstart_leaves_the_folder_of_another_run_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The run may be training: its checkpoints would be moved away from under it."""
    (folder / name).mkdir()
    monkeypatch.setattr(StageFolder, "run", lambda *_: pytest.fail("a stage ran"))
    with pytest.raises(UserError, match=rf"has the {name} of another run; choose another --run-dir"):
        run(monkeypatch, f"{QUICKSTART} text.txt")


def test_a_report_elsewhere_checks_no_file_of_the_run_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "commands.sh").write_text(TEXT)
    run(monkeypatch, f"{COMPARE} --report --output-dir other")
    assert (folder / "data" / "commands.sh").read_text() == TEXT


def test_a_report_in_the_run_folder_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        run(monkeypatch, f"{COMPARE} --report")
    assert {path.name for path in (folder / "report").iterdir()} == {"README.md", "losses.png"}


@pytest.mark.parametrize("name", ["mask", "data.bin", "data.idx", "data.tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("joint", [" ", "="])
def test_a_report_of_a_check_is_not_written_over_an_input(folder: Path, name: str, joint: str) -> None:
    """Another file that exists needs `--force`."""
    flags = f"--tokenizer-model{joint}tokenizer.model --routing-mask{joint}mask --data-path{joint}data"
    check = ("pretrain", "--check", "1", *flags.split(), "--json")
    (folder / "m.yaml").write_text("num-layers: 2\n")
    (folder / "data.tokenizer.json").touch()
    before = contents(folder)
    run_command(*check, name, "--force").assert_refused("it is an input of this command")
    run_command(*check, "text.txt").assert_refused("it exists", "--force")
    run_command("pretrain", "--check", "m.yaml", "--json", "m.yaml", "--force").assert_refused(
        "it is an input of this command"
    )
    assert contents(folder) == before


# Commands, and the first file that each writes.
WRITERS = {
    "corpus --output OUT --max-bytes 100000": "OUT",
    "tokenizer --input text.txt --vocab-size 400 --output-prefix OUT": "OUT.model",
    f"preprocess --input text.txt {TOKENIZE} --output-prefix OUT --workers 1": "OUT_text_document.bin",
    "count --data-path data --vocab-size 400 --output OUT --workers 1": "OUT",
    "mask --vocab-size 400 --preset hash --num-experts 4 --num-layers 2 --output OUT": "OUT",
    "mask widen --routing-mask mask --token-frequency counts --frequent-mass 0.7 --frequent-visible-experts 4 "
    "--output OUT": "OUT",
    f"{SIMULATE} --output OUT": "OUT",
    "compare laptop.yaml --input text.txt --report --output-dir .": "README.md",
}


@pytest.mark.parametrize("command", WRITERS)
def test_an_existing_output_needs_force(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    output = folder / WRITERS[command]
    output.write_text("precious")
    before = contents(folder)
    with pytest.raises(UserError, match=f"cannot write {WRITERS[command]}: it exists; .*--force"):
        run(monkeypatch, command)
    assert contents(folder) == before
    run(monkeypatch, f"{command} --force")
    assert output.read_bytes() != b"precious"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("children", [2, 3], ids=["while workers start", "with a worker"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_workers_and_leaves_no_temporary_file(
    folder: Path, number: signal.Signals, children: int
) -> None:
    (folder / "large.txt").write_text(f"{TEXT}\n" * 20_000)
    words = f"--input large.txt {TOKENIZE} --output-prefix out --workers 2 --shuffle-seed 1"
    process = subprocess.Popen(maskmoe_command("preprocess", *words.split()), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(folder.glob(".unshuffled*/.*.tmp")))
    # multiprocessing's resource tracker and its fork server come before the workers.
    wait_until(lambda: len(psutil.Process(process.pid).children(recursive=True)) >= children)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    wait_until(lambda: not any(is_alive(child.pid) for child in started))
    if number == signal.SIGKILL:
        return  # The command cannot remove its files.
    assert process.returncode == 128 + number
    assert errors == ""
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
