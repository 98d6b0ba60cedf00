"""Runs `maskmoe mask` from a checkout; `--help` shows the arguments."""

from maskmoe.cli import run_tool
from maskmoe.commands.build_routing_mask import main

if __name__ == "__main__":
    run_tool(main)
