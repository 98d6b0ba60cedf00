"""Runs `maskmoe mlflow` from a checkout; `--help` shows the arguments."""

from maskmoe.cli import run_tool
from maskmoe.commands.log_to_mlflow import main

if __name__ == "__main__":
    run_tool(main)
