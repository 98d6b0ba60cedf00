"""Runs commands in this process as a user runs them, and looks at what they print and write."""

import contextlib
import importlib
import io
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from maskmoe.command_line.main import dispatch
from maskmoe.processes.run_tool import run_tool

TRAINING = {"pretrain": "maskmoe.training.pretrain", "evaluate": "maskmoe.training.evaluate"}
TRAINING |= {"check": "maskmoe.training.check"}


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    Attributes:
        code: the exit code.
        output: what the command printed on stdout.
        errors: what the command printed on stderr.
    """

    code: object
    output: str
    errors: str

    def problem(self, *words: str, after_progress: bool = False) -> str | None:
        """Return why this is not a refusal; None if it is: exit code 2 and one line of error that holds all words.

        Args:
            words: words of the error.
            after_progress: whether a progress bar may precede the error, which only the work itself can find. Lines
                that say what the command loads may always precede the error.
        """
        lines = self.messages().splitlines()[-1 if after_progress else 0 :]
        if self.code != 2 or len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > 1000:
            return f"code {self.code}, {len(lines)} lines: {self.errors[-300:]}"
        missing = [word for word in words if word not in lines[0]]
        return f"{missing} missing: {lines[0]}" if missing else None

    def messages(self) -> str:
        """Return what the command printed on stderr without the lines that say what the command loads."""
        return "".join(line for line in self.errors.splitlines(keepends=True) if not line.startswith("loading: "))

    def assert_refused(self, *words: str) -> None:
        """Check that the command ended with exit code 2 and one line of error that holds all `words`."""
        assert self.problem(*words) is None


def run_command(*words: object, folder: Path | str = ".") -> Outcome:
    """Run `maskmoe WORDS…` in this process, which is the only rank of training commands with flags only.

    Args:
        words: the command line.
        folder: the folder in which the command runs, by default the current folder.
    """
    command = [str(word) for word in words]
    output, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        has_model_file = any(word.endswith(".yaml") for word in command)
        launches = command[0] == "pretrain" and (has_model_file or not command[1:2] or not command[1].startswith("--"))
        is_check = command[0] == "pretrain" and any(word.partition("=")[0] == "--check" for word in command)
        module = None if launches else TRAINING.get("check" if is_check else command[0])
        patch.setattr(sys, "argv", ["maskmoe", *command] if module is None else [f"{command[0]}.py", *command[1:]])
        patch.setattr("signal.signal", lambda *_: None)
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        try:
            if module is None:
                run_tool(lambda: dispatch(command))
            else:
                run_tool(importlib.import_module(module).main)
        except SystemExit as end:
            return Outcome(end.code, output.getvalue(), errors.getvalue())
    return Outcome(0, output.getvalue(), errors.getvalue())


def refuse_all(
    folder: Path, cases: Iterable[tuple[Sequence[str], Sequence[str]]], after_progress: bool = False
) -> None:
    """Check that commands are refused and neither make, change nor remove a file; reports all cases that fail.

    Args:
        folder: the folder whose files are compared.
        cases: the words of each command line, and the words that its error must hold.
        after_progress: whether a progress bar may precede the error.
    """
    failed, number = [], 0
    files = _files(folder)
    for command, expected in cases:
        number += 1
        if command[0] in ("pretrain", "evaluate"):  # some of their errors come after Megatron has parsed the flags
            forget_megatrons_globals()
        try:
            problem = run_command(*command).problem(*expected, after_progress=after_progress)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        if (now := _files(folder)) != files:
            problem = f"changed files {[path for path, _ in now.items() ^ files.items()]}; {problem}"
            files = now
        if problem:
            failed.append(f"{str(command)[:300]}\n      {problem}")
    assert number, "there is no case"
    assert not failed, f"{len(failed)} of {number} cases failed:\n" + "\n".join(failed)


def forget_megatrons_globals() -> None:
    """Let Megatron parse another command line in this process."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    destroy_global_vars()
    unset_num_microbatches_calculator()


@contextlib.contextmanager
def writing_nothing(folder: Path) -> Iterator[None]:
    """Check that the block neither makes, changes nor removes a file below a folder."""
    before = _files(folder)
    yield
    assert _files(folder) == before


def _files(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Return the mode, and the content or the target of a link, of everything below an existing folder, by path."""
    assert folder.is_dir()
    found: dict[str, tuple[int, bytes | str]] = {}
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            mode = path.lstat().st_mode
            content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(mode) else b""
            found[str(path)] = (mode, content)
    return found
