"""Runs `maskmoe preprocess` from a checkout; `--help` shows the arguments."""

from maskmoe.cli import run_tool
from maskmoe.commands.preprocess_data import main

if __name__ == "__main__":
    run_tool(main)
