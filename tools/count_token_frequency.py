"""Runs `maskmoe count` from a checkout; `--help` shows the arguments."""

from maskmoe.cli import run_tool
from maskmoe.commands.count_token_frequency import main

if __name__ == "__main__":
    run_tool(main)
