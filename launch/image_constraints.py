"""Prints constraints for an installation on top of an existing torch, as in a GPU image.

Usage: `python -I image_constraints.py CONSTRAINTS_FILE TORCH_VERSION`, run by the Python that has the torch. The output
pins torch to the installed version, so that pip keeps it. The image built its other packages, and those that it pins by
$PIP_CONSTRAINT, to fit that torch: so the output omits our pins of these packages. Then pip changes such a package only
if a requirement forces a change, and only inside `.venv`.
"""

import os
import re
import sys
from importlib import metadata
from pathlib import Path


def package_name(line: str) -> str | None:
    """Return the normalised package name in a line of a constraints file, or None for a comment or an option."""
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line)
    return re.sub(r"[-_.]+", "-", match.group(1)).lower() if match else None


def names_in(constraints_file: str) -> set[str | None]:
    """Return the package names in a constraints file."""
    return {package_name(line) for line in Path(constraints_file).read_text().splitlines()}


def main() -> None:
    """Print the constraints."""
    constraints_file, torch_version = sys.argv[1:3]
    names_of_image = {package_name(distribution.name) for distribution in metadata.distributions() if distribution.name}
    for image_file in os.environ.get("PIP_CONSTRAINT", "").split():
        if Path(image_file).is_file():
            names_of_image |= names_in(image_file)
    print(f"torch=={torch_version}")
    for line in Path(constraints_file).read_text().splitlines():
        if package_name(line) not in names_of_image | {None, "torch"}:
            print(line)


main()
