"""Writes programs that stand in for others."""

from pathlib import Path


def write_script(path: Path, text: str) -> Path:
    """Write an executable file and the folder that holds it; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path
