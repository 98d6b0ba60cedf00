"""Runs `maskmoe sample` from a checkout; `--help` shows the arguments."""

from maskmoe.command_line.run_tool import run_tool
from maskmoe.command_line.sample_text import main

if __name__ == "__main__":
    run_tool(main)
