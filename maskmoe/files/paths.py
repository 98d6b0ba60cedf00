"""The folders that MaskMoE uses by default, and short names for paths."""

from pathlib import Path

from maskmoe.errors import UserError

RUNS = Path("runs")
"""The folder, in the current folder, in which runs are kept by default."""

_SHIPPED = Path(__file__).resolve().parents[1] / "launch"  # with links to launch/models and launch/suites


def shipped_file(name: str, folder: str) -> Path:
    """Return the path of a file, which may be the bare name of a file that the package ships.

    Args:
        name: A path. A file in the current folder goes before a shipped file of the same name.
        folder: Where to look for shipped files: `models` or `suites`.
    """
    if Path(name).exists():
        return Path(name)
    shipped = {path.name: path for path in (_SHIPPED / folder).glob("*")}  # none if a ZIP has lost the links
    return shipped.get(name, Path(name))


def check_folder(path: Path, flag: str = "") -> None:
    """Check that a folder exists. Raises a UserError that names the flag otherwise."""
    if not path.is_dir():
        raise UserError(f"{flag} {path} does not exist, or is not a folder".lstrip())


def short_path(path: Path | str) -> str:
    """Return the path relative to the current folder if the path lies inside, else the path unchanged."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
