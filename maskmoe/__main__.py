"""Runs the program `maskmoe` as `python -m maskmoe`."""

from maskmoe.command_line.main import main

if __name__ == "__main__":
    main()
