"""The checkout that this package may run from, and short names for paths."""

from pathlib import Path

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]

SUBMIT_SCRIPT = _PACKAGE_PARENT / "launch" / "slurm" / "submit.sh"
"""The script that submits training to Slurm. The script exists only in a checkout of the repository."""


def runs_folder() -> Path:
    """Return the folder that holds run folders by default.

    The folder is `runs` of the checkout if the package runs from a checkout, else `runs` of the current folder.
    """
    parent = _PACKAGE_PARENT if SUBMIT_SCRIPT.is_file() else Path.cwd()
    return parent / "runs"


def short_path(path: Path | str) -> str:
    """Return the path relative to the current folder if the path lies inside, else the path unchanged."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
