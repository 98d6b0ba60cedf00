"""Runs `maskmoe.commands.preprocess_data` from a checkout; see its `--help`."""

from maskmoe.cli import run_tool
from maskmoe.commands.preprocess_data import main

if __name__ == "__main__":
    run_tool(main)
