"""Runs `maskmoe simulate` from a checkout; `--help` shows the arguments."""

from maskmoe.cli import run_tool
from maskmoe.commands.simulate_dispatch import main

if __name__ == "__main__":
    run_tool(main)
