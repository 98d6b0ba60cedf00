"""Runs `maskmoe convert` from a checkout; `--help` shows the arguments."""

from maskmoe.command_line.convert_checkpoint import main
from maskmoe.processes.run_tool import run_tool

if __name__ == "__main__":
    run_tool(main)
