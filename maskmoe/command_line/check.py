"""`maskmoe check`: checks a model file's settings, like `launch/pretrain.sh --check`."""

import sys

from maskmoe.launch.launcher import launch


def main() -> None:
    """Check the run that `sys.argv` describes, without starting it."""
    launch("maskmoe check", ["--check", *sys.argv[1:]])
