"""Runs the program `maskmoe` as `python -m maskmoe`."""

from maskmoe.commands.main import main

if __name__ == "__main__":
    main()
