"""Says whether the Python that runs this file can carry MaskMoE. launch/lib.sh runs it under every candidate.

Usage: `python -I probe_python.py MINIMUM_PYTHON MINIMUM_TORCH`, for instance with `3.12 2.11`. Prints one line of
fields separated by tabs: `ok EXECUTABLE VERSION TORCH`, where TORCH is the version of an installed torch that is new
enough or else `none`; or `no REASON`. In a virtual environment it answers for the Python below it, since that is what
a new environment is made from.
"""

import os
import re
import sys


def parse_version(text):
    return tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", text).groups())


def unsuitable_because():
    """What keeps this Python from being used, or None."""
    from importlib.util import find_spec

    if sys.implementation.name != "cpython":
        return f"it is {sys.implementation.name}, not CPython"
    if "t" in sys.abiflags:
        return "it is a free-threaded build"
    for module in ("venv", "_ssl", "_ctypes", "zlib"):
        if find_spec(module) is None:
            return f"it lacks the module {module}"
    if find_spec("ensurepip") is None and find_spec("pip") is None:
        return "it has neither ensurepip nor pip (on Debian and Ubuntu, python3-venv brings it)"
    return None


def usable_torch(minimum_torch):
    """Version of the installed torch if it is new enough, else "none". Imports no torch: that takes seconds."""
    from importlib import metadata
    from importlib.util import find_spec

    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"
    return version if find_spec("torch") is not None and parse_version(version) >= minimum_torch else "none"


def main():
    minimum_python, minimum_torch = (parse_version(text) for text in sys.argv[1:3])
    # Before anything that an old Python lacks.
    if sys.version_info < minimum_python:
        return ["no", "it is Python {}.{}".format(*sys.version_info)]
    if sys.prefix != sys.base_prefix and sys._base_executable != sys.executable:
        os.execv(sys._base_executable, [sys._base_executable, *sys.orig_argv[1:]])
    reason = unsuitable_because()
    if reason:
        return ["no", reason]
    return ["ok", sys.executable, "{}.{}.{}".format(*sys.version_info), usable_torch(minimum_torch)]


print("\t".join(main()))
