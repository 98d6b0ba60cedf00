"""Runs `maskmoe.commands.build_routing_mask` from a checkout; see its `--help`."""

from maskmoe.cli import run_tool
from maskmoe.commands.build_routing_mask import main

if __name__ == "__main__":
    run_tool(main)
