"""Ends a run after a checkpoint if the launcher asks for it, so that the run can continue on more nodes."""

import os
from pathlib import Path

from maskmoe.megatron_compat.globals import get_args
from maskmoe.processes.interruption import LEAVE_FILE
from maskmoe.training.loop.rank_store import RankStore
from maskmoe.training.watch.callback import Callback


class LeaveAfterSave(Callback):
    """Makes Megatron end its training loop after a checkpoint if the launcher's file asks for it.

    Args:
        ranks: The ranks of the run, all of which save.

    Attributes:
        is_leaving: Whether the run ends for this reason.
    """

    def __init__(self, ranks: RankStore) -> None:
        self.is_leaving = False
        self._ranks = ranks
        self._file = Path(path) if (path := os.environ.get(LEAVE_FILE)) else None
        self._num_saves = 0

    def after_save(self) -> None:
        """Decide together with all ranks whether the run ends."""
        if self._file is None:
            return
        self._num_saves += 1
        if self._ranks.broadcast(f"leave/{self._num_saves}", str(self._file.exists())) == "True":
            self.is_leaving = True
            # Megatron leaves its loop after an iteration that is a multiple of this number.
            get_args().exit_interval = 1
