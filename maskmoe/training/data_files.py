"""Watches the size of the files that a run reads its tokens from.

They are mapped into memory. Reading beyond the new end of a file that someone shortens kills the process with SIGBUS,
without a word.
"""

import itertools
import os
from collections.abc import Iterable

from maskmoe.errors import RunFailure

_FILES_AT_A_TIME = 8


class DataFiles:
    """The token files of a run, with the sizes that they had at its start.

    Args:
        prefixes: of the datasets.
    """

    def __init__(self, prefixes: Iterable[str]):
        self._sizes = {f"{prefix}.bin": os.path.getsize(f"{prefix}.bin") for prefix in prefixes}
        self._turns = itertools.cycle(self._sizes)

    def check_some(self) -> None:
        """Look at a few of them, others each time: on large parallel file systems each look takes time.

        Raises:
            RunFailure: one has become shorter, or is gone.
        """
        for path in itertools.islice(self._turns, min(_FILES_AT_A_TIME, len(self._sizes))):
            self._check(path)

    def check_all(self) -> None:
        """Look at all of them; raises as `check_some`."""
        for path in self._sizes:
            self._check(path)

    def _check(self, path: str) -> None:
        try:
            size = os.path.getsize(path)
        except OSError as error:
            raise RunFailure(
                f"{path} can no longer be read: {error.strerror}. It must not change while it is used"
            ) from error
        if size < self._sizes[path]:
            raise RunFailure(
                f"{path} has shrunk from {self._sizes[path]} to {size} bytes under the run. Put the whole file back "
                "and start again: the run goes on from its last checkpoint"
            )
