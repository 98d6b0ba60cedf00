"""Keeps the page report.html of the running training up to date, without disturbing the training."""

import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any

from megatron.training import get_tensorboard_writer
from torch.utils.tensorboard import SummaryWriter

import maskmoe
from maskmoe.launch.run_folder import TENSORBOARD, run_folder
from maskmoe.run_report.facts import OWN_TEXT
from maskmoe.run_report.follow import END, UPDATE
from maskmoe.run_report.page import REPORT

_MOST_SECONDS_FOR_LAST_PAGE = 30.0
_LOWEST_PRIORITY = 19


class RunReport:
    """Writes the page of a run from time to time, in a process of its own; does nothing on most ranks.

    The page is drawn from TensorBoard's event files, which the last rank writes. So the last rank has the process.

    Args:
        args: Megatron's arguments, after `choose_event_folder`, and after Megatron has opened the writer of
            `--tensorboard-dir`.
    """

    def __init__(self, args: Namespace) -> None:
        self._writer: SummaryWriter | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._interval = args.report_interval
        self._next = time.monotonic() + self._interval
        folder = run_folder(args.save, args.tensorboard_dir)
        if folder is None or not self._interval:
            return
        self._writer = get_tensorboard_writer()
        if self._writer is None:
            return
        tolerate_write_errors(self._writer)
        log_facts(
            {"command": f"python -m maskmoe.training.pretrain {shlex.join(sys.argv[1:])}", "versions": _versions()}
        )
        program = (sys.executable, "-m", "maskmoe.run_report.follow")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Signals to the group of this process, such as those of torchrun, must not end the process too early.
            self._process = subprocess.Popen(
                [*program, args.tensorboard_dir, folder.resolve().name, str(folder / REPORT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            # From its first moment the process takes only the time that training leaves.
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _LOWEST_PRIORITY)
        except OSError as error:
            print(f"warning: {folder / REPORT} is not written: {error}", file=sys.stderr, flush=True)

    def __call__(self) -> None:
        """Let the process write the page if it is time; to be called before each micro-batch."""
        if self._process is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval
            self._send(UPDATE)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Let the process write the last page at the end of the block, and wait for the end of the process."""
        try:
            yield
        finally:
            if self._process is not None:
                self._send(END)
                try:
                    self._process.wait(_MOST_SECONDS_FOR_LAST_PAGE)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()

    def _send(self, command: bytes) -> None:
        if self._writer is not None:
            self._writer.flush()
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):  # the process was killed
                self._process.stdin.write(command)
                self._process.stdin.flush()


def choose_event_folder(args: Namespace) -> None:
    """Choose the folder `tensorboard` of the run folder for event files if the run has a page and no other folder."""
    folder = run_folder(args.save, args.tensorboard_dir)
    if folder is not None and args.report_interval and args.tensorboard_dir is None:
        args.tensorboard_dir = str(folder / TENSORBOARD)


def log_facts(facts: Mapping[str, str]) -> None:
    """Write settings of the run to TensorBoard, from where they get into the page; on the last rank only."""
    if writer := get_tensorboard_writer():
        for name, text in facts.items():
            writer.add_text(OWN_TEXT + name, text)


class _TolerantEventWriter:
    """Stops to write event files after the first error, so that a full disk does not end the training.

    Args:
        events: TensorBoard's writer.
    """

    def __init__(self, events: Any) -> None:
        self._events = events
        self._has_failed = False

    def add_event(self, event: Any) -> None:
        """Write an event."""
        self._try(lambda: self._events.add_event(event))

    def flush(self) -> None:
        """Write everything to the disk."""
        self._try(self._events.flush)

    def close(self) -> None:
        """Flush; the writer ends with the process."""
        self.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._events, name)

    def _try(self, call: Callable[[], object]) -> None:
        if self._has_failed:
            return
        try:
            call()
        except OSError as error:
            self._has_failed = True
            print(
                f"warning: TensorBoard's events and {REPORT} end here: {error}. The training continues",
                file=sys.stderr,
                flush=True,
            )


def tolerate_write_errors(writer: SummaryWriter) -> None:
    """Let a writer warn once, and then drop everything, when its files cannot be written."""
    files: Any = writer._get_file_writer()
    files.event_writer = _TolerantEventWriter(files.event_writer)


def _versions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch"))
    return f"maskmoe {maskmoe.__version__}, {packages}"
