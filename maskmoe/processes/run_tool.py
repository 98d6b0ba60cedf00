"""Runs the main function of a command-line tool and reports its errors."""

import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from maskmoe.errors import RunFailure, UserError, one_line

EXIT_RUN_FAILURE = 1
EXIT_BAD_INPUT = 2
_EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE

# Errors that other words on the command line do not cure.
_FAILURES_OF_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE)

# Seconds that all other ranks of a node wait before they report an error, so that only the first rank reports it.
_REPORT_DELAY = 3


def run_tool(main: Callable[[], None]) -> None:
    """Run `main`, and report its `UserError` or `RunFailure` in one line on stderr.

    An error of the operating system is reported in one line, too, except on a rank. All other exceptions are errors of
    the program, and keep their traceback. The process exits with code 2 for bad input, as argparse does for bad flags,
    with 1 for a failed run, with 130 after Ctrl-C, and silently with 141 if nobody reads its output.
    """
    try:
        main()
        if sys.stdout is not None:  # it is None if the parent process has closed it
            sys.stdout.flush()
    except BrokenPipeError:
        # Go on only if the reader of this process's output has closed it, as `head` does.
        poll = select.poll()
        poll.register(1, 0)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            raise
        code = _EXIT_BROKEN_PIPE
    except (UserError, RunFailure, OSError) as error:
        if isinstance(error, OSError):
            # A rank is restarted, and the place of the error helps.
            if error.strerror is None or "LOCAL_RANK" in os.environ:
                raise
            file = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            kind = RunFailure if error.errno in _FAILURES_OF_SYSTEM or not file else UserError
            error = kind(f"{file}{error.strerror}")
        sys.unraisablehook = lambda _: None  # files of a failed command fail again when they are closed
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler may save, but no state is left to save
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # The first rank of the node usually fails with the same error. Torchrun then ends this rank while it waits.
            time.sleep(_REPORT_DELAY)
        with suppress(OSError):
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        code = EXIT_RUN_FAILURE if isinstance(error, RunFailure) else EXIT_BAD_INPUT
    except SystemExit as exit_request:
        code = exit_request.code
    except KeyboardInterrupt:
        code = 130
    else:
        return
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            # The interpreter would try again when it exits, and replace the exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
