"""Progress lines of commands that import large packages before they can show a progress bar."""

import sys


def say_loading(phase: str) -> None:
    """Print what the command does now to stderr.

    Args:
        phase: what it does, such as "reading the model".
    """
    print(f"loading: {phase}", file=sys.stderr, flush=True)
