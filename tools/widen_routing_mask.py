"""Runs `maskmoe mask widen` from a checkout; `--help` shows the arguments."""

from maskmoe.command_line.widen_routing_mask import main
from maskmoe.processes.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
