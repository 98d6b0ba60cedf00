"""`maskmoe launch`: pretrains a model file on one node or many, like `launch/pretrain.sh`."""

import sys

from maskmoe.launch.launcher import launch


def main() -> None:
    """Launch the run that `sys.argv` describes."""
    launch("maskmoe launch", sys.argv[1:])
