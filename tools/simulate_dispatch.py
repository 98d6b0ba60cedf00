"""Runs `maskmoe.commands.simulate_dispatch` from a checkout; see its `--help`."""

from maskmoe.cli import run_tool
from maskmoe.commands.simulate_dispatch import main

if __name__ == "__main__":
    run_tool(main)
