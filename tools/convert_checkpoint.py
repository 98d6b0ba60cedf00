"""Runs `maskmoe.commands.convert_checkpoint` from a checkout; see its `--help`."""

from maskmoe.cli import run_tool
from maskmoe.commands.convert_checkpoint import main

if __name__ == "__main__":
    run_tool(main)
