"""Runs the main function of a command-line tool and reports its errors."""

import os
import signal
import sys
import time
from collections.abc import Callable

from maskmoe.errors import RunFailure, UserError
from maskmoe.interruption import EXIT_REQUEUE, leave_exit_code

EXIT_RUN_FAILURE = 1
EXIT_BAD_INPUT = 2

# Seconds that all other ranks of a node wait before they report an error, so that only the first rank reports it.
_REPORT_DELAY = 10


def run_tool(main: Callable[[], None]) -> None:
    """Run `main`, and report its `UserError` or `RunFailure` in one line on stderr.

    The process exits with code 2 for bad input, as argparse does for bad flags, with 1 for a failed run, and with 130
    after Ctrl-C.
    """
    try:
        main()
    except (UserError, RunFailure) as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler may save, but no state is left to save
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # The first rank of the node usually fails with the same error. Torchrun then ends this rank while it waits.
            time.sleep(_REPORT_DELAY)
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_RUN_FAILURE if isinstance(error, RunFailure) else EXIT_BAD_INPUT
    except SystemExit as exit_request:
        code = exit_request.code
    except KeyboardInterrupt:
        code = 130
    else:
        return
    if code in (EXIT_BAD_INPUT, EXIT_REQUEUE):
        leave_exit_code(code)
    sys.exit(code)
