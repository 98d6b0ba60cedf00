"""Runs `maskmoe mask widen` from a checkout; `--help` shows the arguments."""

from maskmoe.cli import run_tool
from maskmoe.commands.widen_routing_mask import main

if __name__ == "__main__":
    run_tool(main)
