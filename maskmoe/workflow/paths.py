"""The script that submits jobs to Slurm, and short names for paths."""

from pathlib import Path

SUBMIT_SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm" / "submit.sh"
"""The script that submits training to Slurm. The script exists only in a checkout of the repository."""


def short_path(path: Path | str) -> str:
    """Return the path relative to the current folder if the path lies inside, else the path unchanged."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
