"""How a run that is interrupted ends: which signals ask it to save, and what its exit codes say."""

import signal

SIGNALS_THAT_SAVE = (signal.SIGTERM, signal.SIGUSR1)
"""Preemption and the end of a time limit, as Slurm, Kubernetes and torchrun announce them."""

EXIT_REQUEUE = 75
"""The run saved a checkpoint because it was asked to stop; started again it goes on. `EX_TEMPFAIL` of sysexits.h."""

EXIT_HANG = 76
"""The run stood still for longer than it may, and ended itself."""
