"""Keeps the id that a service such as Weights & Biases or MLflow has for a run, in a file of the run folder."""

from collections.abc import Callable
from pathlib import Path

from maskmoe.files.outputs import atomic_output


def find_or_make_id(path: Path, make: Callable[[], str]) -> str:
    """Return the id in a file; if the file does not exist, make an id and write the file.

    Args:
        path: the file, in a folder that is created if missing.
        make: makes a new id.
    """
    if path.exists():
        return path.read_text().strip()
    run_id = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(path) as unfinished:
        unfinished.write_text(run_id + "\n")
    return run_id
