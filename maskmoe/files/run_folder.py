"""The names in the folder of a run, and the journal of the run: what happened, one JSON object a line.

The launchers of all nodes and the first rank write to the journal. Each process appends to a file of its own, so
processes on different hosts never write to the same file.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from maskmoe.files.json_files import type_adapter
from maskmoe.files.untrusted import UnusableFile, open_regular

RUN_FOLDER_VARIABLE = "MASKMOE_RUN_DIR"
"""The environment variable with which a launcher names the run folder to the ranks."""

ARGUMENTS = "args.yaml"
"""The file of a run folder with the arguments of the newest start, a model file."""

REPORT = "report.html"
"""The page that a training writes into its run folder at its end."""

TEXT_TAG = "maskmoe/"
"""Beginning of the tags of the texts that MaskMoE itself logs to TensorBoard, such as the command line."""

CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
JOURNAL = "journal"
"""The folders of the checkpoints, of TensorBoard's event files and of the journal in a run folder."""


def run_folder(save: str | None, tensorboard_dir: str | None = None) -> Path | None:
    """Return the folder of a run: the launcher's, or the folder that contains `--save` or else `--tensorboard-dir`.

    A folder with another name than the launcher's `checkpoints` and `tensorboard` is itself the run folder.
    """
    if folder := os.environ.get(RUN_FOLDER_VARIABLE):
        return Path(folder)
    for folder, name in ((save, CHECKPOINTS), (tensorboard_dir, TENSORBOARD)):
        if folder:
            path = Path(folder).absolute()
            return path.parent if path.name == name else path
    return None


_MAX_BYTES = 1 << 24

_PROCESS = secrets.token_hex(4)  # hosts may have equal names and use equal process ids, such as containers

Fact = str | int | float | bool
"""A value that an entry carries."""


class Kind(StrEnum):
    """The kinds of entries.

    Attributes:
        LAUNCHED: The launcher of the first node runs torchrun, whose ranks may fail before they train. Facts: `ranks`,
            `nodes`.
        STARTED: The ranks begin to train.
        ENDED: The ranks have ended. Facts: `exit_code`.
        SAVED: A checkpoint was saved. Facts: `seconds` for which training stood still, `is_local`, `is_asynchronous`.
        WARNED: Something deserves a look, such as a spike of the loss.
        NODES: A node was lost, has left, waits, or was taken in.
    """

    LAUNCHED = "launched"
    STARTED = "started"
    ENDED = "ended"
    SAVED = "saved"
    WARNED = "warned"
    NODES = "nodes"


@dataclass(frozen=True)
class Entry:
    """One event of a run.

    Attributes:
        text: The event in words, on one line.
        time: Seconds since 1970 on the clock of the host that wrote the entry.
        iteration: The last finished iteration when the event happened; None if unknown.
        facts: Values that programs read, see `Kind`.
    """

    kind: Kind
    text: Annotated[str, AfterValidator(lambda text: " ".join(text.split()))]
    time: float
    host: str
    iteration: int | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)


class Journal:
    """Appends entries to this process's file of a run's journal; without a run folder, drops all entries.

    An entry that cannot be written is lost without an error: a full disk must not end a run because of its journal.
    """

    def __init__(self, run_folder: Path | None) -> None:
        self._folder = None if run_folder is None else run_folder / JOURNAL

    def write(self, kind: Kind, text: str, iteration: int | None = None, **facts: Fact) -> None:
        """Append an entry; see `Entry` for the arguments."""
        if self._folder is None:
            return
        entry = Entry(kind, text, time.time(), socket.gethostname(), iteration, facts)
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{socket.gethostname()}-{os.getpid()}-{_PROCESS}.jsonl"
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")


def read_journal(run_folder: Path) -> list[Entry]:
    """Return the entries of a run in the order of their times; without a journal, an empty list.

    Unfinished lines and unreadable files are skipped. Only the last 16 MiB of a file are read.
    """
    entries = (entry for path in (run_folder / JOURNAL).glob("*.jsonl") for entry in _read(path))
    return sorted(entries, key=lambda entry: entry.time)


def _read(path: Path) -> Iterator[Entry]:
    try:
        with open_regular(path) as stream:
            # Read only the end of a longer file. The end may begin within a line.
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _MAX_BYTES))
            lines = stream.read(_MAX_BYTES).splitlines()
    except (UnusableFile, OSError):
        return
    for line in lines:
        with suppress(ValueError):
            yield type_adapter(Entry).validate_json(line)
