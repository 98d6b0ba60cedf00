"""How a program that is one rank of a group ends."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def run_as_rank(main: Callable[[], None]) -> NoReturn:
    """Run a program, and end its process with code 0, or with code 1 and a traceback.

    The process ends without destroying Python's objects. A process group that lives until then has threads that still
    finish a collective. If such a thread needs the interpreter while it is being destroyed, Python ends the thread in
    the middle of C++, which aborts the process: "terminate called without an active exception". Groups outlive
    `destroy_process_group` if a reference cycle holds them, and if a rank fails.
    """
    code = 0
    try:
        main()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
