"""What every command line tool shares: how it reports bad input and how it writes its output."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from maskmoe.errors import RunFailure, UserError
from maskmoe.interruption import EXIT_REQUEUE, leave_exit_code

EXIT_RUN_FAILURE = 1
EXIT_BAD_INPUT = 2

# What a rank that meets bad input leaves the first rank of its node to say it, in seconds.
_PRECEDENCE = 10


def run_tool(main: Callable[[], None]) -> None:
    """Run `main`; its `UserError` or `RunFailure` becomes one line on stderr.

    The exit code is 2 for bad input, as argparse has it for bad flags, and 1 for a failed run.
    """
    try:
        main()
    except (UserError, RunFailure) as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to be saved
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Usually the first rank of the node meets the same: torchrun then ends this one before it says it again.
            time.sleep(_PRECEDENCE)
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, RunFailure):
            sys.exit(EXIT_RUN_FAILURE)
        leave_exit_code(EXIT_BAD_INPUT)
        sys.exit(EXIT_BAD_INPUT)
    except SystemExit as end:
        if end.code in (EXIT_BAD_INPUT, EXIT_REQUEUE):
            leave_exit_code(end.code)
        raise
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    Readers see the old file or the complete new one, never a part.

    Raises:
        UserError: `path` is a folder, or its own folder does not exist or is not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose an existing, writable folder") from error
    os.close(descriptor)
    temporary_path = Path(temporary)
    try:
        yield temporary_path
        # mkstemp makes files private; outputs follow the user's umask like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary_path.chmod(0o666 & ~umask)
        os.replace(temporary_path, path)
    finally:
        temporary_path.unlink(missing_ok=True)
