"""Notices when a data file shrinks during a run."""

import itertools
import os
from collections.abc import Iterable

from maskmoe.errors import RunFailure
from maskmoe.training.watch.callback import Callback

_MOST_FILES_AT_ONCE = 8


class DataFiles(Callback):
    """The files from which a run reads its tokens, with their sizes at its start.

    The files are mapped into memory. If someone shortens a file during the run, reading beyond its new end kills the
    process by SIGBUS without a message. So check some of the files, in turn, before each micro-batch.

    Args:
        prefixes: Prefixes of the datasets.
    """

    def __init__(self, prefixes: Iterable[str]) -> None:
        self._sizes = {f"{prefix}.bin": os.path.getsize(f"{prefix}.bin") for prefix in prefixes}
        self._turns = itertools.cycle(self._sizes)

    def before_micro_batch(self) -> None:
        """Check the next files. Raises RunFailure."""
        for path in itertools.islice(self._turns, min(_MOST_FILES_AT_ONCE, len(self._sizes))):
            self._check(path)

    def check_all(self) -> None:
        """Check all files, which takes long on large parallel file systems.

        Raises:
            RunFailure: A file has become shorter or is gone.
        """
        for path in self._sizes:
            self._check(path)

    def _check(self, path: str) -> None:
        try:
            size = os.path.getsize(path)
        except OSError as error:
            raise RunFailure(
                f"{path} can no longer be read: {error.strerror}. Data files must not change while a run uses them"
            ) from error
        if size < self._sizes[path]:
            raise RunFailure(
                f"{path} has shrunk from {self._sizes[path]} to {size} bytes during the run. Restore the file and "
                "start the run again: it resumes from its last checkpoint"
            )
