"""Runs `maskmoe thin` from a checkout; `--help` shows the arguments."""

from maskmoe.cli import run_tool
from maskmoe.commands.thin_checkpoints import main

if __name__ == "__main__":
    run_tool(main)
