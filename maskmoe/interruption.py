"""How a run that is interrupted ends: which signals ask it to save, and what its exit codes say."""

import os
import signal
from pathlib import Path

SIGNALS_THAT_SAVE = (signal.SIGTERM, signal.SIGUSR1)
"""Preemption and the end of a time limit, as Slurm, Kubernetes and torchrun announce them."""

SIGNALS_THAT_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""What a launcher takes as the wish that the run ends, and hands on to the ranks as `SIGTERM`."""

EXIT_REQUEUE = 75
"""The run saved a checkpoint because it was asked to stop; started again it goes on. `EX_TEMPFAIL` of sysexits.h."""

EXIT_HANG = 76
"""The run stood still for longer than it may, and ended itself; started again, if possible elsewhere, it goes on."""

EXIT_CODE_FILE = "MASKMOE_EXIT_CODE_FILE"
"""The environment variable by which a launcher names the file for `leave_exit_code`."""


def leave_exit_code(code: int) -> None:
    """Tell the launcher, if there is one that asked for it, the exit code of a rank that must not be restarted.

    torchrun takes any code but 0 for a failure, restarts the ranks, and itself ends with 1.
    """
    if path := os.environ.get(EXIT_CODE_FILE):
        unfinished = Path(f"{path}.{os.getpid()}")
        unfinished.write_text(str(code))
        unfinished.replace(path)


def is_last_attempt() -> bool:
    """Whether torchrun does not start this rank again if it fails, or there is no torchrun."""
    restarts, most = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return restarts >= most


def read_exit_code(path: Path) -> int | None:
    """What a rank has left; None if none has."""
    return int(path.read_text()) if path.exists() else None
