"""Runs the launcher for `launch/pretrain.sh`; see `launch/pretrain.sh --help`."""

import sys

from maskmoe.command_line.run_tool import run_tool
from maskmoe.launch.launcher import launch

if __name__ == "__main__":
    run_tool(lambda: launch("launch/pretrain.sh", sys.argv[1:]))
