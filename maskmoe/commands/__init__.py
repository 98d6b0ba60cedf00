"""The subcommands of `maskmoe`: a module for each, whose `main` reads the command line; `tools/*.py` call the same."""
