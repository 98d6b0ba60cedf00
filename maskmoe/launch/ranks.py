"""Runs torchrun: `python -m maskmoe.launch.ranks` takes torchrun's arguments, but ends without torchrun's report.

When ranks fail or a signal stops the run, torchrun prints a traceback of its own and a table, which hide what the ranks
have printed before. This program prints one line about the rank that failed first, or nothing if that rank has
explained its exit. Torchrun's own log lines go to `torchrun.log` in the folder of `--log-dir`, if the folder is given.
Each failure, also one after which torchrun starts the ranks again, gets into the journal of the run.
"""

import logging
import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from maskmoe.files.run_folder import RUN_FOLDER_VARIABLE, Journal, Kind
from maskmoe.launch.meeting import watch_meeting
from maskmoe.processes.interruption import EXIT_HANG, EXIT_REQUEUE

_EXPLAINED = (2, EXIT_REQUEUE, EXIT_HANG)
_ON_REQUEST = (2, EXIT_REQUEUE)  # bad input, which is not tried again, and a stop
_EXIT_FAILURE = 1
_PREFIX = re.compile(r"(\[rank\d+\]: )?(error: )?")  # of torch, and ours
_FAILURES = "torch.distributed.elastic.multiprocessing.api"  # the logger that reports how a rank failed
_FAILURE = "failed (exitcode: %s) local_rank: %s"
_LOOKS_FATAL = re.compile(r"error|fatal|terminate|abort", re.IGNORECASE)


def main() -> None:
    """Run torchrun with the arguments of this process; exit with code 1 if a rank failed or a signal came."""
    arguments = parse_arguments(sys.argv[1:])
    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank${rank}]: ")
    folder = arguments.log_dir
    redirect_log(folder)
    if arguments.nnodes.isdecimal() and int(arguments.nnodes) > 1:
        watch_meeting(arguments.rdzv_endpoint, arguments.rdzv_id, int(arguments.nnodes))
    if run_folder := os.environ.get(RUN_FOLDER_VARIABLE):
        logging.getLogger(_FAILURES).addHandler(FailureJournal(Journal(Path(run_folder)), folder))
    try:
        run.run(arguments)
    except RendezvousError as error:
        where = f"{arguments.rdzv_endpoint}, --rendezvous-id {arguments.rdzv_id}"
        print(f"error: the {arguments.nnodes} nodes did not meet at {where}: {error}", file=sys.stderr, flush=True)
        sys.exit(_EXIT_FAILURE)
    except ChildFailedError as error:
        rank, failure = find_cause(error.failures)
        if failure.exitcode not in _EXPLAINED:
            text = describe(rank, failure.local_rank, failure.exitcode, folder)
            print(f"launch: {text}", file=sys.stderr, flush=True)
        sys.exit(_EXIT_FAILURE)
    except SignalException:
        sys.exit(_EXIT_FAILURE)


def parse_arguments(words: Sequence[str]) -> Namespace:
    """Parse torchrun's arguments; an older torchrun gets `--shutdown-timeout`, too.

    Torch 2.11 waits 30 s for ranks that a signal stops. So replace the default of `PContext.close`, for signals only.
    """
    parser = run.get_args_parser()
    if "--shutdown-timeout" in parser.format_help():
        return parser.parse_args(words)
    parser.add_argument("--shutdown-timeout", type=int, default=30)
    arguments = parser.parse_args(words)
    close = PContext.close

    def close_later(self: PContext, death_sig: Any = None, timeout: int = 30) -> None:
        close(self, death_sig, timeout if death_sig is None else arguments.shutdown_timeout)

    PContext.close = close_later
    return arguments


class FailureJournal(logging.Handler):
    """Writes torchrun's reports of failed ranks into the journal of the run.

    torchrun does not say to anybody but its log why it starts the ranks again.

    Args:
        journal: The journal.
        folder: The folder of `--log-dir`; None if the output of the ranks is in no file.
    """

    def __init__(self, journal: Journal, folder: str | None) -> None:
        super().__init__()
        self._journal = journal
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        """Write an entry if the record reports a failure that the rank has not asked for."""
        if not (str(record.msg).startswith(_FAILURE) and isinstance(record.args, tuple)):
            return
        code, local_rank = record.args[:2]
        if isinstance(code, int) and isinstance(local_rank, int) and code not in _ON_REQUEST:
            text = f"local {describe(local_rank, local_rank, code, self._folder)}"
            self._journal.write(Kind.ENDED, text, exit_code=code)


def redirect_log(folder: str | None) -> None:
    """Let torch's loggers write to `torchrun.log` in a folder, or nowhere, instead of to stderr.

    Args:
        folder: The folder, which exists; None to write nowhere.
    """
    handler = logging.FileHandler(Path(folder) / "torchrun.log", delay=True) if folder else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # torch gives handlers of their own to several of its loggers.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.")]:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logger = logging.getLogger("torch")
    logger.handlers[:] = [handler]
    logger.propagate = False


def find_cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the rank that failed first. A rank that a signal ended comes before ranks that then lost their peer.

    Args:
        failures: Torchrun's records of the failed ranks, by rank. SIGTERM is torchrun's own.
    """

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, int]:
        _, failure = item
        return failure.exitcode >= 0 or failure.exitcode == -signal.SIGTERM, failure.timestamp

    return min(failures.items(), key=order)


def describe(rank: int, local_rank: int, code: int, folder: str | None) -> str:
    """Describe how a rank failed, in one line, with the last line that it wrote to stderr.

    Args:
        rank: The rank.
        local_rank: The rank on this node.
        code: The exit code; negative for a signal.
        folder: The folder of `--log-dir`; None if the output of the ranks is in no file.
    """
    how = f"failed with exit code {code}"
    if code < 0:
        how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
    logs = Path(folder).glob(f"*/attempt_*/{local_rank}/stderr.log") if folder is not None else ()
    log = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    if log is None:
        return f"rank {rank} {how}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"rank {rank} {how}{_last_words(lines, code)}; its log is {log}"


def _last_words(lines: Sequence[str], code: int) -> str:
    written = [line.strip() for line in lines if line.strip()]
    if code < 0 and not (written and _LOOKS_FATAL.search(written[-1])):
        return ""  # the process had no chance to write why it ends
    return f": {_PREFIX.sub('', written[-1], count=1)}" if written else ""


if __name__ == "__main__":
    main()
