"""Tiny wheels with text, and descriptions of their text."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def make_wheel(path: Path, files: Mapping[str, bytes | str]) -> str:
    """Write a wheel with files in the given order, and return its sha256."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(zipfile.ZipInfo(name), data)
    path.write_bytes(content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def source(wheel: Path, sha256: str, **keys: object) -> dict[str, Any]:
    """Return the description of a wheel's text, by default of all its Python files."""
    base = {"package": "words", "version": "1.0", "file": wheel.name, "sha256": sha256, "license": "MIT"}
    return base | {"members": "*.py"} | {name.replace("_", "-"): value for name, value in keys.items()}


def write_description(path: Path, train: object, held_out: object = None, held_out_bytes: int = 0) -> Path:
    """Write a description of text sources and return its path."""
    content = {"requirements": "words.txt", "held-out-bytes": held_out_bytes, "train": train}
    path.write_text(json.dumps(content | ({"held-out": held_out} if held_out else {})))
    return path
