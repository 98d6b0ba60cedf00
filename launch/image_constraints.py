"""Prints the constraints for installing beside a torch that is already there, as in a GPU image.

Usage: `python -I image_constraints.py CONSTRAINTS_FILE TORCH_VERSION`, run by the Python that has the torch. That torch
is pinned to the version it has, so that pip can only keep it. What else the image brings, or pins with $PIP_CONSTRAINT,
was built to fit that torch: our pins of those packages are left out, so that pip changes them only where a requirement
forces it, and then inside `.venv`.
"""

import os
import re
import sys
from importlib import metadata
from pathlib import Path


def package_name(requirement):
    """Normalised name of the package that a line of a constraints file is about, or None for comments and options."""
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    return re.sub(r"[-_.]+", "-", match.group(1)).lower() if match else None


def names_in(constraints_file):
    return {package_name(line) for line in Path(constraints_file).read_text().splitlines()}


def main():
    constraints_file, torch_version = sys.argv[1:3]
    decided = {package_name(distribution.name) for distribution in metadata.distributions() if distribution.name}
    for image_file in os.environ.get("PIP_CONSTRAINT", "").split():
        if Path(image_file).is_file():
            decided |= names_in(image_file)
    print(f"torch=={torch_version}")
    for line in Path(constraints_file).read_text().splitlines():
        if package_name(line) not in decided | {None, "torch"}:
            print(line)


main()
