"""Runs `maskmoe status` from a checkout; `--help` shows the arguments."""

from maskmoe.cli import run_tool
from maskmoe.commands.status import main

if __name__ == "__main__":
    run_tool(main)
