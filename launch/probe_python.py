"""Prints whether the Python that runs this file can be used for MaskMoE. launch/lib.sh runs it with every candidate.

Usage: `python -I probe_python.py MINIMUM_PYTHON MAXIMUM_PYTHON MINIMUM_TORCH`, such as with `3.12 3.13 2.11`. It prints
one line of fields separated by tabs: `ok EXECUTABLE VERSION TORCH`, where TORCH is the version of an installed
torch that is new enough, or else `none`; or `no REASON`. In a virtual environment the program describes the
environment's base Python, because a new environment is made from the base Python.
"""

import os
import re
import sys


def parse_version(text: str) -> "tuple[int, int]":
    """Return the major and the minor version number."""
    major, minor = re.match(r"(\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def find_obstacle() -> "str | None":
    """Return why this Python cannot be used, or None if it can be used."""
    from importlib.util import find_spec

    if sys.implementation.name != "cpython":
        return f"it is {sys.implementation.name}, not CPython"
    if "t" in sys.abiflags:
        return "it is a free-threaded build"
    for module in ("venv", "_ssl", "_ctypes", "zlib"):
        if find_spec(module) is None:
            return f"it lacks the module {module}"
    if find_spec("ensurepip") is None and find_spec("pip") is None:
        return "it has neither ensurepip nor pip (Debian and Ubuntu have them in python3-venv)"
    return None


def usable_torch(minimum_torch: "tuple[int, int]") -> str:
    """Return the version of the installed torch if it is new enough, else "none", without the slow import of torch."""
    from importlib import metadata
    from importlib.util import find_spec

    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"
    return version if find_spec("torch") is not None and parse_version(version) >= minimum_torch else "none"


def main() -> "list[str]":
    """Return the fields of the line to print."""
    minimum_python, maximum_python, minimum_torch = (parse_version(text) for text in sys.argv[1:4])
    # Check the version before anything that an old Python lacks.
    if not minimum_python <= sys.version_info[:2] <= maximum_python:
        return ["no", "it is Python {}.{}".format(*sys.version_info)]
    if sys.prefix != sys.base_prefix and sys._base_executable != sys.executable:
        os.execv(sys._base_executable, [sys._base_executable, *sys.orig_argv[1:]])
    obstacle = find_obstacle()
    if obstacle:
        return ["no", obstacle]
    return ["ok", sys.executable, "{}.{}.{}".format(*sys.version_info), usable_torch(minimum_torch)]


print("\t".join(main()))
